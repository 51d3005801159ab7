"""The memory of a training step: what does not fit the device is refused before it is started."""

from collections.abc import Sequence

import mlx.core as mx

from mlx_transformer.backend import device_info, divided_blas
from mlx_transformer.nn.attention import Attention
from mlx_transformer.nn.config import Config
from mlx_transformer.nn.mixers import RecurrentMixer
from mlx_transformer.nn.model import Model
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.train.step import TrainingStep
from mlx_transformer.utils.errors import BadInput

_OVERHEAD = 1.15  # of the process over MLX's arrays: 1.05 to 1.13 measured
_SAMPLE_TOKENS = 8192  # of the larger sampled step: beyond a chunk of logits, from where memory grows evenly
_SAMPLE_SHARE = 0.125  # of the device's memory, that a sampled step may take


def check_dimensions(config: Config, recipe: Recipe, flags: Sequence[str]) -> None:
    """Raise BadInput where the inputs of the blocks alone exceed the device: before any layer is allocated.

    flags: the names of the settings that were given.
    """
    _check_least(config, recipe, 0, 0, flags)


def check_memory(model: Model, recipe: Recipe, seed: int, flags: Sequence[str]) -> None:
    """Raise BadInput where a training step needs more memory than the device has.

    `activation_bound` decides where it is clear. Where it is not, steps of a few sequences are measured on another
    model of the same kind, which leaves this one as it is.
    """
    config, parameters = model.config, model.count_parameters()["total"]
    scores = most_scores(model)
    _check_least(config, recipe, parameters, scores, flags)
    present, batch = device_info().memory_bytes, max(1, recipe.batch_tokens // recipe.accumulate // config.seq_len)
    states, bound = 12 * parameters, activation_bound(config, scores)  # weights, gradients and optimizer state
    if present <= 0 or _OVERHEAD * (states + batch * bound) <= present:
        return
    sample = min(batch, max(2, _SAMPLE_TOKENS // config.seq_len), int(_SAMPLE_SHARE * present / bound))
    if sample < 2:  # too large to be measured
        return
    fixed, each = _measure(type(model), config, recipe, seed, (sample // 2, sample))
    mx.clear_cache()
    needed = _OVERHEAD * (states + fixed + batch * each)
    if needed > present:
        largest = int(0.9 * (present / _OVERHEAD - states - fixed) / each)  # two measurements differ a little
        _refuse(recipe, config, "about", needed, largest, flags)


def most_scores(model: Model) -> int:
    """Return the scores of one sequence, over all heads, in the layer that has most."""
    mixers = (part for part in model.modules() if isinstance(part, (Attention, RecurrentMixer)))
    return max((mixer.n_scores(model.config.seq_len) for mixer in mixers), default=0)


def activation_bound(config: Config, scores: int) -> int:
    """Return an upper bound, mostly within a factor of two, of the bytes that a sequence adds to a training step.

    scores: as `most_scores` returns them.
    """
    a_layer = 20 * config.d_model + 4 * config.d_ff + 4 * scores // config.seq_len
    return 4 * config.seq_len * (config.n_layers * a_layer + 3 * config.vocab_size)


def _check_least(config: Config, recipe: Recipe, parameters: int, scores: int, flags: Sequence[str]) -> None:
    """Raise BadInput where a lower bound of the memory of training exceeds the device's."""
    tokens = recipe.batch_tokens // recipe.accumulate  # of one forward pass
    activations = tokens * config.d_model * config.n_layers  # inputs of the blocks alone
    attention = 2 * scores * max(1, tokens // config.seq_len)  # of one layer, with their gradient
    needed, present = 4 * (3 * parameters + activations + attention), device_info().memory_bytes
    if 0 < present < needed:
        largest = int((present / _OVERHEAD - 12 * parameters) / activation_bound(config, scores))
        _refuse(recipe, config, "at least", needed, largest, flags)


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
    tokens, present = recipe.batch_tokens // recipe.accumulate, device_info().memory_bytes
    changed = [name for name in ("batch_size", *vars(config)) if name in flags]
    advice = " or ".join(f"--{name.replace('_', '-')}" for name in changed or ("d_model", "d_ff", "n_layers"))
    fits = largest * recipe.accumulate
    rounded = fits - fits % max(1, 10 ** (len(str(fits)) - 2))  # two digits
    remedy = f"--batch-size {rounded} fits" if largest >= 1 else f"give a smaller {advice}"
    raise BadInput(
        f"this model and {tokens:,} tokens at a time need {how} {needed / 2**30:,.1f} GiB, and the device has "
        f"{present / 2**30:,.1f}: {remedy}"
    )
