"""Gradient checkpointing: the same gradients in less memory."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from mlx_transformer.backend import divided_blas
from mlx_transformer.train.optim.clip import GlobalNorm
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.utils.errors import BadInput
from phases import phase4
from tests.ladder import kinds, tiny, tokens

KINDS = kinds()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_gradients_and_auxiliary_losses_are_unchanged(kind, compiled):
    def run(checkpoint):
        net = tiny(kind, n_layers=3)
        net.train()
        net.checkpoint = checkpoint

        def function(batch):
            return nn.value_and_grad(net, net.loss)(batch)

        if compiled:
            function = mx.compile(function, inputs=net.state, outputs=net.state)
        (loss, metrics), gradients = function(tokens(4, 18))
        mx.eval(loss, gradients, net.parameters())  # no tracer is left in the model
        return {"loss": loss, **metrics, **dict(tree_flatten(gradients))}

    plain, again = run("none"), run("block")
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_activations_within_a_block_are_not_kept():
    config = phase4.Config(vocab_size=64, d_model=64, n_layers=8, n_heads=2, d_ff=256, seq_len=64, dropout=0.0)
    recipe = replace(phase4.RECIPE.at("nano"), clip=GlobalNorm(max_norm=1.0))
    batch = mx.random.randint(0, 64, (64, 65), key=mx.random.key(0))
    peaks, losses = [], []
    for checkpoint in ("none", "block"):
        step = TrainingStep(phase4.Model(config), replace(recipe, checkpoint=checkpoint))
        mx.eval(step.state)
        mx.clear_cache()
        mx.reset_peak_memory()
        with divided_blas():
            metrics, _ = step(batch, 1e-3)
            mx.eval(metrics, step.state)
        peaks.append(mx.get_peak_memory())
        losses.append(metrics["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert peaks[1] < 0.5 * peaks[0]


def test_checkpointing_with_dropout_is_bad_input():
    recipe = phase4.RECIPES["checkpoint"].at("nano")
    with pytest.raises(BadInput, match=r"checkpoint = 'block' and dropout = 0.1"):
        TrainingStep(tiny(phase4.Model, dropout=0.1), recipe)
    with pytest.raises(BadInput, match="checkpoint = 'all': expected one of none, block"):
        replace(recipe, checkpoint="all").check()
