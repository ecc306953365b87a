"""Radiology reports from JSON, JSON Lines, CSV and Open-i's XML: identifiers replaced, text scrubbed."""

from megamed.data.reports.base import Reading, Report, image_keys, image_names
from megamed.data.reports.read import can_read, read
from megamed.data.reports.scrub import scrub

__all__ = ["Reading", "Report", "can_read", "image_keys", "image_names", "read", "scrub"]
