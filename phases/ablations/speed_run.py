"""Ideas of the speed run, as recipes and branches of phase 6: counted n-grams, and cheaper steps."""

from dataclasses import replace
from typing import Any

from mlx.nn import Module

from mlx_transformer import nn
from mlx_transformer.train import BySize, Recipe, optim
from phases.ablations import ngrams

HALF_DECAY = BySize(nano=126_000, small=315_000, base=1_260_000)
HALF_TOKENS = BySize(nano=180_000, small=450_000, base=1_800_000)
HALF_EVAL = BySize(nano=36_864, small=90_112, base=360_448)  # five evaluations, the last one at the end
SPRINT_RATE = BySize(nano=0.055, small=0.055, base=0.0275)
SPRINT_DECAY = BySize(nano=63_488, small=157_696, base=630_784)
SPRINT_TOKENS = BySize(nano=114_688, small=286_720, base=1_146_880)
SPRINT_EVAL = BySize(nano=22_938, small=57_344, base=229_376)


class QuarterDepth(nn.Model):
    """A model with a quarter of the blocks, rounded up, and half of the width in their feed-forward parts."""

    @classmethod
    def n_blocks(cls, config: nn.Config) -> int:
        return -(-config.n_layers // 4)

    def make_ffn(self, i: int) -> Module:
        config: Any = self.config
        return self.FFN(replace(config, d_ff=config.d_ff // 2))


def recipes(recipe: Recipe) -> dict[str, Recipe]:
    """Return phase 6's recipe with schedules as short as counted n-grams allow."""
    # For `ngram_expert`, whose gain is largest early.
    half = optim.WSD(warmup_tokens=0, decay_tokens=HALF_DECAY, total_tokens=HALF_TOKENS)
    # For `sprint`: a higher learning rate, held for longer.
    sprint = optim.WSD(warmup_tokens=0, decay_tokens=SPRINT_DECAY, total_tokens=SPRINT_TOKENS)
    return {
        "half": replace(recipe, schedule=half, eval_tokens=HALF_EVAL),
        "sprint": replace(recipe, learning_rate=SPRINT_RATE, schedule=sprint, eval_tokens=SPRINT_EVAL),
    }


def branches(model: type[nn.Model]) -> dict[str, type[nn.Model]]:
    """Return each idea on phase 6's model, and `sprint`, which has the last three."""
    return {
        # modded-nanogpt, 2024; Engram, arXiv 2601.07372
        "ngram_tables": nn.leaf(model, ngrams.Tables, ngrams.TablesConfig),
        "ngram_expert": nn.leaf(model, ngrams.Expert, ngrams.ExpertConfig),
        # Kuhn & De Mori 1990; Jelinek et al. 1991
        "ngram_cache": nn.leaf(model, ngrams.CachedExpert, ngrams.ExpertConfig),
        # Bengio & Senecal 2008; Jean et al. 2015, arXiv 1412.2007
        "sampled_softmax": nn.leaf(model, nn.SampledSoftmax, nn.SampledSoftmaxConfig),
        # RWKV: Peng et al. 2023, arXiv 2305.13048; modded-nanogpt
        "token_shift": nn.leaf(model, nn.TokenShift, nn.TokenShiftConfig),
        # the last three together, in a quarter of the blocks
        "sprint": nn.leaf(
            model,
            *(QuarterDepth, nn.TokenShift, nn.SampledSoftmax, ngrams.CachedExpert),
            *(nn.TokenShiftConfig, nn.SampledSoftmaxConfig, ngrams.ExpertConfig),
        ),
    }
