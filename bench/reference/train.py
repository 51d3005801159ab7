"""A whole training run of a reference: `python -m bench.reference.train FOLDER`.

Reads from the folder: task.json (see Run), weights.npz (by MLX's parameter paths), sequences.npy (sequences of L + 1
tokens in training order), valid.npy and mask.npy (validation sequences, and which targets count). Writes curve.jsonl,
checkpoint.npz and, last, result.json with the keys of a run in MLX. Started again it resumes from the checkpoint to the
same losses. The training clock excludes compilation, evaluation and saving.
"""

import errno
import fcntl
import json
import math
import os
import resource
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench.reference import device_memory, make_training, synchronize

INTERRUPTED = 130  # the exit code
_EVAL_TOKENS = 8192  # of an evaluation batch
_UNTIMED_STEPS = 5  # tokens per second counts from the step after these, as in MLX
_LOGS_PER_EVALUATION = 10
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


@dataclass
class Progress:
    """The progress of a run."""

    step: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    compile_seconds: float = 0.0
    eval_seconds: float = 0.0
    timed_steps: int = 0
    timed_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # validation, nats per token, one per evaluation
    evaluated_step: int = 0
    peak_memory_bytes: int = 0


def stop_rule(rule: dict[str, Any]) -> Callable[[list[float]], bool]:
    """Return the function that decides from the validation losses so far whether to stop. Raises ValueError."""
    if rule["kind"] == "NoStop":
        return lambda losses: False
    if rule["kind"] != "Plateau":
        raise ValueError(f"this reference does not stop by {rule['kind']}")

    def plateau(losses: list[float]) -> bool:
        without_gain = 0
        for i in range(1, len(losses)):
            gained = losses[i] < min(losses[:i]) - rule["min_improvement"]
            without_gain = 0 if gained else without_gain + 1
        return without_gain >= rule["patience"]

    return plateau


