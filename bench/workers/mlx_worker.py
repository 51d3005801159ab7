"""MLX's side of a measurement: training and decoding, round by round, as bench.workers.worker drives them."""

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
from mlx_transformer.nn.patches import class_of
from mlx_transformer.run.console import Console
from mlx_transformer.run.ladder import Experiment, find_phase
from mlx_transformer.run.training import Curve
from mlx_transformer.train.parallel import join
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.train.trainer import Limits, Prepared, RunOptions, Step, default_eval_every, fit
from mlx_transformer.utils.errors import RunFailed


def make_recipe(
    experiment: Experiment | int,
    size: str,
    batch_size: int | None,
    seq_len: int,
    name: str | None = None,
    learning_rate: float | None = None,
) -> Recipe:
    """Return the recipe of an experiment or phase, or a named one, with another batch size and peak learning rate."""
    experiment = Experiment.of_phase(experiment) if isinstance(experiment, int) else experiment
    recipe = experiment.find_recipe(name)[0].at(size)
    changes: dict[str, Any] = {"batch_tokens": batch_size and batch_size * seq_len, "learning_rate": learning_rate}
    return replace(recipe, **{field: value for field, value in changes.items() if value}).check()


def find_experiment(text: str) -> Experiment:
    """Return the phase of a number, or load somebody's own file."""
    return Experiment.of_phase(int(text)) if text.isdigit() else Experiment.of_file(text)


def describe_runtime() -> dict[str, Any]:
    """Describe what the speed depends on, as a log records it."""
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
    """Training steps of fit() as a run drives it, with its curve and console, without evaluations and checkpoints.

    experiment: a phase's number or the path of a file. The batch does not grow: the step that a run repeats is timed.
    Several ranks, if they were started, train together.
    """

    def __init__(
        self,
        *,
        experiment: str,
        size: str,
        batch_size: int,
        config: dict[str, Any],
        tokens: str,
        folder: str,
        device: str,
        branch: str | None = None,
        recipe: str | None = None,
        learning_rate: float | None = None,
    ) -> None:
        use_device(device)
        trained = find_experiment(experiment)
        kind = class_of(trained.find_branch(branch), config)
        rules = make_recipe(trained, size, batch_size, config["seq_len"], recipe, learning_rate)
        rules = replace(rules, batch_warmup=None, dropout=None)  # dropout: the config's
        train = np.load(tokens, mmap_mode="r")
        data = Tokens(
            train, train[: config["seq_len"] + 1], int(train[0]), 1, 1, None, 0.0, True
        )  # a text's first is EOS
        log_every = max(1, default_eval_every(rules, data, config["seq_len"]) // 10)  # as in a run
        self.curve = Curve(Path(folder) / "curve.jsonl", lambda loss: None, log_every)
        self.console = Console(quiet=True).training(Limits())
        self.ranks = join()
        options = RunOptions(eval_every=10**9, ranks=self.ranks)
        self.events = fit(kind(kind.Config(**config)), rules, data, options=options)

    def facts(self) -> dict[str, Any]:
        """Describe the runtime."""
        return describe_runtime()

    def round(self, steps: int, probe: bool = False) -> dict[str, Any]:
        """Take the next steps; their losses, and the share of the training time spent waiting for batches so far.

        probe: let each step of several ranks wait for its gradients, and time their exchange.
        """
        losses: list[float] = []
        communication: list[float] = []
        event = None
        self.ranks.probe_every = 1 if probe else 10**9
        while len(losses) < steps:
            event = next(self.events)
            self.curve.write(event)
            self.console.show(event, mx.get_peak_memory())
            if isinstance(event, Step):
                losses.append(event.metrics["loss"])
                communication.append(self.ranks.communication_seconds)
            elif not isinstance(event, Prepared):
                raise RunFailed(f"training ended: {event}")
        assert isinstance(event, Step)
        on_gpu: dict[str, Any] = {} if device_info().backend == "cpu" else {"memory_bytes": mx.get_peak_memory()}
        if self.ranks.size > 1:
            exchanged = {"messages": self.ranks.messages, "message_bytes": self.ranks.message_bytes}
            on_gpu |= {"communication_seconds": communication if probe else None, **exchanged}
        return {"losses": losses, "data_wait_share": event.data_wait_share, **on_gpu}


class DecodingRounds:
    """Greedy decoding of the same prompts, with the cache or by a whole forward pass for every token."""

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
        """Describe the runtime."""
        return describe_runtime()

    def round(self, count: int) -> dict[str, Any]:
        """Decode the next tokens (B, count) of every prompt."""
        return {"tokens": self.decode(count)}

    def _cached(self, count: int) -> list[list[int]]:
        return np.array(list(self.decoder(self.prompts, count))).T.tolist()

    def _uncached(self, count: int) -> list[list[int]]:
        tokens = mx.array(self.prompts)
        for _ in range(count):
            h = self.model.hidden(self.model.context(tokens))[:, -1:]
            tokens = mx.concatenate([tokens, self.model.unembed(h).argmax(-1)], axis=1)
            mx.eval(tokens)
        return tokens[:, -count:].tolist()  # type: ignore[return-value]
