"""The volume store: one folder a series, and an index over all."""

from megamed.data.store.record import SeriesRecord, series_id
from megamed.data.store.volume_store import Fault, VolumeStore
from megamed.data.store.writer import StoreWriter, write_series

__all__ = ["Fault", "SeriesRecord", "StoreWriter", "VolumeStore", "series_id", "write_series"]
