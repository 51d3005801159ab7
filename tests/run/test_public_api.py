"""`import mlx_transformer as mt`: what the package exports, and what importing it costs."""

import subprocess
import sys

import pytest

import mlx_transformer as mt
import mlx_transformer.evaluate
import mlx_transformer.generate
from mlx_transformer.run.saved import load
from mlx_transformer.train import optim
from mlx_transformer.utils.errors import BadInput, Interrupted, RunFailed, exit_cleanly
from phases import phase1


def test_every_name_is_there():
    assert {name: getattr(mt, name) for name in mt.__all__}.keys() == set(mt.__all__)
    assert issubclass(phase1.Model, mt.Model)
    assert issubclass(phase1.Config, mt.Config)
    assert isinstance(phase1.RECIPE, mt.Recipe)
    assert (mt.optim, mt.load) == (optim, load)
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = mt.nothing_of_this_name


def test_generate_and_evaluate_stay_functions_beside_modules_of_their_names():
    assert [mt.generate.__name__, mt.evaluate.__name__] == ["generate", "evaluate"]


def test_importing_the_package_imports_neither_mlx_nor_a_subpackage_that_needs_it():
    code = "import sys, mlx_transformer as mt; assert 'mlx.core' not in sys.modules; mt.main('not the program'); "
    code += "assert not [name for name in sys.modules if name.startswith(('mlx_transformer.run', 'numpy', 'rich'))]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


class Worse(BadInput):
    """A subclass has its parent's exit code."""


@pytest.mark.parametrize(("error", "code"), [(Worse, 2), (RunFailed, 1), (Interrupted, 130)])
def test_exit_codes(error, code, capsys):
    def fail():
        raise error("one\nsentence")

    with pytest.raises(SystemExit) as end:
        exit_cleanly(fail)
    assert (end.value.code, capsys.readouterr().err.removeprefix("error: ")) == (code, "one sentence\n")
