"""Training over ranks on this machine: what each keeps in memory, and what a killed run loses.

`python -m bench distributed memory --out FILE.json` trains for a few steps in one process, over ranks, and over ranks
with `--shard optimizer`, and takes the memory of each rank from result.json.

`python -m bench distributed kill --out FILE.json` trains tiny models. It kills a random rank (SIGKILL) at random
moments, resumes on the same number of ranks and in one process, and compares with a run that was never stopped.
"""

import json
import random
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import logfile
from bench.workers import ring
from bench.workers.machine import describe_machine, shown_bytes
from mlx_transformer.run.commands import dispatch
from mlx_transformer.run.flags import File, Seed, Shard, Size, WholeNumber, parse
from mlx_transformer.run.settings import SETTINGS
from mlx_transformer.train.checkpoint import list_checkpoints, step_of
from mlx_transformer.train.sharding import OPTIMIZER
from mlx_transformer.utils.errors import BadInput, RunFailed
from mlx_transformer.utils.terminal import Terminal

_TINY = ("--size", "nano", "--d-model", 32, "--n-layers", 2, "--n-heads", 4, "--d-ff", 64, "--seq-len", 32)
_TEXT = ("--data", "fables", "--stories", 400, "--vocab-size", 512)


@dataclass
class MemoryFlags:
    """Measure the memory of each rank: in one process, over ranks, and with a sharded optimizer."""

    phase: WholeNumber = None
    """phase (default: 5)"""
    size: Size = None
    """nano, small or base (default: small)"""
    ranks: WholeNumber = None
    """number of ranks (default: 4)"""
    batch_size: WholeNumber = None
    """sequences per step (default: 8)"""
    steps: WholeNumber = None
    """steps of a run (default: 8)"""
    out: File = None
    """write everything that was measured to this JSON file"""


@dataclass
class KillFlags:
    """Kill a random rank of tiny runs at random moments, resume them, and compare."""

    phase: WholeNumber = None
    """phase (default: 5)"""
    ranks: WholeNumber = None
    """number of ranks (default: 2)"""
    shard: Shard = None
    """optimizer: its state is divided among the ranks (default: none)"""
    moments: WholeNumber = None
    """how many runs are killed, one rank of each (default: 10)"""
    steps: WholeNumber = None
    """steps of a run (default: 400)"""
    seed: Seed = None
    """seed of the moments and ranks (default: 0)"""
    out: File = None
    """write everything that was measured to this JSON file"""


def measure_memory(flags: MemoryFlags) -> dict[str, Any]:
    """Measure the memory of each rank; the log."""
    size, ranks = flags.size or "small", flags.ranks or 4
    command = [
        *("-m", f"phases.phase{flags.phase or 5}", "--size", size, "--batch-size", flags.batch_size or 8),
        *("--max-steps", flags.steps or 8, "--data", "fables", "--stories", 400, "--quiet", "--device", "cpu"),
    ]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count, shard in ((1, "none"), (ranks, "none"), (ranks, OPTIMIZER)):
            out = Path(folder) / f"{count}_{shard}"
            ring.run([*command, "--shard", shard, "--out", out], count)
            result = json.loads((out / "result.json").read_text())
            alone = {"peak_memory_bytes": [result["peak_memory_bytes"]]}
            rows.append({"ranks": count, "shard": shard, **(alone if count == 1 else result["ranks"])})
            facts = {name: result[name] for name in ("phase", "size", "steps", "config", "parameters", "recipe")}
    log = {"schema_version": 1, "measures": "distributed memory", "machine": describe_machine(), **facts, "runs": rows}
    return {**log, "command": [str(word) for word in command]}


def show_memory(log: dict[str, Any]) -> Table:
    """Return a table for people."""
    title = f"phase {log['phase']}, {log['size']}, {log['parameters']['total']:,} parameters: largest memory of a rank"
    table = Table(
        "ranks", "sharded", "weights", "optimizer state", "peak", title=title, caption=log["machine"]["device"]
    )
    for row in log["runs"]:
        names = ("weights_bytes", "optimizer_bytes", "peak_memory_bytes")
        table.add_row(str(row["ranks"]), row["shard"], *(shown_bytes(max(row[n])) if n in row else "" for n in names))
    return table


