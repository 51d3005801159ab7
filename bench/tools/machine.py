"""A report on this machine in one file: whether everything computes right here, and how fast.

`python -m bench machine` takes about ten minutes (--quick: about three) and writes results/bench/machines/CHIP.json, as
machine.schema.json describes it:

    parity    20 steps of each phase on the GPU and on the CPU; on a CPU, on all cores and on one
    resume    a run that was stopped and resumed against one that was not
    sizes     phase 1 at nano, small and base on the built-in fables: tokens/s, memory, loss

A part that fails is recorded under `failures`; the others are still measured.
"""

import math
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.table import Table

from bench import logfile
from bench.compare.runs import Run, execute
from bench.compare.variants import Variant
from bench.options import read_names
from bench.tools.roofline import Flags as RooflineFlags
from bench.tools.roofline import chips, find_chip, read_work, spread
from bench.tools.throughput import best_matmul_gflops, make_task
from bench.workers import training_step
from bench.workers.machine import describe_machine, shown_bytes, threads
from bench.workers.process import Worker, end_as_by_ctrl_c, run_to_end, started
from mlx_transformer.backend import device_info, gpu_cores, use_device
from mlx_transformer.nn.config import SIZES
from mlx_transformer.nn.weights import read_weights
from mlx_transformer.run.flags import Device, File, Positive, Switch, Text, parse
from mlx_transformer.run.ladder import find_phase
from mlx_transformer.run.settings import Settings
from mlx_transformer.utils.errors import BadInput, RunFailed
from mlx_transformer.utils.terminal import Terminal

MACHINES = Path("results/bench/machines")
SECONDS, QUICK_SECONDS = 60.0, 10.0  # of training at each size
PHASE, CORPUS = 1, "fables"  # need nothing but this checkout
PHASES = range(1, 7)  # whose step is compared between devices
PARITY_STEPS, RESUME_STEPS = 20, 12
TOLERANCE = 0.01  # nats between the losses of two devices: float32 sums in another order stay far below it
_MEASURED = ("tokens_per_second", "best_valid_loss", "best_valid_bpb", "peak_memory_bytes", "tokens", "train_seconds")
_Part = TypeVar("_Part")


@dataclass
class Flags:
    """Check and measure this machine in about ten minutes, and write one file about it."""

    quick: Switch = False
    """10 s at each size, and phase 1 alone between devices: about three minutes"""
    sizes: Text = None
    """of nano, small, base, with commas (default: all three)"""
    seconds: Positive = None
    """of training at each size (default: 60, as the published table requires)"""
    device: Device = None
    """where to compute (default: auto)"""
    out: File = None
    """the JSON file (default: results/bench/machines/CHIP.json)"""


def slug(chip: str, cores: int | None = None) -> str:
    """Turn a chip's name into a file name: "Apple M1 Max" -> "apple-m1-max"; with 24 of its 32 GPU cores, "...-24"."""
    name = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(\w+\)", "", chip.lower())).strip("-") or "unknown"
    full = chips().get(name.removeprefix("apple-"))
    return name if full is None or cores in (None, full.gpu_cores) else f"{name}-{cores}"


def predicted(chip: str, cores: int | None, size: str) -> tuple[float, float] | None:
    """Predict the least and the most tokens per second by `bench roofline`; None for a chip that it does not know."""
    known = find_chip(slug(chip, cores).removeprefix("apple-"))
    return None if known is None else read_work(RooflineFlags(phase=PHASE, size=size))[1].predict(known)


