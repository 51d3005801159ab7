"""Our side of a measurement, as bench.child drives it: the trainer and the decoder, round by round."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_transformer  # noqa: F401 - prepares the runtime before mlx.core is imported

# isort: split
import mlx.core as mx
import numpy as np

from mlx_transformer.backend import device_info, is_plain, prepare, streams, use_device, versions
from mlx_transformer.data.tokens import Tokens
from mlx_transformer.generate.decoding import Decoder
from mlx_transformer.run.console import Console
from mlx_transformer.run.ladder import find_branch, find_phase
from mlx_transformer.run.training import Curve
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.train.trainer import Limits, RunOptions, Step, default_eval_every, fit
from mlx_transformer.utils.errors import RunFailed


def make_recipe(
    phase: int,
    size: str,
    rows: int | None,
    seq_len: int,
    name: str | None = None,
    learning_rate: float | None = None,
) -> Recipe:
    """The phase's own recipe, or the variant of that name, with steps of so many rows and another peak rate."""
    module = find_phase(phase)
    recipe: Recipe = (module.RECIPES[name] if name else module.RECIPE).at(size)
    changed: dict[str, Any] = {"batch_tokens": rows and rows * seq_len, "learning_rate": learning_rate}
    return replace(recipe, **{field: value for field, value in changed.items() if value}).check()


def facts() -> dict[str, Any]:
    """What the speed depends on."""
    prepared = prepare()
    return {
        "device": device_info().describe(),
        "blas": prepared.blas.describe() if prepared.blas else None,
        "threads": prepared.threads,
        "streams": len(streams()),
        "compiler_flags": prepared.kernels.flags if prepared.kernels else None,
        "allocator_tuned": prepared.allocator,
        "plain": is_plain(),
        "versions": versions(),
        "warned": prepared.warned,
    }


class TrainingRounds:
    """The contestant mlx: fit() as a run drives it, with its curve and console, but without evaluations and saving.

    Nor does its batch grow: what is timed is the step that a run repeats, and its tokens are counted as the full batch.
    """

    def __init__(
        self,
        *,
        phase: int,
        size: str,
        rows: int,
        config: dict[str, Any],
        tokens: str,
        folder: str,
        device: str,
        branch: str | None = None,
        recipe: str | None = None,
        learning_rate: float | None = None,
    ) -> None:
        use_device(device)
        kind = find_branch(find_phase(phase), branch)
        rules = replace(make_recipe(phase, size, rows, config["seq_len"], recipe, learning_rate), batch_warmup=None)
        pieces = np.load(tokens, mmap_mode="r")
        data = Tokens(pieces, pieces[: config["seq_len"] + 1], 0, 1, 1, None, 0.0, True)
        log_every = max(1, default_eval_every(rules, data, config["seq_len"]) // 10)  # as run.py has it
        self.curve = Curve(Path(folder) / "curve.jsonl", lambda loss: None, log_every)
        self.console = Console(quiet=True).training(Limits())
        self.events = fit(kind(kind.Config(**config)), rules, data, options=RunOptions(eval_every=10**9))

    def facts(self) -> dict[str, Any]:
        return facts()

    def round(self, steps: int) -> dict[str, Any]:
        """The next so many steps; their losses, and the share of the clock spent waiting for batches so far."""
        losses: list[float] = []
        event = None
        while len(losses) < steps:
            event = next(self.events)
            self.curve.write(event)
            self.console.show(event, mx.get_peak_memory())
            if isinstance(event, Step):
                losses.append(event.metrics["loss"])
            else:
                raise RunFailed(f"training ended: {event}")
        assert isinstance(event, Step)
        on_gpu = {} if device_info().backend == "cpu" else {"memory_bytes": mx.get_peak_memory()}
        return {"losses": losses, "data_wait_share": event.data_wait_share, **on_gpu}


class DecodingRounds:
    """The contestants mlx and mlx-uncached."""

    def __init__(
        self, *, phase: int, config: dict[str, Any], seed: int, prompts: list[list[int]], cached: bool, device: str
    ) -> None:
        use_device(device)
        kind = find_phase(phase).Model
        self.model = kind(kind.Config(**config), seed)
        self.model.eval()
        mx.eval(self.model.parameters())
        self.prompts = prompts
        self.decode, self.decoder = (self._cached if cached else self._uncached), Decoder(self.model)

    def facts(self) -> dict[str, Any]:
        return facts()

    def round(self, count: int) -> dict[str, Any]:
        """The next pieces (B, count) of every prompt."""
        return {"pieces": self.decode(count)}

    def _cached(self, count: int) -> list[list[int]]:
        return np.array(list(self.decoder(self.prompts, count))).T.tolist()

    def _uncached(self, count: int) -> list[list[int]]:
        tokens = mx.array(self.prompts)
        for _ in range(count):
            h = self.model.hidden(self.model.context(tokens))[:, -1:]
            tokens = mx.concatenate([tokens, self.model.unembed(h).argmax(-1)], axis=1)
            mx.eval(tokens)
        return tokens[:, -count:].tolist()  # type: ignore[return-value]
