"""Does an idea pay on this machine? `python -m bench.compare --phases 1 2`: throughput and time to a target loss.

Every variant (a phase, a branch, a recipe, your own file, and each again in PyTorch) is trained from several seeds,
each run in a process of its own; then all take training steps interleaved, for their throughput. Finished runs are kept
and found again (runs.py), so that a repeated command resumes. Results: compare.json, compare.md, compare.html and
plots; docs/COMPARE.md says what the figures mean.
"""

import math
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Column, Table

from bench.compare import outputs
from bench.compare.comparison import begin, compare, find_folder
from bench.compare.forecast import added, describe_range, forecast
from bench.compare.record import Comparison
from bench.compare.runs import RUNS, Run, find_finished, has_checkpoint, missing_references
from bench.compare.variants import BACKENDS, Variant, ablation, own_value, read_variants, read_vary
from bench.options import BUDGETS, SEEDS, Say, TrainFlags
from bench.workers.machine import ROOT, check_torch, has_torch
from bench.workers.process import end_as_by_ctrl_c
from mlx_transformer.run.flags import (
    Extent,
    Folder,
    Number,
    Positive,
    Switch,
    Text,
    WholeNumber,
    parse,
)
from mlx_transformer.run.settings import Settings
from mlx_transformer.utils.errors import BadInput, Interrupted, RunFailed
from mlx_transformer.utils.files import as_bad_input
from mlx_transformer.utils.terminal import Terminal
from mlx_transformer.utils.text import plural

QUICK_SEEDS, QUICK_TOKENS = 2, 200_000
EVALUATIONS, QUICK_EVALUATIONS = 10, 5  # at least, within a budget: a target is reached between two of them
_REFERENCES = {"none": (), "torch": BACKENDS[1:2], "torch-compile": BACKENDS[1:]}

Phases = Annotated[tuple[str, ...], tyro.conf.arg(metavar="PHASE", help_behavior_hint="")]


@dataclass
class Flags(TrainFlags):
    """Compare phases of the ladder and your own ideas: throughput and time to a target loss, against PyTorch."""

    phases: Phases = ()
    """such as 2, 3/BRANCH, 2:RECIPE, my_idea.py, 5:my_idea.py:RECIPE; compared with the lowest phase; one given twice
    is run twice (default: every phase)"""
    ablate: Switch = False
    """compare every branch and recipe of the one phase given with the phase"""
    vary: Text = None
    """a number of the configuration or the recipe and its values, such as d_ff=128,256,512, for the one phase given"""
    reference: Text = None
    """torch, torch-compile (torch and torch.compile) or none (default: torch if it is installed)"""
    seeds: WholeNumber = None
    """runs of each variant (default: 5)"""
    target: Text = None
    """a validation loss in nats per token, or auto: what every seed of the lowest phase reaches (default: auto)"""
    stories: WholeNumber = None
    """stories or documents to train on"""
    dropout: Number = None
    """dropout rate, the same for all (default: each phase's own)"""
    n_layers: Extent = None
    """number of blocks, the same for all (default: by size)"""
    learning_rate: Positive = None
    """peak learning rate, the same for all (default: each recipe's own)"""
    max_tokens: WholeNumber = None
    """training tokens of a run; it cuts a schedule, and does not shrink it (default: 2M at nano, 5M at small, 20M at
    base)"""
    two_budgets: Switch = False
    """train for twice the budget, and compare at two budgets too"""
    quick: Switch = False
    """a rough answer in minutes: nano, 2 seeds, a small budget"""
    plan: Switch = False
    """print what would run and how long it would take, and run nothing"""
    out: Folder = None
    """folder of the results (default: results/bench/<time>)"""


