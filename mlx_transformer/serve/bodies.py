"""The bodies of requests: JSON objects, read into dataclasses, with one sentence where one is wrong."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_transformer.generate import Sampling
from mlx_transformer.utils.errors import BadInput

MOST_BYTES = 1_000_000  # of a body
MOST_TOKENS = 10_000  # of a continuation
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True, kw_only=True)
class Writing:
    """A beginning to continue."""

    prompt: str
    sampling: Sampling
    max_tokens: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Looking:
    """The place behind some tokens, and the token that stands there, if one does."""

    tokens: list[int]
    sampling: Sampling
    token: int | None = None


@dataclass(frozen=True, kw_only=True)
class Attending:
    """The attention over some tokens of a layer's head; None: the mean of its heads."""

    tokens: list[int]
    layer: int
    head: int | None = None


def read_writing(body: bytes) -> Writing:
    """Read the body of a request for a continuation. Raises BadInput."""
    values = _read(body, prompt=_text, max_tokens=_whole(1, MOST_TOKENS), seed=_whole(0, 10**18 - 1), **_NUMBERS)
    if values["prompt"] is None:
        raise BadInput("prompt is missing: expected some text to continue")
    return Writing(
        prompt=values["prompt"],
        sampling=_sampling(values),
        max_tokens=values["max_tokens"],
        seed=values["seed"] or 0,
    )


def read_looking(body: bytes) -> Looking:
    """Read the body of a request for the probabilities of a place. Raises BadInput."""
    values = _read(body, tokens=_tokens, token=_token, **_NUMBERS)
    if not values["tokens"]:
        raise BadInput("nothing stands before the first token: expected tokens to predict the next one from")
    return Looking(tokens=values["tokens"], sampling=_sampling(values), token=values["token"])


def read_attending(body: bytes) -> Attending:
    """Read the body of a request for attention weights. Raises BadInput."""
    values = _read(body, tokens=_tokens, layer=_whole(0, 10**6), head=_whole(0, 10**6))
    if not values["tokens"]:
        raise BadInput("tokens are missing: expected those of a text")
    if values["layer"] is None:
        raise BadInput("layer is missing: expected its number, from 0")
    return Attending(**values)


def _read(body: bytes, **readers: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Return the value of each name, None where it is absent or null. Raises BadInput for any other body."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise BadInput("the request is no JSON: expected an object") from None
    if not isinstance(given, dict):
        raise BadInput(f"the request is a JSON {type(given).__name__}: expected an object")
    if unknown := next((name for name in given if name not in readers), None):
        raise BadInput(f"{_shown(unknown)} is unknown: expected {', '.join(readers)}")
    return {
        name: None if given.get(name) is None else reader(name.replace("_", "-"), given[name])
        for name, reader in readers.items()
    }


def _sampling(values: dict[str, Any]) -> Sampling:
    return Sampling(**{name: values[name] for name in _SAMPLING if values[name] is not None})


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{name} = {_shown(value)}: expected text")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 and math.isfinite(value):
        return float(value)
    raise BadInput(f"{name} = {_shown(value)}: expected a number")


def _whole(low: int, high: int) -> Callable[[str, Any], int]:
    def read(name: str, value: Any) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        raise BadInput(f"{name} = {_shown(value)}: expected a whole number from {low} to {high}")

    return read


_token = _whole(0, 2**31 - 1)
_NUMBERS: dict[str, Callable[[str, Any], Any]] = {
    "temperature": _number,
    "top_k": _whole(1, 10**9),
    "top_p": _number,
    "min_p": _number,
}


def _tokens(name: str, value: Any) -> list[int]:
    if not isinstance(value, list):
        raise BadInput(f"{name} = {_shown(value)}: expected a list of token ids")
    return [_token(f"{name}[{i}]", one) for i, one in enumerate(value)]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
