"""Download what a machine without a network needs to install megamed: `make wheelhouse`.

The list is constraints.txt, taken without resolving anything, so that what is installed there is what
was tested here. torch is left out unless asked for, because such machines come with their own build.
"""

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

from megamed.utils import UserError
from megamed.utils.optional import optional_import

ROOT = Path(__file__).resolve().parents[1]
# These have no wheels on the index. pip runs their setup.py to download them, and that wants torch, for
# Transformer Engine a CUDA build of it.
SOURCE_ONLY = ("flash-attn", "transformer-engine-torch")
# What setup.py of these needs on the machine where they are built.
BUILD_TOOLS = ("setuptools", "packaging", "wheel", "ninja", "psutil")
# The newest C library that a wheel may ask for: glibc 2.34, that of Rocky Linux 9. Ubuntu 22.04's is newer.
NEWEST_GLIBC = 34


def select(constraints: str, python_version: str, machine: str, extras: list[str],
           with_torch: bool) -> list[str]:
    """The pins of constraints.txt that are wanted on the machine, as `name==version`.

    Args:
        constraints: the text of constraints.txt, with its parts named in comments (`# [gpu]`).
        python_version: of the machine ("3.11").
        machine: its architecture, as `uname -m` says ("x86_64").
        extras: parts that are only wanted on request ("gpu").
        with_torch: whether the part `torch` is wanted.
    """
    environment = {"python_version": python_version, "python_full_version": f"{python_version}.0",
                   "platform_machine": machine, "sys_platform": "linux", "platform_system": "Linux"}
    wanted = {"direct", "dev", "transitive", *extras} | ({"torch"} if with_torch else set())
    part, pins = "", []
    for line in constraints.splitlines():
        if line.startswith("# ["):
            part = line[3:].rstrip("]")
        elif line and not line.startswith("#") and part in wanted:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate(environment):
                pins.append(f"{requirement.name}{requirement.specifier}")
    return pins


def platform_tags(machine: str) -> list[str]:
    """The tags of wheels that run on a Linux machine, newest first, for `pip download --platform`."""
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(NEWEST_GLIBC, 16, -1)]
    return [*tags, f"manylinux2014_{machine}", f"linux_{machine}"]


def download(pins: list[str], folder: Path, python_version: str, machine: str) -> None:
    """Fetch the pins, each by itself, for the machine's Python; torch alone with what it depends on."""
    sources = [pin for pin in pins if pin.partition("==")[0] in SOURCE_ONLY]
    module = optional_import("torch") if sources else None
    if sources and (module is None or module.version.cuda is None):
        raise UserError("transformer-engine-torch can only be downloaded where .venv has a CUDA build of "
                        "torch (no GPU is needed); run this where `make install` fetches one, "
                        "or without EXTRAS=gpu")
    target = ["--python-version", python_version]
    for tag in platform_tags(machine):
        target += ["--platform", tag]
    torch = [pin for pin in pins if pin.startswith("torch==")]
    _pip(folder, "--no-deps", *target, *[pin for pin in pins if pin not in sources + torch])
    if torch:
        _pip(folder, "--only-binary=:all:", "-c", str(folder / "constraints.txt"), *target, *torch)
    if sources:
        _pip(folder, "--no-deps", "--no-build-isolation", *sources)


def install_commands(folder: Path, python_version: str, extras: list[str], with_torch: bool) -> list[str]:
    """What to type on the machine, in the checkout, with the wheelhouse beside it."""
    pip = f".venv/bin/pip install --no-index --find-links {folder} -c {folder}/constraints.txt"
    site = "" if with_torch else "--system-site-packages "
    tools = BUILD_TOOLS if extras else BUILD_TOOLS[:2]
    return [f"python{python_version} -m venv {site}.venv",
            f"{pip} {' '.join(tools)}",
            f"{pip} --no-build-isolation -e '.[{','.join(['dev', *extras])}]'"]


def _pip(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--dest", str(folder), *arguments]
    # flash-attn would otherwise look for a compiler only to say what it is called.
    done = subprocess.run(command, env={**os.environ, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}, check=False)
    if done.returncode:
        raise UserError(f"pip could not download everything (exit code {done.returncode}); see above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dest", type=Path, default=Path("wheelhouse"))
    parser.add_argument("--python-version", default=f"3.{sys.version_info.minor}", choices=["3.11", "3.12"])
    parser.add_argument("--machine", default=platform.machine(), help="architecture, as uname -m says there")
    parser.add_argument("--extras", nargs="*", default=[], choices=["gpu"])
    parser.add_argument("--with-torch", action="store_true", help="also torch and what it needs")
    options = parser.parse_args()
    pins = select((ROOT / "constraints.txt").read_text(), options.python_version, options.machine,
                  options.extras, options.with_torch)
    options.dest.mkdir(parents=True, exist_ok=True)
    (options.dest / "constraints.txt").write_text("\n".join(pins) + "\n")
    download(pins, options.dest, options.python_version, options.machine)
    commands = install_commands(options.dest, options.python_version, options.extras, options.with_torch)
    print(f"\n{options.dest} is ready. Copy it into the checkout on the machine, and there type:\n")
    print("\n".join(f"    {command}" for command in commands))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"wheelhouse: {error}", file=sys.stderr)
        sys.exit(2)
