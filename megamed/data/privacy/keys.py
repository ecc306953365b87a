"""The project's secret key: what makes pseudonyms the same throughout a project, and meaningless outside it.

It lies in `STORE.private/project.key`, beside the store and never in it: who has store and key can try out names and
numbers until a pseudonym matches, who has the store alone cannot. Keep it where the source files are kept, back it up
(without it a later ingest gives known patients new names), and never copy it along with a store.
"""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from megamed.utils import UserError

KEY_BYTES = 32
FILE_MODE, FOLDER_MODE = 0o600, 0o700


def private_folder(store: Path) -> Path:
    """`STORE.private`, where everything lies that may say who somebody is."""
    store = Path(os.path.abspath(store))
    return store.with_name(f"{store.name}.private")


def load_or_create_key(path: Path) -> bytes:
    """The key in a file; where there is no such file, a new one is drawn and written there.

    The file holds 64 hexadecimal digits. One file can serve several stores (`--key FILE`): the same patient then has
    the same pseudonym in all of them. A file that is there is never written to, and of several processes that start
    at once one creates it and all read the same.

    Args:
        path: the key file. Folders that are missing are created for the owner alone.

    Raises:
        UserError: others than the owner may read or change the file, it does not hold a key, or it cannot be
            read or written.
    """
    try:
        if not os.path.lexists(path):
            _create(path)
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(2 * KEY_BYTES + 3)
    except OSError as error:
        raise UserError(f"the key file {path} cannot be read or made ({error.strerror}); give a path on a disk "
                        "of this machine with --key FILE") from None
    if mode & 0o077:
        raise UserError(f"the key file {path} is open to others than its owner (mode {mode:o}); close it with "
                        f"chmod 600 {path}, and make a new key if somebody else may have read it")
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise UserError(f"the key file {path} does not hold {2 * KEY_BYTES} hexadecimal digits; restore it from a "
                        "backup, or name another file with --key FILE")
    return key


def _create(path: Path) -> None:
    """A file with a new key under that name, whole from the first moment; none where one came up meanwhile."""
    _make_folders(path.parent)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
    try:
        with open(handle, "wb") as file:
            file.write(secrets.token_hex(KEY_BYTES).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        # Unlike a renaming, a link never takes the place of a file that is there.
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.unlink(draft)


def _make_folders(folder: Path) -> None:
    """Like `mkdir -p`, but each folder that is made is the owner's alone."""
    if not folder.is_dir():
        _make_folders(folder.parent)
        folder.mkdir(FOLDER_MODE, exist_ok=True)