def read(flags: Flags, say: Say) -> Comparison:
    """Make and check every choice; nothing is written but caches. Raises BadInput."""
    backends = _backends(flags.reference)
    target = _target(flags.target)
    if target is not None and flags.two_budgets:
        raise BadInput(f"--two-budgets and --target {flags.target} exclude each other: two budgets have two targets")
    if flags.ablate and flags.vary:
        raise BadInput(f"--ablate and --vary {flags.vary} exclude each other: give one of them")
    size = flags.choose("nano" if flags.quick else None)
    variants = read_variants(flags.phases or tuple(map(str, present_phases())))
    only = _only(flags, variants) if flags.ablate or flags.vary else None
    budget = flags.max_tokens or (QUICK_TOKENS if flags.quick else BUDGETS[size])
    given = {name: getattr(flags, name) for name in ("stories", "dropout", "n_layers", "learning_rate")}
    train = flags.settings(size, max_tokens=budget * (2 if flags.two_budgets else 1), seed=0, **given)
    runs = _plan_runs(variants, only, flags, train, say)
    interval = budget // (QUICK_EVALUATIONS if flags.quick else EVALUATIONS)
    return Comparison(
        by_variant=_with_references([_evaluated_often(run, interval) for run in runs], backends, only, flags, say),
        seeds=range(flags.seeds or (QUICK_SEEDS if flags.quick else SEEDS)),
        budget=budget,
        target=target,
        shares=(1.0,) if target is not None else (0.5, 1.0, 2.0) if flags.two_budgets else (0.5, 1.0),
        quick=flags.quick,
        ablated=only if flags.ablate else None,
    )


def present_phases() -> list[int]:
    """Return the numbers of the ladder's phases."""
    return [n for n in range(1, 7) if (ROOT / "phases" / f"phase{n}.py").is_file()]


def _only(flags: Flags, variants: list[Variant]) -> Variant:
    """Return the one variant to ablate or to vary. Raises BadInput for several, and for an ablation of a branch."""
    flag = "--ablate" if flags.ablate else f"--vary {flags.vary}"
    plain = not flags.ablate or variants[0] == Variant(phase=variants[0].phase)
    if not flags.phases or len(variants) != 1 or not plain:
        names = ", ".join(variant.name for variant in variants)
        raise BadInput(f"{flag} with {names}: expected one phase, such as --phases 3")
    return variants[0]


def _plan_runs(variants: list[Variant], only: Variant | None, flags: Flags, train: Settings, say: Say) -> list[Run]:
    """Plan a run of each variant, the baseline first. The text is announced once."""
    if flags.ablate and only is not None:
        variants = ablation(only, say)
    if flags.vary is None or only is None:
        first, *others = variants
        return [Run.of(first, train, say), *(Run.of(variant, train) for variant in others)]
    name, values = read_vary(flags.vary, only)
    if getattr(flags, name, None) is not None:
        raise BadInput(f"--{name.replace('_', '-')} and --vary {flags.vary} exclude each other: give one of them")
    plan = Run.of(only, train, say).plan
    own = own_value(name, plan.config, plan.recipe)
    values = sorted(values, key=lambda value: value != own)  # the phase's own value is the baseline if it is given
    return [Run.of(replace(only, change=(name, value)), train) for value in values]


def _backends(reference: str | None) -> tuple[str, ...]:
    if reference is None:
        return _REFERENCES["torch" if has_torch() else "none"]
    if reference not in _REFERENCES:
        raise BadInput(f"--reference {reference!r}: expected one of {', '.join(_REFERENCES)}")
    if reference != "none":
        check_torch()
    return _REFERENCES[reference]


def _target(text: str | None) -> float | None:
    if text is None or text == "auto":
        return None
    try:
        loss = float(text)
    except ValueError:
        loss = math.nan
    if not 0 < loss < math.inf:
        raise BadInput(f"--target {text!r}: expected auto, or a validation loss above 0")
    return loss


