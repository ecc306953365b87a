"""Siemens' CSA image header, (0029,xx10), of the kind that begins with SV10: names with lists of texts.

Layout, little-endian: `SV10`, 4 bytes, the number of fields, 4 bytes; each field is its name in 64 bytes, multiplicity,
VR in 4 bytes, a data type, the number of items, 4 bytes; each item four numbers, of which the second is its length, and
its text filled up to 4 bytes. Siemens publishes none of it; readers of it agree on it.
"""

from __future__ import annotations

import struct

# No header has more; a damaged one may claim any number.
_MOST = 1000


def read_csa(value: bytes) -> dict[str, list[str]]:
    """Items that are not empty, by the name of their field; nothing of a header that is not as described."""
    try:
        return _read(value)
    except (struct.error, UnicodeDecodeError):
        return {}


def _read(value: bytes) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    if value[:4] != b"SV10":
        return found
    at = 16
    for _ in range(min(struct.unpack_from("<L", value, 8)[0], _MOST)):
        name = value[at : at + 64].split(b"\0")[0].decode("ascii")
        count = struct.unpack_from("<L", value, at + 76)[0]
        at += 84
        items = []
        for _ in range(min(count, _MOST)):
            length = struct.unpack_from("<4L", value, at)[1]
            text = value[at + 16 : at + 16 + length].split(b"\0")[0].decode("latin-1").strip()
            items += [text] if text else []
            at += 16 + -(-length // 4) * 4
        found[name] = items
    return found