class Parts:
    """The parts of the report; one that fails is recorded by name."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.failures = say, dict[str, str]()

    def __call__(self, name: str, part: Callable[..., _Part], *args: Any) -> _Part | None:
        """Return part(*args), or None where it raises BadInput or RunFailed."""
        self.say(name)
        try:
            return part(*args)
        except (BadInput, RunFailed) as error:
            self.failures[name] = str(error)
            self.say(f"failed: {error}")
            return None


def step_workers(phase: int, device: str, folder: Path) -> list[Worker]:
    """Return the two workers that train a phase at nano on the same batches, without dropout."""
    task = make_task(phase, "nano", device, dropout=0.0)
    tokens = training_step.text_like((PARITY_STEPS + 1) * task.step_tokens + 1, task.config.vocab_size)
    training_step.lay_out(task, find_phase(phase).Model(task.config), tokens, 1, folder)
    here = training_step.mlx_training("here", task, folder)
    if device_info().backend != "cpu":
        return [here, training_step.mlx_training("cpu", replace(task, device="cpu"), folder)]
    return [here, training_step.mlx_training("cpu", task, folder, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")]


def compare_steps(phase: int, device: str) -> dict[str, Any]:
    """Take PARITY_STEPS steps of a phase in both workers: their losses (nats), and how far apart they are at most."""
    with tempfile.TemporaryDirectory() as folder, started(step_workers(phase, device, Path(folder))) as workers:
        losses = {name: worker.ask(steps=PARITY_STEPS)["losses"] for name, worker in workers.items()}
    apart = [abs(a - b) for a, b in zip(losses["here"], losses["cpu"], strict=True)]
    return {**losses, "max_difference": max(apart) if all(map(math.isfinite, apart)) else None}


def parity(phases: Sequence[int], device: str, attempt: Parts) -> dict[str, Any] | None:
    """Compare steps between the GPU and the CPU, or between all cores of a CPU and one; None where it has only one."""
    on_cpu = device_info().backend == "cpu"
    if on_cpu and threads() == 1:
        return None
    found = {str(n): attempt(f"parity of phase {n}", compare_steps, n, device) for n in phases}
    apart = [one["max_difference"] for one in found.values() if one]
    return {
        "here": f"{threads()} threads" if on_cpu else "gpu",
        "cpu": "1 thread" if on_cpu else "cpu",
        "size": "nano",
        "steps": PARITY_STEPS,
        "tolerance": TOLERANCE,
        "agrees": bool(apart) and all(one is not None and one <= TOLERANCE for one in apart),
        "phases": {n: one for n, one in found.items() if one},
    }


def resume(device: str, *more: str) -> dict[str, Any]:
    """Compare the weights of a run that was stopped halfway and resumed with those of one that was not.

    more: further flags of the runs. Raises RunFailed if one of them fails.
    """
    flags = [
        *more,
        "--size",
        "nano",
        "--data",
        CORPUS,
        "--stories",
        "500",
        "--device",
        device,
        "--eval-every",
        "5",
        "--quiet",
    ]
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = (str(Path(folder, name)) for name in ("whole", "parts"))
        for line in (
            [*flags, "--max-steps", str(RESUME_STEPS), "--out", whole],
            [*flags, "--max-steps", str(RESUME_STEPS // 2), "--out", parts],
            ["--resume", parts, "--max-steps", str(RESUME_STEPS), "--quiet"],
        ):
            if (ended := run_to_end(["-m", f"phases.phase{PHASE}", *line])).code:
                raise RunFailed(f"phase {PHASE} with {' '.join(line[:-1])}: {ended.reason}")
        one, other = (read_weights(Path(place, "model")) for place in (whole, parts))
        apart = float(np.max([np.abs(np.array(value) - np.array(other[name])).max() for name, value in one.items()]))
    return {
        "steps": RESUME_STEPS,
        "resumed_at": RESUME_STEPS // 2,
        "bit_for_bit": apart == 0,
        "max_difference": apart if math.isfinite(apart) else None,
    }


def train(size: str, seconds: float, device: str, folder: Path) -> dict[str, Any]:
    """Train in the folder; the run's result.json. Raises RunFailed with the run's last words."""
    flags = Settings(size=size, data=CORPUS, max_seconds=seconds, device=device)
    finished = execute(Run.of(Variant(phase=PHASE), flags), folder)
    if finished.status != "done" or finished.result is None:
        raise RunFailed(f"phase {PHASE} at {size}: {finished.error or finished.status}")
    return finished.result


def describe_run(result: dict[str, Any], chip: str, cores: int | None, size: str) -> dict[str, Any]:
    """Return what the report keeps of a result.json."""
    return {
        **{name: result[name] for name in (*_MEASURED, "stopped")},
        "predicted_tokens_per_second": predicted(chip, cores, size),
        "parameters": result["parameters"]["total"],
        "batch_tokens": result["recipe"]["batch_tokens"],
        "seq_len": result["config"]["seq_len"],
    }


def report(
    sizes: Sequence[str], seconds: float, phases: Sequence[int], device: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Check and measure everything; the JSON."""
    chip, cores, attempt, start = device_info().name, gpu_cores(), Parts(say), time.monotonic()
    log = {
        "schema_version": 2,
        "chip": chip,
        "gpu_cores": cores,
        **describe_machine(),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": seconds,
        "matmul_gflops": best_matmul_gflops(),
        "parity": parity(phases, device, attempt),
        "resume": attempt("a resumed run", resume, device),
        "resume_deterministic": None,
    }
    if device_info().backend != "cpu":  # on a CPU every run is deterministic
        log["resume_deterministic"] = attempt("a resumed run, --deterministic", resume, device, "--deterministic")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            results[size] = attempt(f"training at {size}", train, size, seconds, device, Path(folder))
    trained = {size: result for size, result in results.items() if result}
    corpus = next((result["corpus"] for result in trained.values()), None)
    return log | {
        "corpus": corpus and {"name": corpus["name"], "sha256": corpus["sha256"]},
        "sizes": {size: describe_run(result, chip, cores, size) for size, result in trained.items()},
        "failures": attempt.failures,
        "minutes": (time.monotonic() - start) / 60,
    }