def _evaluated_often(run: Run, interval: int) -> Run:
    """Return the run with an evaluation at least every `interval` tokens: the recipe's own if they are as frequent."""
    most = max(1, interval // run.step_tokens)
    return run if run.evaluate_every <= most else run.with_settings(eval_every=most)


def _with_references(
    runs: list[Run], backends: tuple[str, ...], only: Variant | None, flags: Flags, say: Say
) -> list[list[Run]]:
    """Return each run followed by its references; with --ablate or --vary those of the phase itself alone.

    Raises BadInput if a reference was asked for and nothing has one.
    """
    matching = [run for run in runs if only is None or replace(run.variant, change=None) == only]
    candidates = matching if only is None else matching[:1]
    missing = missing_references(candidates) if backends else ["" for _ in candidates]
    if flags.reference is not None and backends and all(missing):
        raise BadInput(f"--reference {flags.reference}: {missing[0]}; give --reference none")
    by_variant = {run.variant: [run] for run in runs}
    for run, reason in zip(candidates, missing, strict=True):
        if reason is None:
            references = [replace(run.variant, backend=name) for name in backends]
            by_variant[run.variant] += [replace(run, variant=reference) for reference in references]
        elif reason:
            say(f"{run.variant.name} has no reference in PyTorch: {reason}")
    return list(by_variant.values())


def plan_table(comparison: Comparison, cache: Path) -> Table:
    """List what would run, and how long it would take."""
    parameters = begin(comparison).parameters
    heads = ("parameters", "finished", "begun", "to run", "about")
    table = Table(Column("variant", overflow="fold"), *heads, title="planned runs")
    total = 0.0, 0.0
    for run in comparison.runs:
        runs = [run.with_settings(seed=seed) for seed in comparison.seeds]
        finished = sum(find_finished(one, cache).status != "missing" for one in runs)
        begun = sum(has_checkpoint(one, cache) for one in runs)
        name = run.variant.name
        seconds = added(*(forecast(one, parameters[name], cache) for one in runs))
        total = added(total, seconds)
        counts = (finished, begun, len(runs) - finished - begun)
        table.add_row(name, f"{parameters[name]:,}", *map(str, counts), describe_range(*seconds))
    most = f"at most {comparison.runs[0].plan.limits.max_tokens:,} tokens a run"
    table.caption = f"{most}; {describe_range(*total)} in all, and some minutes for the throughput"
    return table


def main(prog: str = "python -m bench.compare", args: list[str] | None = None) -> None:
    """Run the command line."""
    end_as_by_ctrl_c()
    flags = parse(Flags, prog, args=args)
    terminal = Terminal()
    comparison = read(flags, terminal.say)
    folder = find_folder(comparison, flags.out)
    terminal.print(plan_table(comparison, RUNS))
    if flags.plan:
        return
    with as_bad_input(folder):
        folder.mkdir(parents=True, exist_ok=True)
    terminal.say(f"results go to {folder}; runs are kept in {RUNS} for later comparisons too")
    try:
        log = compare(comparison, folder, RUNS, terminal.say)
    except KeyboardInterrupt:
        out = [] if flags.out else [f"--out={folder}"]
        line = shlex.join([*prog.split(), *(sys.argv[1:] if args is None else args), *out])
        raise Interrupted(f"saved; resume with: {line}") from None
    except OSError as error:
        raise RunFailed(f"could not write to '{folder}': {error}; the same command resumes") from error
    outputs.show(log, terminal)
    terminal.say(f"results: {folder / 'compare.html'}")
    _check_failures(log)


def _check_failures(log: dict[str, Any]) -> None:
    """Raise RunFailed, once everything is written, if a run failed."""
    failed = [run for run in log["runs"] if run["status"] == "failed"]
    if failed:
        which = "; ".join(f"{run['name']}, seed {run['seed']}: {run['error']}" for run in failed[:3])
        count = f"{len(failed)} of {plural(len(log['runs']), 'run')}"
        raise RunFailed(f"{count} failed ({which}); the same command tries them again")
