"""The memory of a training step: what does not fit the device is refused before it is started."""

import bisect
import math
import os
from collections.abc import Iterator, Sequence

import mlx.core as mx
from mlx import nn

from mlx_transformer import ops
from mlx_transformer.backend import device_info, divided_blas, streams
from mlx_transformer.nn.attention import Attention
from mlx_transformer.nn.block import Block
from mlx_transformer.nn.config import Config
from mlx_transformer.nn.mixers import RecurrentMixer
from mlx_transformer.nn.model import Model
from mlx_transformer.nn.moe import MixtureOfExperts
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.utils.errors import BadInput

LIMIT = "MLX_TRANSFORMER_MEMORY"
_OVERHEAD = 1.15  # of the process over MLX's arrays: 1.05 to 1.13 measured
_SAMPLE_TOKENS = 8192  # of the larger sampled step: beyond a chunk of logits, from where memory grows evenly
_SAMPLE_SHARE = 0.125  # of the device's memory, that a sampled step may take
_MOST_SEQUENCES = 2**40


def check_dimensions(config: Config, recipe: Recipe, flags: Sequence[str]) -> None:
    """Raise BadInput where the inputs of the blocks of a single sequence exceed the device: before a model is made.

    flags: the names of the settings that were given.
    """
    needed = 4 * config.seq_len * config.d_model * config.n_layers
    if 0 < memory_limit() < needed:
        _refuse(recipe, config, "at least", needed, 0, flags)


def memory_limit() -> int:
    """Return the bytes that a process may use: the device's memory, or less if MLX_TRANSFORMER_MEMORY says so in GiB.

    Raises BadInput for another value of the variable.
    """
    present, given = device_info().memory_bytes, os.environ.get(LIMIT)
    if given is None:
        return present
    try:
        limit = float(given)
    except ValueError:
        limit = 0.0
    if not 0 < limit < math.inf:
        raise BadInput(f"{LIMIT}={given}: expected a number of GiB above 0")
    return min(present, int(limit * 2**30)) if present > 0 else int(limit * 2**30)


