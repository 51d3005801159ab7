"""Phase 2, 2016-2019: phase 1's model, trained better. Nothing changes but the recipe.

Changes against phase 1, and what each is for:
- Smaller batches: below the critical batch size, more and noisier steps learn more from the same tokens (McCandlish
  et al. 2018, arXiv 1812.06162).
- A strong, decoupled weight decay of the matrices between embedding and head (Loshchilov & Hutter 2019, arXiv
  1711.05101).
- A linear schedule that ends at 0, so that the last steps average out the noise of small batches.
- No dropout: a run sees no text often enough to memorize it.

The ablations add one of them to phase 1, remove one from phase 2, or add another idea of those years to either.
"""

from dataclasses import replace

import mlx_transformer as mt
from mlx_transformer.train import BySize, ByWidth, Recipe, optim
from phases import phase1
from phases.ablations import phase2 as ablations

NAME = "training_improvements"

# fmt: off
BATCH_TOKENS  = BySize(nano=    1_024, small=    2_048, base=     8_192)
WARMUP_TOKENS = BySize(nano=   50_000, small=  250_000, base= 1_000_000)  # as many steps as in phase 1
TOTAL_TOKENS  = BySize(nano=1_200_000, small=3_000_000, base=12_000_000)  # the learning rate reaches 0
# fmt: on
LEARNING_RATE = ByWidth(0.00673, power=-1)  # the peak
EMBEDDING, HEAD_RATE = ByWidth(1.32, power=1), 12.0  # multiples of it

Config = phase1.Config


class Model(phase1.Model):
    """The Transformer decoder of 2017, unchanged."""


RECIPE = replace(
    phase1.RECIPE,
    batch_tokens=BATCH_TOKENS,
    learning_rate=LEARNING_RATE,
    schedule=optim.Linear(warmup_tokens=WARMUP_TOKENS, total_tokens=TOTAL_TOKENS),
    groups=(
        optim.Group(name="matrices", select=phase1.INNER, optimizer=replace(phase1.ADAM, weight_decay=0.5)),
        optim.Group(name="embedding", select=phase1.TABLES, optimizer=phase1.DECAYED, lr_multiplier=EMBEDDING),
        optim.Group(name="head", select=phase1.HEAD, optimizer=phase1.DECAYED, lr_multiplier=HEAD_RATE, optional=True),
        optim.Group(name="vectors", select=optim.Vectors(), optimizer=phase1.ADAM, lr_multiplier=3.0),
    ),
    dropout=0.0,
)
RECIPES: dict[str, Recipe] = ablations.recipes(RECIPE, phase1.RECIPE)
BRANCHES: dict[str, type[Model]] = {}

mt.main(__name__)