class Run:
    """One run. task.json: phase, branch, config, recipe, compiled, device, threads, seed, batch_size, max_tokens,
    eval_every (steps), bits_per_nat (validation loss -> bits per byte, or null) and about (goes into result.json).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.task = task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
        self.device: str = task["device"]
        torch.set_num_threads(task["threads"])
        torch.manual_seed(task["seed"])
        numbers = {name: task[name] for name in ("phase", "branch", "config", "recipe", "device", "compiled")}
        self.training = make_training(**numbers, weights=folder / "weights.npz")
        self.should_stop = stop_rule(task["recipe"]["stop"])
        self.sequences, self.valid, self.mask = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("sequences", "valid", "mask")
        )
        self.training.prepare(self.sequences)
        self.step_tokens = task["batch_size"] * (self.sequences.shape[1] - 1)
        self.progress, self.interrupted = Progress(), False
        if (folder / "checkpoint.npz").exists():
            self._restore()
        self.started = self.progress.step

    def train(self) -> str:
        """Train until a limit, a rule or a signal ends it; returns which."""
        now, task = self.progress, self.task
        self._cut_curve()
        self.mark = time.monotonic()
        while True:
            full = now.tokens >= task["max_tokens"]
            if now.step > now.evaluated_step and (full or now.step % task["eval_every"] == 0):
                self._evaluate()
            if now.losses and not math.isfinite(now.losses[-1]):
                return "diverged"
            if now.losses and now.evaluated_step == now.step and self._is_finished():
                return "plateau"
            if full:
                return "max_tokens"
            if self.interrupted:
                self._save()
                return "interrupted"
            if not math.isfinite(self._step()):
                return "diverged"

    def _is_finished(self) -> bool:
        """Whether the recipe's rule stops the run, or a learning rate of 0 ends the schedule."""
        return self.training.factor() == 0 or self.should_stop(self.progress.losses)

    def _step(self) -> float:
        now, count = self.progress, self.task["batch_size"]
        loss = self.training.step(self.sequences[now.step * count : (now.step + 1) * count].astype(np.int32))
        synchronize(self.device)
        before, self.mark = self.mark, time.monotonic()
        spent = self.mark - before
        now.step, now.tokens = now.step + 1, now.tokens + self.step_tokens
        self._time(spent)
        if now.step % max(1, self.task["eval_every"] // _LOGS_PER_EVALUATION) == 0:
            self._log("log", loss=loss)
        return loss

    def _time(self, spent: float) -> None:
        """Count one step's seconds as mlx_transformer.train.trainer does: the first step of a process compiles."""
        now = self.progress
        if now.step == self.started + 1:
            self.compiling_seconds = spent
            now.compile_seconds += spent
            return
        training = min(spent, self.compiling_seconds)
        self.compiling_seconds = 0.0
        now.compile_seconds -= training
        now.train_seconds += training + spent
        if now.step > _UNTIMED_STEPS:
            now.timed_steps += 1
            now.timed_seconds += spent

    def _evaluate(self) -> None:
        now = self.progress
        now.losses.append(self.valid_loss())
        now.evaluated_step = now.step
        now.eval_seconds += time.monotonic() - self.mark
        self._log("eval", valid_loss=now.losses[-1], valid_bpb=self._bits(now.losses[-1]))
        self._save()
        self.mark = time.monotonic()

    @torch.inference_mode()
    def valid_loss(self) -> float:
        """Return nats per token over every target that the mask counts, without dropout."""
        model = self.training.model.eval()
        size, total = max(1, _EVAL_TOKENS // self.mask.shape[1]), 0.0
        for i in range(0, len(self.valid), size):
            tokens = torch.from_numpy(self.valid[i : i + size].astype(np.int64)).to(self.device)
            mask = torch.from_numpy(np.array(self.mask[i : i + size])).to(self.device)
            losses = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            total += (losses * mask.flatten()).sum().item()
        model.train()
        return total / int(self.mask.sum())

    def result(self, why: str) -> dict[str, Any]:
        """Return result.json with the keys of a run in MLX."""
        now = self.progress
        best = min((loss for loss in now.losses if math.isfinite(loss)), default=None)
        final = _number(now.losses[-1]) if now.losses else None
        timed = now.step >= 10 and now.timed_seconds > 0
        throughput = now.timed_steps * self.step_tokens / now.timed_seconds if timed else None
        return {
            **self.task["about"],
            "steps": now.step,
            "tokens": now.tokens,
            "epochs": now.tokens / self.task["about"]["corpus"]["train_tokens"],
            "train_seconds": now.train_seconds,
            "compile_seconds": now.compile_seconds,
            "eval_seconds": now.eval_seconds,
            "tokens_per_second": throughput,
            "best_valid_loss": best,
            "best_valid_bpb": self._bits(best),
            "final_valid_loss": final,
            "target_loss": None,
            "seconds_to_target": None,
            "tokens_to_target": None,
            "peak_memory_bytes": now.peak_memory_bytes,
            "stopped": why,
            "quality": {},
        }

    def _bits(self, loss: float | None) -> float | None:
        factor = self.task["bits_per_nat"]
        return None if loss is None or factor is None else _number(loss * factor)

    def _log(self, kind: str, **values: float | None) -> None:
        now = self.progress
        line = {"kind": kind, "step": now.step, "tokens": now.tokens, "seconds": now.train_seconds}
        line |= {name: _number(value) for name, value in values.items()}
        with (self.folder / "curve.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _cut_curve(self) -> None:
        """Remove the lines that will be written again, and a partial line of a killed run."""
        path, kept = self.folder / "curve.jsonl", ""
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            if not line.endswith("}") or json.loads(line)["step"] > self.progress.step:
                break
            kept += line + "\n"
        replace_file(path, lambda temporary: temporary.write_text(kept, encoding="utf-8"))

    def _save(self) -> None:
        now, training = self.progress, self.training
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
        now.peak_memory_bytes = max(now.peak_memory_bytes, device_memory(self.device) or rss)
        arrays = {f"model.{name}": value.numpy(force=True) for name, value in training.model.state_dict().items()}
        for i, values in training.optimizer.state_dict()["state"].items():
            arrays |= {f"optimizer.{i}.{name}": value.numpy(force=True) for name, value in values.items()}
        arrays["random"] = self._random.get_rng_state().numpy(force=True)
        arrays["progress"] = np.array(json.dumps(asdict(now)))

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, **arrays)

        replace_file(self.folder / "checkpoint.npz", write)

    def _restore(self) -> None:
        with np.load(self.folder / "checkpoint.npz") as stored:
            arrays = dict(stored)
        self.progress = Progress(**json.loads(str(arrays.pop("progress"))))
        self._random.set_rng_state(torch.from_numpy(arrays.pop("random")))
        training, states = self.training, defaultdict[int, dict[str, torch.Tensor]](dict)
        for name, value in arrays.items():
            if name.startswith("optimizer."):
                _, i, field_name = name.split(".")
                states[int(i)][field_name] = torch.from_numpy(value)
        weights = {
            name.removeprefix("model."): torch.from_numpy(value)
            for name, value in arrays.items()
            if name.startswith("model.")
        }
        training.model.load_state_dict(weights)
        groups = training.optimizer.state_dict()["param_groups"]
        training.optimizer.load_state_dict({"state": dict(states), "param_groups": groups})
        training.tokens = self.progress.tokens

    @property
    def _random(self) -> Any:
        """The module with the device's random state: torch, torch.cuda, torch.mps."""
        return torch if self.device == "cpu" else getattr(torch, self.device)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name, sync and rename, so that no reader sees a partial file."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _number(value: float | None) -> float | None:
    """Replace NaN and infinity, which JSON lacks, by None."""
    return value if value is not None and math.isfinite(value) else None


def main(folder: Path) -> int:
    """Train or resume in the folder; returns the exit code."""
    lock = (folder / ".lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            print(f"'{folder}' is being trained by another process: wait for it, or stop it", file=sys.stderr)
            return 2
        print(f"warning: '{folder}' cannot be locked on its file system", file=sys.stderr)
    run = Run(folder)

    def stop(number: int, frame: object) -> None:
        run.interrupted = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    why = run.train()
    if why == "interrupted":
        return INTERRUPTED
    text = json.dumps(run.result(why), indent=2, allow_nan=False) + "\n"
    replace_file(folder / "result.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
