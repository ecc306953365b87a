"""What is downloaded for a machine without a network."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from megamed.utils import UserError
from tools import wheelhouse

CONSTRAINTS = (Path(__file__).parents[2] / "constraints.txt").read_text()


def select(python_version="3.11", extras=(), with_torch=False):
    return wheelhouse.select(CONSTRAINTS, python_version, "x86_64", list(extras), with_torch)


@pytest.mark.parametrize(("python_version", "megatron"), [("3.11", "0.16.1"), ("3.12", "0.19.2")])
def test_pins_are_those_of_the_machines_python(python_version, megatron):
    pins = select(python_version)
    assert f"megatron-core=={megatron}" in pins
    assert any(pin.startswith("importlib-resources==") for pin in pins) == (python_version == "3.11")
    names = [pin.partition("==")[0] for pin in pins]
    assert len(names) == len(set(names))
    assert all(";" not in pin and "==" in pin for pin in pins)


def test_torch_and_what_needs_a_gpu_come_on_request_only():
    plain, gpu = select(), select(extras=["gpu"])
    assert not any(pin.startswith(("torch==", "flash-attn==", "transformer-engine")) for pin in plain)
    assert "nvidia-dali-cuda130==2.4.0" in plain  # it makes frames on a CPU, too
    assert set(plain) < set(gpu)
    assert {"flash-attn", "ring-flash-attn", "transformer-engine", "transformer-engine-torch"} <= {
        pin.partition("==")[0] for pin in gpu
    }
    assert set(select(with_torch=True)) - set(plain) == {"torch==2.13.0"}


def test_what_pip_is_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(wheelhouse, "_pip", lambda folder, *arguments: asked.append(arguments))
    wheelhouse.download(["numpy==1", "torch==2"], tmp_path, "3.12", "aarch64")
    plain, torch = asked
    assert "--no-deps" in plain and plain[-1] == "numpy==1" and "torch==2" not in plain
    # torch is the one whose dependencies pip shall find: the CUDA libraries are not in constraints.txt.
    assert "--no-deps" not in torch and torch[-1] == "torch==2"
    for arguments in asked:
        assert arguments[arguments.index("--python-version") + 1] == "3.12"
        assert "manylinux_2_28_aarch64" in arguments and "manylinux2014_aarch64" in arguments


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_packages_without_wheels_need_a_cuda_build_of_torch(tmp_path, monkeypatch, cuda):
    asked = []
    monkeypatch.setattr(wheelhouse, "_pip", lambda folder, *arguments: asked.append(arguments))
    monkeypatch.setattr(wheelhouse, "optional_import",
                        lambda name: SimpleNamespace(version=SimpleNamespace(cuda=cuda)))
    pins = ["numpy==1", "flash-attn==2", "transformer-engine-torch==3"]
    if cuda is None:
        with pytest.raises(UserError, match="a CUDA build of torch"):
            wheelhouse.download(pins, tmp_path, "3.11", "x86_64")
        assert asked == []
    else:
        wheelhouse.download(pins, tmp_path, "3.11", "x86_64")
        assert asked[0][-1] == "numpy==1" and not set(pins[1:]) & set(asked[0])
        assert asked[1] == ("--no-deps", "--no-build-isolation", *pins[1:])


def test_commands_for_the_machine():
    venv, tools, megamed = wheelhouse.install_commands(Path("wheelhouse"), "3.12", ["gpu"], False)
    assert venv == "python3.12 -m venv --system-site-packages .venv"
    assert "--no-index --find-links wheelhouse -c wheelhouse/constraints.txt" in tools and "ninja" in tools
    assert megamed.endswith("--no-build-isolation -e '.[dev,gpu]'")
    assert wheelhouse.install_commands(Path("w"), "3.11", [], True)[0] == "python3.11 -m venv .venv"
