"""Helpers of the notebooks: find and read a run or a comparison, a live curve, attention maps of a trained model."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx_transformer  # noqa: F401 - prepares the runtime before mlx.core is imported

# isort: split
import mlx.core as mx
import numpy as np

from bench.compare.plots import BLUE, RULE
from bench.report.logs import read_log
from bench.workers.machine import ROOT
from mlx_transformer import nn
from mlx_transformer.data.pairs import encode_sources
from mlx_transformer.data.tokenizers import Tokenizer
from mlx_transformer.generate import Translation
from mlx_transformer.nn.config import Config
from mlx_transformer.nn.model import Model
from mlx_transformer.nn.position import SinusoidalPosition
from mlx_transformer.run.plots import short
from mlx_transformer.train import Eval, Step, Stopped
from mlx_transformer.train.events import Event
from mlx_transformer.utils.errors import BadInput

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


class LiveCurve:
    """The loss of a model while it trains, drawn again at most once in `every` seconds: give it the events of `fit`.

    floor: entropy of the text in nats per token, where it is known.
    """

    def __init__(self, floor: float | None = None, every: float = 1.0) -> None:
        self.floor, self.every = floor, every
        self.training: list[tuple[int, float]] = []  # tokens so far, and the loss of a batch
        self.validation: list[tuple[int, float]] = []
        self._shown: Any = None
        self._drawn = 0.0

    def begin(self) -> None:
        """Show the curve so far in the output of the present cell; later events draw there."""
        from IPython.display import display

        self._shown = display(self.figure(), display_id=True)

    def add(self, event: Event) -> None:
        """Take an event of `fit`."""
        if isinstance(event, Step):
            self.training.append((event.tokens, event.metrics["loss"]))
        elif isinstance(event, Eval):
            self.validation.append((event.tokens, event.valid_loss))
        now = time.monotonic()
        if isinstance(event, Eval | Stopped) or now > self._drawn + self.every:
            self._shown.update(self.figure())
            self._drawn = now

    def figure(self) -> "Figure":
        """Draw the curves, the training loss as the mean over up to 100 spans of the run."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.2, 3), layout="constrained")
        axes = figure.subplots()
        parts = np.array_split(np.array(self.training or [(0, np.nan)]), min(100, len(self.training) or 1))
        tokens, loss = np.array([part.mean(axis=0) for part in parts]).T
        axes.plot(tokens, loss, color="#e69f00", linewidth=0.9, label="training")
        axes.plot(*np.array(self.validation or [(0, np.nan)]).T, "o-", color=BLUE, markersize=3, label="validation")
        if self.floor is not None:
            axes.axhline(self.floor, color="#009e73", linestyle=":", linewidth=1.6, label="entropy of the text")
        axes.set(xlabel="training tokens", ylabel="loss (nats per token)")
        axes.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
        axes.grid(color=RULE, linewidth=0.6)
        axes.legend()
        return figure


def attention_maps(model: Model, tokens: list[int]) -> list[np.ndarray]:
    """Return the attention weights (n_heads, L, L) of every softmax attention, in the order of the layers.

    Row i is the softmax over the keys for the query at i. Other mixers have no map.
    """
    return [np.array(one.weights[0].astype(mx.float32)) for one in nn.attention_maps(model, mx.array([tokens]))]


def cross_attention(
    model: Any, tokenizer: Tokenizer, translation: Translation
) -> tuple[np.ndarray, list[str], list[str]]:
    """Return the weights of cross-attention (layers, n_heads, T, S), and the tokens of the T rows and S columns.

    Row i predicts token i of the translation, the last one its end.
    """
    source, target = encode_sources(tokenizer, [translation.source])[0], [tokenizer.bos_id, *translation.tokens]
    pair = np.full((1, 2, max(len(source), len(target))), nn.PAD, np.int32)
    pair[0, 0, : len(source)], pair[0, 1, : len(target)] = source, target
    seen = [one.weights[0] for one in nn.attention_maps(model, mx.array(pair)) if one.path.endswith(".cross")]
    maps = np.array(mx.stack(seen).astype(mx.float32))
    names = [[*(tokenizer.token(token) for token in row), "¶"] for row in (source[:-1], translation.tokens)]
    sources, targets = ([name.replace("▁", "·") for name in row] for row in names)
    return maps[:, :, : len(target), : len(source)], sources, targets


def sinusoids(config: Config) -> np.ndarray:
    """Return the sinusoidal position encoding (seq_len, d_model)."""
    return np.array(SinusoidalPosition(config).encoding(mx.arange(config.seq_len), config.d_model))
