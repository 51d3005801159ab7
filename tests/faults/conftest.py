"""Fixtures of a small text and a finished run; no pictures: each takes half a second, and tests/run draws them."""

import shutil

import pytest

from mlx_transformer.run import training
from tests.faults.runs import TINY, train, write_text


@pytest.fixture(autouse=True, scope="module")
def _no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "draw_loss", lambda path, *_: path.touch())
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def tiny(text):
    return [*TINY, "--data", text, "--max-steps", 3]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A finished run; tests must not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train(*tiny, "--max-steps", 12, "--eval-every", 5, "--quiet", "--out", folder).code == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to be changed."""
    return shutil.copytree(finished, tmp_path / "copy")
