"""Fixtures of the comparison's tests: a text, comparisons as a command line plans them, and tiny runs."""

import pytest

from bench.compare import command
from bench.compare.command import Flags
from bench.compare.runs import Run
from bench.compare.variants import Variant
from mlx_transformer.run.flags import parse
from mlx_transformer.run.settings import Settings
from tests.bench.compare.tiny import BUDGET, TINY
from tests.faults.runs import merged


@pytest.fixture
def planned(text):
    """A comparison as a command line asks for it."""

    def make(*line):
        shared = ("--data", text, "--size", "nano", "--max-tokens", BUDGET, "--reference", "none")
        return command.read(parse(Flags, "compare", args=merged((*shared, *line))), lambda said: None)

    return make


@pytest.fixture
def tiny(text):
    def make(**settings):
        flags = Settings(size="nano", data=str(text), max_tokens=2000, eval_every=10, seed=0, **TINY, **settings)
        return Run.of(Variant(phase=1), flags)

    return make


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where a run that several tests need is found again."""
    return tmp_path_factory.mktemp("cache")
