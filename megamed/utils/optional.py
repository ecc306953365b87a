"""Optional packages: imported where present, and where absent a sentence that says what to install."""

import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Literal

from megamed.utils.errors import UserError

logger = logging.getLogger(__name__)


def optional_import(name: str) -> ModuleType | None:
    """The module of that name, or None where it is not installed.

    A package that is there but does not load (a CUDA extension built for another torch, say) also
    gives None, and a warning with the reason, because to go on in silence would hide the fault.
    """
    module, fault = _try_import(name)
    if fault:
        logger.warning("%s is installed but does not import (%s); going on without it", name, fault)
    return module


def require(name: str, purpose: str, install: str) -> ModuleType:
    """The module of that name, which `purpose` cannot do without.

    Args:
        name: the module's dotted name.
        purpose: what needs it; the message begins with it ("Ring attention by flash-attn").
        install: how to get it ("pip install --no-build-isolation flash-attn").

    Raises:
        UserError: the package is missing, or it is there and does not import.
    """
    module, fault = _try_import(name)
    if module is not None:
        return module
    if fault:
        raise UserError(f"{purpose} needs {name}, which is installed but does not import ({fault}); "
                        f"mend it with: {install}")
    raise UserError(f"{purpose} needs {name}, which is not installed; install it with: {install}")


@contextlib.contextmanager
def hidden(name: str) -> Iterator[None]:
    """Within it, a package that is not imported yet is not there for whoever tries.

    Args:
        name: of the package.
    """
    hides = name not in sys.modules
    if hides:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hides:
            del sys.modules[name]


def find_apex() -> Literal["nvidia", "unrelated"] | None:
    """Which `apex` is installed, told by what it provides and without running any of its code.

    NVIDIA's Apex has the subpackage `multi_tensor_apply`. The package of that name on the Python
    package index is a web framework of someone else, and a mere directory called `apex` on the
    path is importable, too.
    """
    spec = _find_spec("apex")
    if spec is None:
        return None
    locations = list(spec.submodule_search_locations or [])
    if locations and _find_spec("apex.multi_tensor_apply", locations) is not None:
        return "nvidia"
    return "unrelated"


def apex_notice() -> str | None:
    """What to tell a user about an `apex` that is not NVIDIA's; None where there is nothing to tell."""
    if find_apex() != "unrelated":
        return None
    spec = _find_spec("apex")
    assert spec is not None
    where = spec.origin or ", ".join(spec.submodule_search_locations or [])
    return (f"The package apex at {where} is not NVIDIA's Apex but an unrelated project of the same name; "
            f"megamed hides it from Megatron-core. Remove it with: pip uninstall apex")


def hide_unrelated_apex() -> None:
    """Make `import apex` raise ImportError in this process where `apex` is not NVIDIA's.

    Megatron-core tries `import apex` and takes success for NVIDIA's: the layer norms it then picks
    fail when the model is built, and an error other than ImportError from the foreign package ends
    Megatron's own import. Call it before Megatron is first imported.
    """
    if find_apex() != "unrelated":
        return
    for name in [name for name in sys.modules if name.startswith("apex.")]:
        del sys.modules[name]
    # None is the import system's own mark for a module that must not be imported.
    sys.modules["apex"] = None  # type: ignore[assignment]


def _try_import(name: str) -> tuple[ModuleType | None, str | None]:
    """The module, or None and, where the package is there but fails to load, the reason."""
    try:
        return importlib.import_module(name), None
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return None, None
        return None, str(error)
    except (ImportError, OSError) as error:
        return None, str(error)


def _find_spec(name: str, path: list[str] | None = None) -> ModuleSpec | None:
    """What would be imported under that name, by the finders alone.

    `importlib.util.find_spec` imports the parent of a dotted name and answers from `sys.modules`;
    this does neither.
    """
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec = find(name, path) if find is not None else None
        if spec is not None:
            return spec
    return None
