"""The fast operations compute what the plain ones do: the same training run in processes with and without them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

# Phase 1 without dropout over 200 steps; the argument is the relative perturbation of the initial weights.
TRAIN = """
import json, sys
from dataclasses import replace
import mlx_transformer
import mlx.core as mx, numpy as np
from mlx_transformer.train.step import TrainingStep
from mlx.utils import tree_map
from phases import phase1

random = np.random.default_rng(0)
config = phase1.Config(vocab_size=256, d_model=32, n_layers=2, n_heads=2, d_ff=64, seq_len=32, dropout=0.0)
model, shake = phase1.Model(config).train(), float(sys.argv[1])
signs = lambda w: mx.array(random.choice([-1.0, 1.0], w.shape), mx.float32)
model.update(tree_map(lambda w: w * (1 + shake * signs(w)), model.parameters()))
step = TrainingStep(model, replace(phase1.RECIPE.at("nano"), batch_tokens=128))
text = np.cumsum(np.random.default_rng(1).integers(0, 4, 200 * 4 * 33)) % 256
losses = []
for batch in text.astype(np.int32).reshape(200, 4, 33):
    metrics, _ = step(mx.array(batch), 1e-3)
    losses.append(metrics["loss"].item())
print(json.dumps(losses))
"""


def losses(plain, shake=0.0):
    environment = os.environ | {"MLX_TRANSFORMER_PLAIN": str(int(plain))}
    done = subprocess.run([sys.executable, "-c", TRAIN, str(shake)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def plain():
    return losses(plain=True)


@pytest.fixture(scope="module")
def fast():
    return losses(plain=False)


def test_the_first_steps_agree(plain, fast):
    assert plain[-1] < 0.8 * plain[0], "it learns"
    np.testing.assert_allclose(fast[:20], plain[:20], rtol=1e-4)


def test_later_they_differ_no_more_than_rounding_makes_them(plain, fast):
    shaken = losses(plain=True, shake=1e-7)
    assert np.abs(fast - plain).max() <= 3 * np.abs(shaken - plain).max()
