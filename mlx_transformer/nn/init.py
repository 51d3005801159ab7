"""Initialization of parameters: tables of rules by path, and a random key for each path."""

import functools
import hashlib
import re
from collections.abc import Callable

import mlx.core as mx
from mlx import nn

Rule = Callable[[mx.array, mx.array], mx.array]  # (value set by the part, random key) -> initial value
Rules = tuple[tuple[str, Rule], ...]  # (regular expression of a whole path, rule)


def zeros(value: mx.array, key: mx.array) -> mx.array:
    """Return zeros."""
    return mx.zeros_like(value)


def ones(value: mx.array, key: mx.array) -> mx.array:
    """Return ones."""
    return mx.ones_like(value)


def keep(value: mx.array, key: mx.array) -> mx.array:
    """Return the value that the part set."""
    return value


def unit_rows(value: mx.array, key: mx.array) -> mx.array:
    """Draw from N(0, 1 / d), d the last axis: unit variance once scaled by sqrt(d) (Vaswani et al. 2017, sec. 3.4)."""
    return mx.random.normal(value.shape, key=key, dtype=value.dtype) * value.shape[-1] ** -0.5


def xavier_uniform(value: mx.array, key: mx.array) -> mx.array:
    """Draw from U(-a, a), a = sqrt(6 / (fan_in + fan_out)) (Glorot & Bengio 2010, eq. 16), as tensor2tensor does."""
    bound = (6 / sum(value.shape[-2:])) ** 0.5
    return mx.random.uniform(-bound, bound, value.shape, key=key, dtype=value.dtype)


def fan_in_uniform(value: mx.array, key: mx.array) -> mx.array:
    """Draw from U(-a, a), a = 1 / sqrt(d), d the last axis: PyTorch's default for linear maps and convolutions."""
    bound = value.shape[-1] ** -0.5
    return mx.random.uniform(-bound, bound, value.shape, key=key, dtype=value.dtype)


def normal(deviation: float) -> Rule:
    """Return the rule that draws from a normal distribution of mean 0 and this standard deviation."""

    def rule(value: mx.array, key: mx.array) -> mx.array:
        return mx.random.normal(value.shape, key=key, dtype=value.dtype) * deviation

    return rule


def log_uniform(low: float, high: float) -> Rule:
    """Return the rule that draws the logarithm of a number uniform in [low, high]."""

    def rule(value: mx.array, key: mx.array) -> mx.array:
        return mx.log(mx.random.uniform(low, high, value.shape, key=key, dtype=value.dtype))

    return rule


_VECTORS: Rules = (
    (r".*_proj\.bias", zeros),
    (r"(.*\.)?(norms\.\d+|[a-z_]*norm)\.weight", ones),
    (r"(.*\.)?(norms\.\d+|[a-z_]*norm)\.bias", zeros),
    (r"(.*\.)?(norms\.\d+|[a-z_]*norm)\.g", keep),
    (r".*_lambda", keep),
    (
        r".*\.mixer\.([a-z]+_)*(conv\.(weight|bias)|a_log|a_imag|c_real|c_imag|dt_bias|dt_log|input_bias|forget_bias|skip)",
        keep,
    ),  # as nn/mixers sets them
    (r".*\.(value|gram)_embedding\.weight", zeros),
    (r"expert\.gate(_|s\.\d+\.)(weight|bias)", zeros),
)

RULES: Rules = (
    (r"(encoder\.)?embedding\.weight", unit_rows),
    (r"(head|position)\.weight", unit_rows),
    (r".*_proj\.weight", xavier_uniform),
    *_VECTORS,
)


def gpt2_rules(d_model: int, n_layers: int) -> Rules:
    """Return the table of GPT-2: normal, with a smaller standard deviation for o_proj and down_proj.

    The deviation is 0.02 sqrt(768 / d_model): 0.02 at the width 768 (Radford et al. 2018 (GPT), sec. 4.1), divided by
    sqrt(2 n_layers) in the two projections that write into the residual stream (Radford et al. 2019 (GPT-2), sec. 2.3).
    Differs from the code of Hugging Face: 0.02 there at every width; from OpenAI's: 0.01 there for positions.
    """
    deviation = 0.02 * (768 / d_model) ** 0.5
    return (
        (r"(embedding|head|position)\.(step_)?weight", normal(deviation)),
        (r".*\.mixer\.(relative_keys|relative_values|content_bias|position_bias)", normal(deviation)),
        (r".*(?<!\.o)(?<!\.down)_proj\.weight", normal(deviation)),
        (r".*\.(o|down)_proj\.weight", normal(deviation / (2 * n_layers) ** 0.5)),
        *_VECTORS,
    )


def rule_for(path: str, rules: Rules = RULES) -> Rule:
    """Return the rule of a table that matches a parameter's path, e.g. 'blocks.0.mixer.q_proj.weight', or `keep`.

    Raises ValueError if several rules match.
    """
    found = [rule for pattern, rule in rules if re.fullmatch(pattern, path)]
    if len(found) > 1:
        raise ValueError(f"parameter '{path}' matches {len(found)} rules, expected at most 1")
    return found[0] if found else keep


def part_rule(model: nn.Module, path: str) -> Rule:
    """Return the rule in `init_rules`, a class attribute of the part that owns a parameter, or `keep`.

    `init_rules` is a dict of Rules by the parameter's own name. Those of all base classes count.
    """
    *parents, name = path.split(".")
    part = functools.reduce(lambda node, key: node[int(key) if isinstance(node, list) else key], parents, model)
    tables = (vars(kind).get("init_rules", {}) for kind in type(part).__mro__)
    return next((rules[name] for rules in tables if name in rules), keep)


def path_key(seed: int, path: str) -> mx.array:
    """Return a random key of the seed and the path: equal paths are initialized alike in every phase."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return mx.random.key(int.from_bytes(digest[:8], "little"))
