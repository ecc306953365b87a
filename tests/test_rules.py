"""The project's own rules, held by tests: sizes, layers, requirements."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("megamed", "launch", "tools", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_LAUNCH_LINES = 99
# What may be longer, and why: "path" for a file, "path::function" for a function.
LONGER: dict[str, str] = {}

# Packages import strictly downward; those of one level never import each other.
LEVELS = {
    "utils": 0, "config": 0,
    "runtime": 1, "ops": 1, "data": 1,
    "models": 2,
    "parallel": 3, "checkpoint": 3, "adapters": 3, "optim": 3,
    "generate": 4,
    "train": 5, "eval": 5, "export": 5,
    "preflight": 6, "serve": 6, "dashboard": 6,
}
# Imports within one level, and why.
SAME_LEVEL = {("config", "utils"): "the loader raises UserError, which lives in utils"}

# Functions whose first argument names a module to import.
IMPORTERS = ("import_module", "__import__", "optional_import", "require")
# Both names of the module in which Megatron keeps its process groups.
PARALLEL_STATE = ("megatron.core.parallel_state", "megatron.core.mpu")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.Module, package: list[str]) -> Iterator[str]:
    """Dotted names that a file imports, wherever it does: in functions, under TYPE_CHECKING, by a call.

    `from a import b` gives both `a` and `a.b`, since b may be a module. `a.b.c` used as an attribute of
    an imported `a` counts as an import, too.
    """
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
                root = alias.name.partition(".")[0]
                bound[alias.asname or root] = alias.name if alias.asname else root
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield origin
            for alias in node.names:
                yield f"{origin}.{alias.name}"
                bound[alias.asname or alias.name] = f"{origin}.{alias.name}"
        elif isinstance(node, ast.Call) and called(node) in IMPORTERS and node.args:
            if isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield node.args[0].value
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            root, _, rest = dotted.partition(".")
            if root in bound and re.fullmatch(r"[\w.]+", rest):
                yield f"{bound[root]}.{rest}"


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def within(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def breaches(path: str, source: str) -> list[str]:
    """What a file imports that it must not, as sentences."""
    parts = Path(path).parts
    own = parts[1] if parts[0] == "megamed" and len(parts) > 2 else None
    names = set(imports(ast.parse(source), list(parts[:-1])))
    found = []
    for name in sorted(names):
        other = name.split(".")[1] if name.startswith("megamed.") else None
        if other == "testing" and parts[0] != "tests" and own != "testing":
            found.append(f"{path} imports {name}: only tests use megamed.testing")
        elif parts[0] == "megamed" and own is None and other is not None and other != "__version__":
            found.append(f"{path} imports {name}: the top package imports nothing of megamed")
        elif own in LEVELS and other in LEVELS and other != own and (own, other) not in SAME_LEVEL:
            if LEVELS[other] >= LEVELS[own]:
                found.append(f"{path} imports {name}: {own} (level {LEVELS[own]}) is not above {other} "
                             f"(level {LEVELS[other]})")
        if within(name, *PARALLEL_STATE) and parts[:2] not in (("megamed", "runtime"), ("tests", "runtime")):
            found.append(f"{path} imports {name}: only megamed.runtime imports Megatron's parallel_state")
        if own == "data" and within(name, "megatron"):
            found.append(f"{path} imports {name}: megamed.data knows nothing of Megatron")
    return found


def function_sizes(source: str) -> Iterator[tuple[str, int]]:
    """Name and number of lines of each function, the inner ones too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def test_files_and_functions_are_short():
    long = []
    for path in FILES:
        text = path.read_text()
        num_lines = len(text.splitlines())
        limit = MAX_LAUNCH_LINES if path.is_relative_to(ROOT / "launch") else MAX_FILE_LINES
        if num_lines > limit and name_of(path) not in LONGER:
            long.append(f"{name_of(path)}: {num_lines} lines, {limit} are allowed")
        for function, num_lines in function_sizes(text):
            name = f"{name_of(path)}::{function}"
            if num_lines > MAX_FUNCTION_LINES and name not in LONGER:
                long.append(f"{name}: {num_lines} lines, {MAX_FUNCTION_LINES} are allowed")
    assert long == []


def test_exceptions_from_the_size_rule_are_still_needed():
    for name in LONGER:
        file, _, function = name.partition("::")
        text = (ROOT / file).read_text()
        if function:
            sizes = [size for other, size in function_sizes(text) if other == function]
            assert max(sizes) > MAX_FUNCTION_LINES, name
        else:
            assert len(text.splitlines()) > MAX_FILE_LINES, name


