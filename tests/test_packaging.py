"""pyproject.toml: MLX's backends exclude each other, on every platform and with every extra."""

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mlx_transformer.backend import runtime

tomllib = pytest.importorskip("tomllib", reason="tomllib is part of Python since 3.11")
PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
BACKENDS = {"cpu", "cuda", "cuda12", "cuda13"}  # extras of mlx, each of which installs the same files on Linux


def backends(platform, *extras):
    """MLX's backends that `pip install mlx-transformer[EXTRAS]` installs."""
    chosen = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    found = set()
    for requirement in map(Requirement, chosen):
        if requirement.name == "mlx" and (not requirement.marker or requirement.marker.evaluate(platform)):
            found |= requirement.extras & BACKENDS
    return found


def test_pytorch_is_new_enough_for_apple_gpus():
    """enable_gqa crashes on MPS up to 2.6; inductor's RMSNorm fails there in 2.7."""
    (torch,) = [requirement for requirement in map(Requirement, EXTRAS["bench"]) if requirement.name == "torch"]
    assert "2.8" not in torch.specifier
    assert "2.13" in torch.specifier


LINUX = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
MACOS = {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"}


def test_linux_gets_the_backend_that_is_asked_for_and_no_other():
    assert backends(LINUX) == set()
    assert backends(LINUX, "cpu") == {"cpu"}
    assert backends(LINUX, "cuda") == {"cuda"}
    others = [extra for extra in EXTRAS if extra not in ("cpu", "cuda")]
    assert backends(LINUX, *others) == set()


def test_macos_gets_metal_whatever_is_asked_for():
    assert any(Requirement(line).name == "mlx" for line in PROJECT["dependencies"] if ";" not in line)
    assert backends(MACOS, *EXTRAS) == set()


@pytest.mark.parametrize(("installed", "word"), [(("mlx-cpu", "mlx-cuda-12"), "same files"), (("mlx-cpu",), None)])
def test_two_backends_are_warned_of(monkeypatch, installed, word):
    monkeypatch.setattr(runtime, "_installed_backends", lambda: list(installed))
    prepared = runtime.Prepared()
    if word:
        with pytest.warns(RuntimeWarning, match=word):
            runtime._check_backend(prepared)
    else:
        runtime._check_backend(prepared)
        assert not prepared.warned


def test_without_a_backend_one_sentence_names_the_command(monkeypatch, tmp_path):
    (tmp_path / "mlx").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "_installed_backends", list)
        runtime._check_backend(runtime.Prepared())  # MLX built from source has no such wheel, but the library
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mlx")
    with pytest.raises(ImportError, match=r"pip install 'mlx\[cpu\]'"):
        runtime._check_backend(runtime.Prepared())
