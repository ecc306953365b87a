"""DICOM: headers, grouping into stacks and runs, geometry, pixels."""

from megamed.data.readers.dicom.reader import DicomReader

__all__ = ["DicomReader"]
