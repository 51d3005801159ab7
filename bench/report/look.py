"""Helpers of the notebooks: find and read a run or a comparison, attention maps of a trained model."""

from pathlib import Path
from typing import Any

import mlx_transformer  # noqa: F401 - prepares the runtime before mlx.core is imported

# isort: split
import mlx.core as mx
import numpy as np
from mlx import nn

from bench.report.logs import read_log
from bench.workers.machine import ROOT
from mlx_transformer.data.pairs import encode_sources
from mlx_transformer.data.tokenizers import Tokenizer
from mlx_transformer.generate import Translation
from mlx_transformer.nn import PAD
from mlx_transformer.nn.config import Config
from mlx_transformer.nn.model import Model
from mlx_transformer.nn.position import SinusoidalPosition
from mlx_transformer.utils.errors import BadInput


class NotThere(BadInput):
    """Nothing was found. A notebook shows the sentence without a traceback."""

    def _render_traceback_(self) -> list[str]:  # called by IPython
        return [f"error: {self}"]


def find_run(given: str | None, holding: str = "result.json", root: Path = ROOT, branch: str | None = None) -> Path:
    """Return the given folder, else the newest run with such a file, else the last published one. Raises NotThere.

    branch: of the runs to look for; None: any.
    """
    if given:
        if not (Path(given) / holding).is_file():
            raise NotThere(f"'{given}' has no {holding}: expected the folder of a finished run")
        return Path(given)
    results = root / "results"
    depth = len(Path(holding).parts) - 1
    places = [*results.glob(f"phases/*/{holding}"), *results.glob(f"*/{holding}")]
    if branch is not None:
        places = [place for place in places if _branch_of(place.parents[depth]) == branch]
    found = _newest(*places)
    if branch is None:
        found = found or max(results.glob(f"published/*/{holding}"), default=None)
    if not found:
        how = "`make run`" if branch is None else f"`python -m phases.phase1 --branch {branch}`"
        raise NotThere(f"there is no run with a {holding} yet: {how} trains one in minutes")
    return found.parents[depth]


def _branch_of(folder: Path) -> str | None:
    try:
        return read_log(folder / "result.json")["branch"]
    except (OSError, ValueError, KeyError):
        return None


def find_comparison(given: str | None, root: Path = ROOT) -> Path:
    """Return the given compare.json, else the newest, else the last published one. Raises NotThere."""
    if given:
        if not Path(given).is_file():
            raise NotThere(f"'{given}' is not there: expected a compare.json")
        return Path(given)
    results = root / "results"
    found = _newest(*results.glob("bench/*/compare.json"))
    found = found or max(results.glob("published/**/compare.json"), default=None)
    if not found:
        raise NotThere("there is no comparison yet: `python -m bench.compare --phases 1 --quick` makes one in minutes")
    return found


def _newest(*paths: Path) -> Path | None:
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the result.json of a run and the lines of its curve.jsonl."""
    return read_log(folder / "result.json"), read_log(folder / "curve.jsonl")


def attention_maps(model: Model, tokens: list[int]) -> list[np.ndarray]:
    """Return the attention weights (n_heads, L, L) of every softmax attention, in the order of the layers.

    Row i is the softmax over the keys for the query at i. Other mixers, and attention computed in blocks (a window),
    have no map.
    """
    seen: list[mx.array] = []
    kind = type(model)
    mixers = kind.Mixer if isinstance(kind.Mixer, tuple) else (kind.Mixer,)
    watched = type("Watched", (kind,), {"Mixer": tuple(_watched(mixer, seen) for mixer in mixers)})
    twin = watched(model.config)
    twin.update(model.parameters())
    twin.eval()
    mx.eval(twin(mx.array([tokens])), seen)
    square = (len(tokens), len(tokens))
    return [np.array(weights[0].astype(mx.float32)) for weights in seen if weights.shape[-2:] == square]


def cross_attention(
    model: Any, tokenizer: Tokenizer, translation: Translation
) -> tuple[np.ndarray, list[str], list[str]]:
    """Return the weights of cross-attention (layers, n_heads, T, S), and the tokens of the T rows and S columns.

    Row i predicts token i of the translation, the last one its end.
    """
    seen: list[mx.array] = []
    kind = type(model)
    twin = type("Watched", (kind,), {"Cross": _watched(kind.Cross, seen)})(model.config)
    twin.update(model.parameters())
    twin.eval()
    source, target = encode_sources(tokenizer, [translation.source])[0], [tokenizer.bos_id, *translation.tokens]
    pair = np.full((1, 2, max(len(source), len(target))), PAD, np.int32)
    pair[0, 0, : len(source)], pair[0, 1, : len(target)] = source, target
    mx.eval(twin(mx.array(pair)), seen)
    maps = np.array(mx.stack([weights[0] for weights in seen]).astype(mx.float32))
    names = [[*(tokenizer.token(token) for token in row), "¶"] for row in (source[:-1], translation.tokens)]
    sources, targets = ([name.replace("▁", "·") for name in row] for row in names)
    return maps[:, :, : len(target), : len(source)], sources, targets


def sinusoids(config: Config) -> np.ndarray:
    """Return the sinusoidal position encoding (seq_len, d_model)."""
    return np.array(SinusoidalPosition(config).encoding(mx.arange(config.seq_len), config.d_model))


def _watched(kind: Any, seen: list[mx.array]) -> type[nn.Module]:
    """Make a mixer that records its weights: `mix` is weights @ v, so the identity as v yields them."""

    class Watched(kind):
        def mix(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None) -> mx.array:
            identity = mx.broadcast_to(mx.eye(v.shape[-2], dtype=v.dtype), (*v.shape[:-1], v.shape[-2]))
            seen.append(super().mix(q, k, identity, mask))
            return super().mix(q, k, v, mask)

    return Watched