def show(log: dict[str, Any]) -> Table:
    """Return a table for people."""
    caption = f"{log['device']}; a float32 matmul of 2048 x 2048: {log['matmul_gflops']:,.0f} GFLOP/s"
    heads = ("size", "tokens/s", "predicted", "parameters", "memory", "best validation loss")
    table = Table(*heads, title=f"phase {PHASE} on {CORPUS}, {log['seconds']:g} s each", caption=caption)
    for size, one in log["sizes"].items():
        measured, guess, loss = (
            one[name] for name in ("tokens_per_second", "predicted_tokens_per_second", "best_valid_loss")
        )
        table.add_row(
            size,
            "fewer than 10 steps" if measured is None else f"{measured:,.0f}",
            "" if guess is None else spread(*guess),
            f"{one['parameters']:,}",
            shown_bytes(one["peak_memory_bytes"]),
            "" if loss is None else f"{loss:.3f}",
        )
    return table


def summary(log: dict[str, Any]) -> str:
    """Return the report in one line, to paste."""
    cores = f", {log['gpu_cores']} GPU cores" if log["gpu_cores"] else ""
    parts = [f"{log['chip']}{cores}, {log['memory_bytes'] / 2**30:.0f} GiB"]
    rates = {size: one["tokens_per_second"] for size, one in log["sizes"].items()}
    parts += [f"{size} {rate:,.0f} tokens/s" for size, rate in rates.items() if rate]
    if both := log["parity"]:
        apart = [one["max_difference"] for one in both["phases"].values()]
        figure = "not finite" if None in apart or not apart else f"{max(apart):.1e} nats apart"
        verdict = "agree" if both["agrees"] else "DISAGREE"
        parts.append(f"{both['here']} and {both['cpu']} {verdict} ({figure} in {both['steps']} steps)")
    for key, name in (("resume", "resumed run"), ("resume_deterministic", "with --deterministic")):
        if again := log[key]:
            equal = "bit for bit" if again["bit_for_bit"] else f"up to {again['max_difference']}"
            parts.append(f"{name} equal {equal}")
    parts += [f"FAILED: {', '.join(log['failures'])}"] if log["failures"] else []
    return "; ".join([*parts, f"mlx {log['versions']['mlx']}, {log['system']}, {log['commit']}"])


def main(prog: str = "python -m bench machine", args: list[str] | None = None) -> None:
    """Run the command line."""
    end_as_by_ctrl_c()
    flags = parse(Flags, prog, args=args)
    sizes, device = read_names("--sizes", flags.sizes, list(SIZES), list(SIZES)), flags.device or "auto"
    seconds = flags.seconds or (QUICK_SECONDS if flags.quick else SECONDS)
    out = flags.out or MACHINES / f"{slug(use_device(device).name, gpu_cores())}.json"
    logfile.check_out(out)
    terminal = Terminal(width=120)
    terminal.print(f"{device_info().describe()}: leave the machine idle otherwise")
    log = report(sizes, seconds, list(PHASES[:1] if flags.quick else PHASES), device, terminal.print)
    logfile.write_log(out, log)
    terminal.print(show(log))
    terminal.print(f"\n{summary(log)}\n", soft_wrap=True, highlight=False)
    whole = seconds == SECONDS and set(log["sizes"]) == set(SIZES)
    place = " or, for the published table, add it to results/published/machines/ in a pull request" if whole else ""
    terminal.print(f"{out}: send this file with the line above{place}", soft_wrap=True)
    if log["failures"]:
        raise RunFailed(f"{'; '.join(log['failures'])}: see failures in {out}, and send it anyway")