def check_memory(model: Model, recipe: Recipe, seed: int, flags: Sequence[str], shards: int = 1) -> None:
    """Raise BadInput where a training step needs more memory than the device has.

    `step_bound` decides where it is clear. Where it is not, steps of a few sequences are measured on another model of
    the same kind, which leaves this one as it is. shards: ranks among which the optimizers' state is divided.
    """
    config, present = model.config, memory_limit()
    batch = max(1, recipe.batch_tokens // recipe.accumulate // config.seq_len)
    if present <= 0 or _OVERHEAD * step_bound(model, recipe, batch, shards) <= present:
        return
    room = int(present / _OVERHEAD)
    sizes = range(1, _MOST_SEQUENCES)
    fits = bisect.bisect_right(sizes, room, key=lambda size: step_bound(model, recipe, size, shards))
    least = _least(model, recipe, batch, shards)
    if least > present:
        _refuse(recipe, config, "at least", least, fits, flags)
    sample = min(batch, max(2, _SAMPLE_TOKENS // config.seq_len), int(_SAMPLE_SHARE * fits))
    if sample < 2:  # too large to be measured
        return
    fixed, each = _measure(type(model), config, recipe, seed, (sample // 2, sample))
    mx.clear_cache()
    fixed += 4 * _kept(model, recipe, shards)
    needed = _OVERHEAD * (fixed + batch * each)
    if needed > present:
        largest = int(0.9 * (present / _OVERHEAD - fixed) / each)  # two measurements differ a little
        _refuse(recipe, config, "about", needed, largest, flags)


def step_bound(model: Model, recipe: Recipe, batch: int, shards: int = 1) -> int:
    """Return an upper bound, mostly within a factor of two, of the bytes of a training step of so many sequences.

    shards: as in `check_memory`.
    """
    config, dtype = model.config, getattr(mx, recipe.dtype)
    length, keeps_scores, used = config.seq_len, ops.keeps_scores(dtype), min(len(streams()), batch)
    tokens = length * -(-batch // used)  # of a stream
    shared, kept = _mask(model) // 4, 6 * config.d_model * length  # numbers; kept: of the ends of the model
    for block in _blocks(model):
        mixers = list(_parts(block, (Attention, RecurrentMixer)))
        experts = list(_parts(block, MixtureOfExperts))
        own = block.n_computed(length) if isinstance(block, Block) else length
        kept += 12 * config.d_model * own
        kept += sum(mixer.n_kept(own, keeps_scores) for mixer in mixers) if mixers else 6 * config.d_model * own
        kept += sum(part.n_kept(own) for part in experts) if experts else 4 * config.d_ff * own
        shared += sum(mixer.n_shared(length) for mixer in mixers if isinstance(mixer, RecurrentMixer))
    of_a_stream = shared + ops.n_logits(tokens, config.vocab_size, dtype)
    of_a_stream += model.count_parameters()["total"]  # each has its own gradients
    return 4 * (_kept(model, recipe, shards) + used * of_a_stream + batch * kept)


def _kept(model: Model, recipe: Recipe, shards: int) -> int:
    """Return the numbers that are kept between steps: weights, a rank's share of optimizer state and of an average."""
    parameters = model.count_parameters()["total"]
    further = 2 + (recipe.average.n_copies() if recipe.average else 0)
    return parameters + -(-further * parameters // shards)


def _least(model: Model, recipe: Recipe, batch: int, shards: int) -> int:
    """Return a lower bound of the bytes of a training step of so many sequences."""
    config, scores = model.config, 0
    if ops.keeps_scores(getattr(mx, recipe.dtype)):  # of one layer, with their gradient
        scores = 2 * max((mixer.n_scores(config.seq_len) for mixer in _attention(model)), default=0)
    inputs = config.seq_len * config.d_model * config.n_layers  # of the blocks
    kept = _kept(model, recipe, shards) + model.count_parameters()["total"]  # with the gradients
    return 4 * (kept + batch * (inputs + scores)) + _mask(model)


def _mask(model: Model) -> int:
    """Return the bytes of the largest mask of attention, which all sequences share."""
    length = model.config.seq_len
    return max((length * mixer.n_keys(length) for mixer in _attention(model)), default=0)


def _attention(model: Model) -> Iterator[Attention]:
    return (mixer for mixer in _parts(model, Attention) if not isinstance(mixer, RecurrentMixer))


def _blocks(model: Model) -> list[nn.Module]:
    """Return the blocks of a training step, one that runs several times as often, and those beside the model's own."""
    stack = model.stack()
    known = {id(block) for block in stack}
    return [*stack, *(block for block in _parts(model, Block) if id(block) not in known)]


def _parts(module: nn.Module, kind: type | tuple[type, ...]) -> Iterator:
    return (part for part in module.modules() if isinstance(part, kind))


def check_part(model: Model, recipe: Recipe, flags: Sequence[str], parts: int) -> None:
    """Raise BadInput where what a step keeps of one of several parts of a model exceeds the device, inputs aside."""
    needed = 4 * (_kept(model, recipe, 1) + model.count_parameters()["total"]) // parts  # with the gradients
    if 0 < memory_limit() < needed:
        _refuse(recipe, model.config, "at least", needed, 0, flags)


def _measure(
    kind: type[Model], config: Config, recipe: Recipe, seed: int, batches: tuple[int, int]
) -> tuple[float, float]:
    """Return the bytes of a training step without its sequences, and those that each of them adds."""
    model = kind(config, seed)
    model.train()
    step = TrainingStep(model, recipe)
    peaks = []
    for size in batches:
        batch = model.example(size * recipe.accumulate, config.seq_len)
        mx.eval(batch, step.state)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        with divided_blas():
            metrics, norm = step(batch, 1e-6)
            mx.eval(metrics, norm, step.state)
        peaks.append(mx.get_peak_memory() - before)
    small, large = batches
    each = max(1.0, (peaks[1] - peaks[0]) / (large - small))
    return max(0.0, peaks[1] - large * each), each


def _refuse(recipe: Recipe, config: Config, how: str, needed: float, largest: int, flags: Sequence[str]) -> None:
    """Raise BadInput; largest: sequences of one forward pass that fit."""
    tokens, present = recipe.batch_tokens // recipe.accumulate, memory_limit()
    changed = [name for name in ("batch_size", *vars(config)) if name in flags]
    advice = " or ".join(f"--{name.replace('_', '-')}" for name in changed or ("d_model", "d_ff", "n_layers"))
    fits = largest * recipe.accumulate
    rounded = fits - fits % max(1, 10 ** (len(str(fits)) - 2))  # two digits
    remedy = f"--batch-size {rounded} fits" if largest >= 1 else f"give a smaller {advice}"
    whose = "the device has" if LIMIT not in os.environ else f"{LIMIT} allows"
    sizes = f"need {how} {_gib(needed)} GiB, and {whose} {_gib(present)}"
    raise BadInput(f"this model and {tokens:,} tokens at a time {sizes}: {remedy}")


def _gib(size: float) -> str:
    """Give a size in GiB with a digit behind the point, or as many as two sizes under one need to differ."""
    return f"{size / 2**30:,.1f}" if size >= 2**29 else f"{size / 2**30:.4f}"
