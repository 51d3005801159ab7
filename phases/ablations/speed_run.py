"""Counted n-grams, as branches of phase 6, and recipes as short as they allow."""

from dataclasses import replace

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
    """A model with a quarter of the blocks, rounded up."""

    @classmethod
    def n_blocks(cls, config: nn.Config) -> int:
        return -(-config.n_layers // 4)


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
    """Return each idea on phase 6's model, and `sprint`, the last one in a smaller model."""
    return {
        # modded-nanogpt, 2024; Engram, arXiv 2601.07372
        "ngram_tables": nn.leaf(model, ngrams.Tables, ngrams.TablesConfig),
        "ngram_expert": nn.leaf(model, ngrams.Expert, ngrams.ExpertConfig),
        # Kuhn & De Mori 1990; Jelinek et al. 1991
        "ngram_cache": nn.leaf(model, ngrams.CachedExpert, ngrams.ExpertConfig),
        # a quarter of the blocks: counts and caches do what the others have no time to learn
        "sprint": nn.leaf(model, QuarterDepth, ngrams.CachedExpert, ngrams.ExpertConfig),
    }