def measure_kills(flags: KillFlags, terminal: Terminal) -> dict[str, Any]:
    """Kill ranks at random moments, resume, compare; the log. Raises RunFailed where a resumed run differs."""
    shard, ranks, draw = flags.shard or "none", flags.ranks or 2, random.Random(flags.seed or 0)
    if ranks < 2:
        raise BadInput(f"--ranks {ranks}: expected at least 2, of which one is killed")
    phase = ("-m", f"phases.phase{flags.phase or 5}")
    new = [*phase, *_TINY, *_TEXT, "--dropout", 0, "--device", "cpu", "--quiet", "--shard", shard]
    new += ["--batch-size", 8, "--eval-every", 50, "--save-every", 20]
    new += ["--max-steps", flags.steps or 400]
    moments: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        ring.run([*new, "--out", Path(name) / "first"], ranks)  # prepares the text, compiles
        began = time.monotonic()
        ring.run([*new, "--out", whole], ranks)
        lasts = time.monotonic() - began
        folder = Path(name) / "killed"
        while len(moments) < (flags.moments or 10):
            shutil.rmtree(folder, ignore_errors=True)
            second, rank = draw.uniform(0.2, 1.0) * lasts, draw.randrange(ranks)
            moment = _kill([*new, "--out", folder / "same"], ranks, second, rank)
            if moment["finished"]:  # faster than the run that was not stopped: too late
                continue
            folder.mkdir(exist_ok=True)
            if (folder / "same").exists():
                shutil.copytree(folder / "same", folder / "other")
            for place, count in (("same", ranks), ("other", 1)):
                there = (folder / place / SETTINGS).exists()
                resume = [*phase, "--quiet", "--resume", folder / place]
                ring.run(resume if there else [*new, "--out", folder / place], count)
                moment[f"{place}_number_of_ranks"] = _compare(folder / place, whole)
            moments.append(moment)
            terminal.say(
                f"{len(moments)}: {moment['said'] or 'the others had ended'}; {moment['same_number_of_ranks']}"
            )
        steps = len(_losses(whole))
    return {
        "schema_version": 1,
        "measures": "distributed kills",
        "machine": describe_machine(),
        "command": [str(word) for word in new],
        "ranks": ranks,
        "shard": shard,
        "seconds": lasts,
        "compared_losses": steps,
        "moments": moments,
    }


def _kill(command: list[object], ranks: int, second: float, rank: int) -> dict[str, Any]:
    """Start ranks, kill one after so many seconds, and wait for the others; describe what came of it."""
    with ring.started(command, ranks) as own:
        time.sleep(second)
        finished = own.processes[rank].poll() is not None
        own.processes[rank].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        left = [other for other in range(ranks) if other != rank]
        codes = own.wait(left)
        waited = time.monotonic() - killed
        said = next((line for other in left if (line := own.said(other))), "")
    over = codes == [0] * len(left)  # for the others, while rank 0 wrote the results
    if not finished and codes != [1] * len(left) and not (rank == 0 and over):
        raise RunFailed(f"rank {rank} was killed after {second:.2f} s, and the others ended with {codes}: {said}")
    saved = list_checkpoints(Path(str(command[-1])) / "checkpoints")
    return {
        "second": second,
        "rank": rank,
        "finished": finished,
        "said": said,
        "ended_after_seconds": waited,
        "checkpoint_step": step_of(saved[-1]) if saved else 0,
    }


def _losses(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "curve.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "log"}


def _compare(folder: Path, whole: Path) -> dict[str, Any]:
    """Compare the losses and the weights of a resumed run with those of one that was never stopped."""
    own, expected = _losses(folder), _losses(whole)
    if own.keys() != expected.keys():
        raise RunFailed("the resumed run has other steps than the one that was never stopped")
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (folder, whole)]
    return {
        "losses_are_equal": own == expected,
        "weights_are_equal": all(a == b for a, b in pairwise(weights)),
        "largest_relative_difference": max(abs(own[step] / expected[step] - 1) for step in expected),
    }


def show_kills(log: dict[str, Any]) -> Table:
    """Return a table for people."""
    title = f"{log['ranks']} ranks, shard {log['shard']}: killed, resumed, and compared with a run never stopped"
    table = Table("second", "rank", "checkpoint", "all ended after", "same ranks", "one process", title=title)
    for moment in log["moments"]:
        same, other = moment["same_number_of_ranks"], moment["other_number_of_ranks"]
        equal = "bit for bit" if same["losses_are_equal"] and same["weights_are_equal"] else "differs"
        table.add_row(
            *(f"{moment['second']:.1f}", str(moment["rank"]), str(moment["checkpoint_step"])),
            *(f"{moment['ended_after_seconds']:.1f} s", equal, f"{other['largest_relative_difference']:.0e}"),
        )
    return table


def memory(prog: str, args: list[str]) -> None:
    """Run the command line of `memory`."""
    flags = parse(MemoryFlags, prog, args=args)
    logfile.check_out(flags.out)
    log = measure_memory(flags)
    logfile.write_log(flags.out, log)
    Terminal(width=120).print(show_memory(log))


def kill(prog: str, args: list[str]) -> None:
    """Run the command line of `kill`."""
    flags, terminal = parse(KillFlags, prog, args=args), Terminal(width=120)
    logfile.check_out(flags.out)
    log = measure_kills(flags, terminal)
    logfile.write_log(flags.out, log)
    terminal.print(show_kills(log))


def main(prog: str = "python -m bench distributed", args: list[str] | None = None) -> None:
    """Run the command line."""
    tools = {
        "memory": (f"{__name__}:memory", "memory of each rank, with and without a sharded optimizer"),
        "kill": (f"{__name__}:kill", "ranks killed at random moments, resumed, and compared"),
    }
    dispatch(tools, prog, args)
