"""Optional packages, and the two projects named apex."""

import logging
import subprocess
import sys

import pytest

from megamed.utils import UserError
from megamed.utils.optional import apex_notice, find_apex, hide_unrelated_apex, optional_import, require

# Ends whatever imports it with an error that is no ImportError.
TRAP = "raise RuntimeError('the code of this package was run')\n"


def package(folder, name, files):
    for file, text in files.items():
        (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / file).write_text(text)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        del sys.modules[name]


def test_optional_import_gives_the_module_or_none(caplog):
    with caplog.at_level(logging.WARNING):
        assert optional_import("json.decoder") is sys.modules["json.decoder"]
        assert optional_import("no_such_package") is None
        assert optional_import("json.no_such_module") is None
    assert caplog.text == ""


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_a_package_that_does_not_load_is_reported(folder, caplog, error):
    package(folder, f"broken_by_{error}", {"__init__.py": f"raise {error}('undefined symbol: x')"})
    assert optional_import(f"broken_by_{error}") is None
    assert "is installed but does not import (undefined symbol: x)" in caplog.text


def test_a_package_whose_own_dependency_is_missing_is_reported(folder, caplog):
    package(folder, "needs_more", {"__init__.py": "import no_such_package"})
    assert optional_import("needs_more") is None
    assert "No module named 'no_such_package'" in caplog.text


def test_require_says_what_to_install(folder):
    assert require("json", "Reading", "pip install json") is sys.modules["json"]
    with pytest.raises(UserError, match="^Ring attention needs no_such_package, which is not installed; "
                                        "install it with: pip install some-thing$"):
        require("no_such_package", "Ring attention", "pip install some-thing")
    package(folder, "broken_extension", {"__init__.py": "raise ImportError('undefined symbol: y')"})
    with pytest.raises(UserError, match=r"but does not import \(undefined symbol: y\); mend it with: pip"):
        require("broken_extension", "Ring attention", "pip install some-thing")


def test_nvidias_apex_is_known_by_what_it_provides(folder):
    package(folder, "apex", {"__init__.py": TRAP, "multi_tensor_apply/__init__.py": TRAP})
    assert find_apex() == "nvidia"
    assert apex_notice() is None
    hide_unrelated_apex()
    with pytest.raises(RuntimeError, match="was run"):
        __import__("apex")


def test_another_apex_is_named_and_hidden_without_running_it(folder):
    package(folder, "apex", {"__init__.py": TRAP, "forms.py": TRAP})
    assert find_apex() == "unrelated"
    notice = apex_notice()
    assert notice is not None and str(folder / "apex") in notice and "pip uninstall apex" in notice
    hide_unrelated_apex()
    for name in ("apex", "apex.forms", "apex.optimizers"):
        with pytest.raises(ImportError):
            __import__(name)
    # What is hidden can still be told of.
    assert find_apex() == "unrelated"
    assert apex_notice() == notice


def test_an_apex_that_was_imported_already_is_hidden(folder):
    package(folder, "apex", {"__init__.py": "", "forms.py": ""})
    __import__("apex.forms")
    hide_unrelated_apex()
    with pytest.raises(ImportError):
        __import__("apex.forms")


def test_a_mere_directory_named_apex_is_hidden(folder):
    (folder / "apex").mkdir()
    assert find_apex() == "unrelated"
    hide_unrelated_apex()
    with pytest.raises(ImportError):
        __import__("apex")


@pytest.mark.parametrize(("hide", "taken_for_nvidias"), [(False, True), (True, False)])
def test_megatron_takes_any_apex_for_nvidias_unless_it_is_hidden(tmp_path, hide, taken_for_nvidias):
    package(tmp_path, "apex", {"__init__.py": "", "forms.py": ""})
    script = f"""
import sys, warnings
sys.path.insert(0, {str(tmp_path)!r})
warnings.simplefilter("ignore")
from megamed.utils.optional import hide_unrelated_apex
if {hide}:
    hide_unrelated_apex()
from megatron.core.models import backends
print(backends.HAVE_APEX, backends.LNImpl.__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    expected = "True FusedLayerNorm" if taken_for_nvidias else "False WrappedTorchNorm"
    assert done.stdout.strip() == expected