def test_imports_go_strictly_downward():
    assert [breach for path in FILES for breach in breaches(name_of(path), path.read_text())] == []


def test_every_package_has_a_level():
    packages = {path.name for path in (ROOT / "megamed").iterdir() if any(path.rglob("*.py"))}
    assert packages - {"testing"} <= set(LEVELS)


@pytest.mark.parametrize(("path", "source"), [
    ("megamed/ops/x.py", "import megamed.models"),
    ("megamed/ops/x.py", "import megamed.models.vision as v"),
    ("megamed/ops/x.py", "from megamed import models"),
    ("megamed/ops/x.py", "from megamed.models.vlm import VLM"),
    ("megamed/ops/x.py", "from .. import models"),
    ("megamed/ops/x.py", "from ..models import vlm"),
    ("megamed/ops/x.py", "from megamed.data import nifti"),
    ("megamed/ops/x.py", "def f():\n    from megamed.train import loop"),
    ("megamed/ops/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import megamed.models"),
    ("megamed/ops/x.py", "import importlib\nimportlib.import_module('megamed.models')"),
    ("megamed/utils/x.py", "import megamed.config"),
    ("megamed/train/x.py", "import megamed.eval"),
    ("megamed/train/x.py", "import megamed.testing"),
    ("megamed/__init__.py", "import megamed.utils"),
    ("launch/x.py", "from megamed.testing import run_ranks"),
    ("tools/bench/x.py", "from megamed import testing"),
    ("megamed/models/x.py", "import megatron.core.parallel_state"),
    ("megamed/models/x.py", "from megatron.core import parallel_state as groups"),
    ("megamed/models/x.py", "from megatron.core.parallel_state import get_tensor_model_parallel_group"),
    ("megamed/models/x.py", "from megatron.core import mpu"),
    ("megamed/models/x.py", "import megatron.core\nmegatron.core.parallel_state.is_initialized()"),
    ("megamed/models/x.py", "from megatron import core\ncore.mpu.is_initialized()"),
    ("megamed/models/x.py", "__import__('megatron.core.parallel_state')"),
    ("tests/models/x.py", "from megatron.core import parallel_state"),
    ("megamed/data/x.py", "import megatron"),
    ("megamed/data/x.py", "def f():\n    from megatron.core.datasets import gpt_dataset"),
    ("megamed/data/x.py", "from megamed.utils import optional\noptional.require('megatron.core', '', '')"),
])
def test_the_layer_rule_sees(path, source):
    assert len(breaches(path, source)) >= 1


@pytest.mark.parametrize(("path", "source"), [
    ("megamed/ops/x.py", "from megamed.utils import UserError"),
    ("megamed/config/x.py", "from megamed.utils import UserError"),
    ("megamed/models/vlm/x.py", "from megamed.models.vision import VisionModel\nfrom ...ops import ring"),
    ("megamed/models/vlm/x.py", "from . import config\nfrom ..vision import model"),
    ("megamed/export/x.py", "import megamed\nprint(megamed.__version__)"),
    ("megamed/runtime/x.py", "from megatron.core import parallel_state"),
    ("megamed/runtime/x.py", "state.parallel_state = 1"),
    ("megamed/testing/x.py", "from megamed.testing.ranks import run"),
    ("tests/train/x.py", "from megamed.testing import run_ranks\nimport megamed.train\nimport megamed.eval"),
    ("launch/x.py", "import megamed.train\nimport megamed.eval\nimport megamed.data"),
    ("megamed/data/x.py", "import megatron_of_another_kind"),
])
def test_the_layer_rule_allows(path, source):
    assert breaches(path, source) == []


def test_every_requirement_is_pinned_for_both_pythons():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in pins)
    extras = [name for names in project["optional-dependencies"].values() for name in names]
    for python_version in ("3.11", "3.12"):
        versions = {pin.name: str(pin.specifier)[2:] for pin in pins
                    if pin.marker is None or pin.marker.evaluate({"python_version": python_version})}
        for requirement in map(Requirement, [*project["dependencies"], *extras]):
            assert requirement.specifier.contains(versions[requirement.name]), requirement


def test_nothing_without_a_cpu_build_is_required():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {Requirement(text).name for text in project["dependencies"]}
    optional = {Requirement(text).name for text in project["optional-dependencies"]["gpu"]}
    assert optional and not required & optional
    # The package of that name on the index is not NVIDIA's.
    for file in ("pyproject.toml", "constraints.txt"):
        assert "apex" not in (ROOT / file).read_text().lower(), file


def test_conf_files_are_yaml_with_keys():
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict | None), name_of(path)
