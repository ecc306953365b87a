"""The real studies that tests use where they are present: `shared/data` beside the project's folder."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def needs(*folders: str) -> pytest.MarkDecorator:
    """Skip a test, and say why, where one of these folders of `SHARED` is not there."""
    missing = [name for name in folders if not (SHARED / name).is_dir()]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)} in ../shared/data")
