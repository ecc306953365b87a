"""What a store says of how it was de-identified, by the profile in `megamed.data.privacy.profile`."""

from __future__ import annotations

from typing import Literal


def declaration(dates: Literal["drop", "shift"]) -> dict[str, object]:
    """What a store says of how it was de-identified: the methods in DICOM's codes (PS3.16, CID 7050).

    Pixels are as they were. What has words burnt in, or may have, is refused by the readers; a face that can be
    computed from slices of a head is not taken out (113102, Clean Recognizable Visual Features, is not applied).
    """
    codes = ["113100", "113105", "113111", *(["113107"] if dates == "shift" else [])]
    return {
        "patient_identity_removed": "YES",
        "method": "DICOM PS3.15 Annex E, by whitelist",
        "method_codes": sorted(codes),
        "dates": {"drop": "dropped", "shift": "shifted"}[dates],
    }
