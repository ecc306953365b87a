"""The project key, and what is made with it."""

import stat
import threading

import pytest

from megamed.data.privacy import Pseudonyms, load_or_create_key, private_folder
from megamed.utils import UserError

KEY = bytes(range(32))


def test_a_key_is_made_once_and_for_the_owner_alone(tmp_path):
    path = private_folder(tmp_path / "store") / "project.key"
    assert path == tmp_path / "store.private" / "project.key"
    keys = []
    threads = [threading.Thread(target=lambda: keys.append(load_or_create_key(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8 and len(set(keys)) == 1 and len(keys[0]) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]
    assert path.read_text() == keys[0].hex() + "\n"
    assert load_or_create_key(tmp_path / "another" / "key") != keys[0]


@pytest.mark.parametrize(("mode", "content", "says"), [
    (0o644, KEY.hex(), "chmod 600"),
    (0o660, KEY.hex(), "chmod 600"),
    (0o600, "", "64 hexadecimal digits"),
    (0o600, KEY.hex()[:-2], "64 hexadecimal digits"),
    (0o600, KEY.hex() + "00", "64 hexadecimal digits"),
    (0o600, "z" * 64, "64 hexadecimal digits"),
])
def test_a_key_file_that_cannot_be_trusted_is_refused_and_left_alone(tmp_path, mode, content, says):
    path = tmp_path / "project.key"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(UserError, match=says) as caught:
        load_or_create_key(path)
    assert str(path) in str(caught.value) and path.read_text() == content
    assert not content or content not in str(caught.value)


def test_a_key_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--key FILE"):
        load_or_create_key(tmp_path / "file" / "project.key")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="--key FILE"):
        load_or_create_key(tmp_path / "link")


def test_pseudonyms_hold_throughout_a_project_and_no_further():
    ours, theirs = Pseudonyms(KEY), Pseudonyms(KEY[::-1])
    assert ours.of("patient", "Müller^Jörg ") == ours.of("patient", "\0Müller^Jörg") != ""
    assert len({ours.of(kind, "1.2.3") for kind in ("patient", "study", "series")} | {theirs.of("study", "1.2.3")}) == 4
    assert ours.of("patient", " \0") == ""
    assert len(ours.of("patient", "\ud83d")) == 20
    assert ours.fingerprint() == Pseudonyms(KEY).fingerprint() != Pseudonyms(KEY, "shift").fingerprint()
    # RFC 4231 gives HMAC-SHA-256 of "Hi There" under twenty bytes 0x0b; here a kind stands in front.
    assert Pseudonyms(b"\x0b" * 20)._digest(b"Hi There").hex().startswith("b0344c61d8db38535ca8afceaf0bf12b")


def test_dates_are_dropped_or_shifted_alike_for_one_patient():
    shifted = Pseudonyms(KEY, "shift")
    days = [shifted.date("P1", date) for date in ("20240228", "20240301", "20240229 ")]
    first, last, leap = (int(day) for day in days)
    assert 20140101 < first < 20240228
    from datetime import datetime
    gap = datetime.strptime(str(last), "%Y%m%d") - datetime.strptime(str(first), "%Y%m%d")
    assert gap.days == 2 and first < leap < last
    assert len({shifted.date(f"P{i}", "20240228") for i in range(20)}) > 15
    for patient, date in (("P1", ""), ("P1", "2024022"), ("P1", "20240230"), ("P1", "00010101"), ("", "20240228")):
        assert shifted.date(patient, date) == ""
    assert Pseudonyms(KEY).date("P1", "20240228") == ""
    with pytest.raises(ValueError, match="drop or shift"):
        Pseudonyms(KEY, "keep")  # type: ignore[arg-type]
