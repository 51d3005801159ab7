"""The ways to split a model over ranks, by the names of --shard."""

from mlx_transformer.nn.model import Model
from mlx_transformer.train.parallel import Ranks
from mlx_transformer.train.pipeline import PipelineSplit, check_pipeline, check_pipeline_recipe
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.train.sharding import OPTIMIZER, check_shards
from mlx_transformer.train.split import Split
from mlx_transformer.train.tensor import TensorSplit, check_clip, check_tensor
from mlx_transformer.utils.errors import BadInput

TENSOR, PIPELINE = "tensor", "pipeline"
PARTS = (TENSOR, PIPELINE)
KNOWN = ("none", OPTIMIZER, *PARTS)  # what --shard may be


def count_shares(shard: str | None, ranks: Ranks) -> int:
    """Return how many shares a batch is divided into."""
    return 1 if shard in PARTS else ranks.size


def check_parts(model: Model, recipe: Recipe, shard: str | None, ranks: Ranks) -> None:
    """Raise BadInput for a model or a recipe that these ranks cannot train in parts."""
    if ranks.size > 1 and shard == TENSOR:
        check_tensor(model, ranks.size)
        check_clip(recipe)
    elif ranks.size > 1 and shard == PIPELINE:
        check_pipeline(model, ranks.size)
        check_pipeline_recipe(model, recipe, ranks)
    elif ranks.size > 1 and shard == OPTIMIZER:
        check_shards(model, recipe, ranks.size)


def split_model(model: Model, shard: str | None, ranks: Ranks) -> Split | None:
    """Leave a rank its part of a model, as --shard says; None: it keeps all. Raises BadInput as the part's class."""
    if ranks.size == 1 or shard not in PARTS:
        return None
    return TensorSplit(model, ranks) if shard == TENSOR else PipelineSplit(model, ranks)


def divide_model(model: Model, shard: str | None, ranks: Ranks) -> tuple[Split | None, Ranks]:
    """Return the same, and the ranks as they share batches. Raises BadInput where what all ranks have differs."""
    if shard not in (None, *KNOWN):
        raise BadInput(f"shard = {shard!r}: expected one of {', '.join(KNOWN)}")
    split = split_model(model, shard, ranks)
    if split is None:
        return None, ranks
    split.check_alike()
    return split, split.ranks
