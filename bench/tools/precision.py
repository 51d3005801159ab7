"""Loss in half precision: the same runs in float32, float16 and bfloat16, from the same seeds.

`python -m bench precision --phase 2 --size nano --data stories.txt` trains 200 steps in each, five seeds, and
compares each final validation loss with float32's of the same seed. Nothing is timed: a CPU emulates half precision in
software, and on a GPU `bench.compare --phases 2 2:fp16` times it. Finished runs are reused.
"""

from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from bench import logfile
from bench.compare.runs import RUNS, Finished, Run, execute
from bench.compare.variants import DEFAULT, Variant
from bench.options import Say, TrainFlags, resumable
from bench.workers.machine import describe_machine
from bench.workers.process import end_as_by_ctrl_c
from mlx_transformer.run.flags import File, Size, Text, WholeNumber, parse
from mlx_transformer.train.recipe import DTYPES
from mlx_transformer.utils.errors import RunFailed
from mlx_transformer.utils.terminal import Terminal

STEPS, SEEDS = 200, 5


@dataclass
class Flags(TrainFlags):
    """Compare the validation losses of a phase in float32, float16 and bfloat16."""

    phase: WholeNumber = None
    """phase of the ladder (default: 2)"""
    recipe: Text = None
    """one of the phase's recipes"""
    size: Size = None
    """nano, small, base or auto (default: nano)"""
    steps: WholeNumber = None
    """steps of each run (default: 200)"""
    seeds: WholeNumber = None
    """runs in each precision (default: 5)"""
    out: File = None
    """the JSON log (default: results/bench/precision_phase<n>_<recipe>_<size>.json)"""


def planned(flags: Flags, say: Say) -> dict[str, Run]:
    """Return the run of the first seed by precision. Raises BadInput for what cannot be trained."""
    variant = Variant(phase=flags.phase or 2, recipe=flags.recipe or DEFAULT)
    steps = flags.steps or STEPS
    train = flags.settings(flags.choose("nano"), max_steps=steps, eval_every=steps)
    first, *others = DTYPES
    runs = {first: Run.of(variant, replace(train, dtype=first), say)}
    return runs | {dtype: Run.of(variant, replace(train, dtype=dtype)) for dtype in others}


def measure(runs: dict[str, Run], seeds: range, say: Say) -> dict[str, list[Finished]]:
    """Train, or find, a run per seed, by precision. Raises RunFailed for one that ends without a result."""
    found: dict[str, list[Finished]] = {dtype: [] for dtype in runs}
    for seed in seeds:
        for dtype, run in runs.items():
            finished = execute(run.with_settings(seed=seed), say=say)
            if finished.status != "done":
                raise RunFailed(f"{dtype}, seed {seed}: {finished.error or finished.status}")
            found[dtype].append(finished)
            say(f"{dtype}, seed {seed}: {_final_loss(finished):.4f}")
    return found


def _final_loss(finished: Finished) -> float:
    return finished.evals[-1]["valid_loss"]


def record(run: Run, seeds: range, found: dict[str, list[Finished]]) -> dict[str, Any]:
    """Return the log: final validation losses in nats per token, and their relative difference from float32's."""
    exact = [_final_loss(finished) for finished in found[DTYPES[0]]]
    return {
        "schema_version": 1,
        "measures": "precision",
        "machine": describe_machine(),
        "phase": run.variant.phase,
        "recipe": run.variant.recipe,
        "size": run.plan.size,
        "corpus": {"name": run.plan.corpus.name, "sha256": run.plan.corpus.sha256},
        "steps": run.plan.limits.max_steps,
        "seeds": list(seeds),
        "dtypes": [
            {
                "dtype": dtype,
                "losses": [_final_loss(finished) for finished in own],
                "above": [_final_loss(finished) / loss - 1 for finished, loss in zip(own, exact, strict=True)],
            }
            for dtype, own in found.items()
        ],
    }


def show(log: dict[str, Any]) -> Table:
    """Return a table for people, one row per precision."""
    name = Variant(phase=log["phase"], recipe=log["recipe"]).name
    title = f"{name}, {log['size']}, {log['corpus']['name']}, {log['steps']} steps"
    heads = ("dtype", *(f"seed {seed}" for seed in log["seeds"]), "largest difference from float32")
    table = Table(*heads, title=title, caption="final validation loss, nats per token")
    for one in log["dtypes"]:
        furthest = max(one["above"], key=abs)
        table.add_row(one["dtype"], *(f"{loss:.4f}" for loss in one["losses"]), f"{furthest:+.2%}")
    return table


def main(prog: str = "python -m bench precision", args: list[str] | None = None) -> None:
    """Run the command line."""
    end_as_by_ctrl_c()
    flags = parse(Flags, prog, args=args)
    terminal = Terminal(width=120)
    runs, seeds = planned(flags, terminal.say), range(flags.seeds or SEEDS)
    first = runs[DTYPES[0]]
    name = "_".join(filter(None, (f"phase{first.variant.phase}", flags.recipe, first.plan.size)))
    out = flags.out or RUNS.parent / f"precision_{name}.json"
    if flags.out is None:
        out.parent.mkdir(parents=True, exist_ok=True)  # an old log of this name is replaced
    else:
        logfile.check_out(out)
    with resumable():
        found = measure(runs, seeds, terminal.say)
    log = record(first, seeds, found)
    logfile.write_log(out, log)
    terminal.print(show(log))
    terminal.say(f"written: {out}")
