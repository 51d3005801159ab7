"""The branches of phase 1: the encoder-decoder of the paper, with the recipe of its own name that trains it."""

from dataclasses import replace
from typing import Any

from mlx_transformer import nn
from mlx_transformer.train import BySize, Recipe, optim

# fmt: off
BATCH_TOKENS   = BySize(nano=  2_048, small=  4_096, base=   16_384)
LEARNING_RATE  = BySize(nano=   4e-3, small=     2e-3, base=     1e-3)  # the peak
WARMUP_TOKENS  = BySize(nano=300_000, small=1_000_000, base=4_000_000)
AVERAGE_EVERY  = BySize(nano=100_000, small=  200_000, base=  800_000)  # between two of the averaged snapshots
EVAL_TOKENS    = BySize(nano=500_000, small=  500_000, base=1_000_000)  # between two evaluations
DROPOUT        = BySize(nano=    0.0, small=      0.1, base=      0.1)  # the paper's 0.1 is more than nano can use
# fmt: on


def branches(model: Any) -> dict[str, Any]:
    """Return the encoder-decoder with the paper's shared embeddings (sec. 3.4), and with separate ones."""

    class Translator(nn.Translator, model):
        """The Transformer of 2017: one matrix for both embeddings and the head."""

        Head: nn.Slot = nn.TiedHead

    class SeparateTranslator(Translator):
        """An embedding for the source, one for the target, and a head."""

        Head: nn.Slot = nn.Head
        Encoder: nn.Slot = nn.SeparateEncoder

    return {"translator": Translator, "translator_separate": SeparateTranslator}


def recipes(recipe: Recipe) -> dict[str, Recipe]:
    """Return the recipes by branch.

    Warm-up and inverse square root (sec. 5.3), label smoothing 0.1 (sec. 5.4), the mean of the last 5 snapshots of the
    weights (sec. 6.1).
    """
    translator = replace(
        recipe.with_rates(LEARNING_RATE, embedding=1.0, head=1.0),
        batch_tokens=BATCH_TOKENS,
        schedule=optim.InverseSqrt(warmup_tokens=WARMUP_TOKENS),
        label_smoothing=0.1,
        average=optim.CheckpointAverage(last=5, every_tokens=AVERAGE_EVERY),
        stop=optim.NoStop(),
        eval_tokens=EVAL_TOKENS,
        dropout=DROPOUT,
    )
    return {"translator": translator, "translator_separate": translator}
