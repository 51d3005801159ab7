"""Two models to play with, of one tokenizer: phase 1, and a file of one's own whose first layer has a state."""

import pytest

import mlx_transformer as mt
from phases import phase1
from tests.faults.runs import write_text

HYBRID = """
import mlx_transformer as mt
from mlx_transformer import nn
from phases import phase4


class Model(phase4.Model):
    Mixer = (nn.LinearAttention, nn.FusedAttention)


mt.main(__name__)
"""
NUMBERS = {"d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 32, "seq_len": 48, "dropout": 0.0}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return mt.data.load(write_text(tmp_path_factory.mktemp("served") / "text.txt"), vocab_size=384)


@pytest.fixture(scope="session")
def run(data, tmp_path_factory):
    """The folder of a model of phase 1 that was never trained: its distributions are wide."""
    folder = tmp_path_factory.mktemp("served") / "phase1"
    mt.save(folder, phase1.Model(phase1.Config(vocab_size=data.tokenizer.vocab_size, **NUMBERS)), data.tokenizer)
    return folder
