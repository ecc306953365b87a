"""Readers of DICOM, NIfTI and pictures, behind one interface."""

from megamed.data.readers.base import FileHeader, Grouping, Identity, Reader, Refusal, SeriesPlan

__all__ = ["FileHeader", "Grouping", "Identity", "Reader", "Refusal", "SeriesPlan"]
