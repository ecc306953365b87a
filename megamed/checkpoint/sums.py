"""Checksums of a checkpoint's files, in the format of `sha256sum`: a flipped byte anywhere is noticed, and named.

`sha256sum --check SHA256SUMS` in a checkpoint's folder checks it without megamed. The list has every file there but
itself, so one that is missing or added is noticed as well; and it is compared letter by letter with what it should be,
so a change in the list is too.
"""

from collections.abc import Mapping
from pathlib import Path

from megamed.checkpoint.writer import digest_of, write_file

SUMS = "SHA256SUMS"


def write_sums(folder: Path, known: Mapping[str, str], leaves: str = "") -> None:
    """Write the list.

    Args:
        folder: that has all its files.
        known: checksums of some of them, by name within the folder; the others' are computed.
        leaves: a file that is there now and will not be.
    """
    names = [name for name in _files(folder) if name != leaves]
    write_file(folder / SUMS, _text({name: known.get(name) or digest_of(folder / name) for name in names}))


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint that has a list; None for nothing.

    Args:
        folder: of the checkpoint.
        part, parts: check the list, and of the files each so-manieth, beginning with this one.
    """
    try:
        content = (folder / SUMS).read_bytes()
        lines = [line.partition("  ") for line in content.decode().splitlines()]
        listed = {name: digest for digest, _, name in lines}
        if _text(listed) != content:
            raise ValueError
    except OSError as error:
        return f"{SUMS} cannot be read ({error.strerror})"
    except ValueError:
        return f"{SUMS} is damaged"
    there = _files(folder)
    for name in sorted({*listed, *there}):
        if name not in there:
            return f"{name} is missing"
        if name not in listed:
            return f"{name} is not in {SUMS}"
    for name in there[part::parts]:
        try:
            if digest_of(folder / name) != listed[name]:
                return f"{name} is damaged: its checksum is another"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != SUMS
    )


def _text(sums: Mapping[str, str]) -> bytes:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode()
