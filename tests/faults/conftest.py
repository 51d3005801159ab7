"""A finished run, and no pictures."""

import shutil

import pytest

from tests.faults.runs import train


@pytest.fixture(autouse=True, scope="module")
def _no_pictures(no_pictures): ...


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
