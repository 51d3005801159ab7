"""Does an idea pay, on this machine? `python -m bench.compare --phases 1 2`: tokens per second and time to target.

Every contender (a phase, a branch, a recipe, and each again in PyTorch) is trained from several seeds, each run in a
process of its own; then all make training steps in turn, for tokens per second. Finished runs are kept and found again
(bench/plan.py), so that the same command goes on where it stopped. What was found is in compare.json, compare.md,
compare.html and pictures; what the numbers mean is said in docs/COMPARE.md.
"""

import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import tyro
from rich.console import Console as Terminal
from rich.table import Column, Table

from bench.compare import outputs, plan, rates
from bench.compare.plan import BACKENDS, DEFAULT, Finished, Run, Variant
from bench.compare.record import Comparison, Record
from bench.options import BUDGETS, SEEDS
from bench.workers.machine import ROOT, check_torch, describe_machine, has_torch
from bench.workers.process import end_as_by_ctrl_c
from mlx_transformer.backend import device_info, use_device
from mlx_transformer.nn.config import choose_size
from mlx_transformer.run.flags import (
    Device,
    Extent,
    Folder,
    Number,
    Place,
    Positive,
    Size,
    Switch,
    Text,
    WholeNumber,
    parse,
)
from mlx_transformer.run.ladder import find_phase
from mlx_transformer.run.result import known_before
from mlx_transformer.run.settings import Settings
from mlx_transformer.utils.errors import BadInput, Interrupted, RunFailed
from mlx_transformer.utils.files import as_bad_input, check_place, write_json

RESULTS = Path("results/bench")
QUICK_SEEDS, QUICK_TOKENS = 2, 200_000
EVALUATIONS, QUICK_EVALUATIONS = 10, 5  # of a budget, at least: a target is met between two of them
_ROUNDS, _ROUND_SECONDS = 8, 2.0
_QUICK_ROUNDS, _QUICK_ROUND_SECONDS = 3, 0.5
_REFERENCES = {"none": (), "torch": BACKENDS[1:2], "torch-compile": BACKENDS[1:]}
_IDENTITY, _RATES, _PARITY = "comparison.json", "rates.json", "parity.json"

Say = Callable[[str], None]
Phases = Annotated[tuple[str, ...], tyro.conf.arg(metavar="PHASE", help_behavior_hint="")]


@dataclass
class Flags:
    """Compare phases of the ladder: tokens per second and time to a target loss, against PyTorch."""

    phases: Phases = ()
    """such as 2, 3/BRANCH, 2:RECIPE; compared with the lowest; one given twice is run twice (default: every phase)"""
    ablate: Switch = False
    """compare every branch and recipe of the one phase given with its trunk"""
    reference: Text = None
    """torch, torch-compile (torch and torch.compile) or none (default: torch if it is installed)"""
    seeds: WholeNumber = None
    """runs of each contender (default: 5)"""
    target: Text = None
    """a validation loss in nats per piece, or auto: what every seed of the lowest reaches (default: auto)"""
    size: Size = None
    """nano, small or base (default: small on a CPU, base on a GPU)"""
    data: Place = None
    """auto, fables, tinystories, or a UTF-8 text file (default: auto)"""
    valid: Place = None
    """validation text file (default: the end of --data)"""
    stories: WholeNumber = None
    """how many stories or documents to train on"""
    device: Device = None
    """where to compute (default: auto)"""
    dropout: Number = None
    """share of activations dropped, the same for all (default: each phase's own)"""
    n_layers: Extent = None
    """blocks, the same for all (default: by size)"""
    learning_rate: Positive = None
    """the peak, the same for all (default: each recipe's own)"""
    max_tokens: WholeNumber = None
    """the budget of a run; it cuts, and does not shrink, a schedule (default: 2M at nano, 5M at small, 20M at base)"""
    two_budgets: Switch = False
    """train for twice the budget, and compare at two budgets too"""
    quick: Switch = False
    """a rough answer in minutes: nano, 2 seeds, a small budget"""
    plan: Switch = False
    """print what would run and how long it would take, and run nothing"""
    out: Folder = None
    """the folder of the results (default: results/bench/<time>)"""


def read(flags: Flags, say: Say) -> Comparison:
    """Every choice made and checked, nothing written but caches. Raises BadInput."""
    backends = _backends(flags.reference)
    aim = _target(flags.target)
    if aim is not None and flags.two_budgets:
        raise BadInput(f"--two-budgets and --target {flags.target} exclude each other: two budgets have two targets")
    use_device(flags.device or "auto")
    names = _variants(flags, say)
    size = choose_size(flags.size or ("nano" if flags.quick else None))
    budget = flags.max_tokens or (QUICK_TOKENS if flags.quick else BUDGETS[size])
    asked = {
        name: getattr(flags, name)
        for name in ("data", "valid", "stories", "device", "dropout", "n_layers", "learning_rate")
    }
    train = Settings(size=size, max_tokens=budget * (2 if flags.two_budgets else 1), seed=0, **asked)
    interval = budget // (QUICK_EVALUATIONS if flags.quick else EVALUATIONS)
    runs: list[Run] = []
    for name in names:
        runs.append(_evaluated_often(Run.of(name, train, (lambda text: None) if runs else say), interval))
    return Comparison(
        families=_with_references(runs, backends, flags, say),
        seeds=range(flags.seeds or (QUICK_SEEDS if flags.quick else SEEDS)),
        budget=budget,
        target=aim,
        shares=(1.0,) if aim is not None else (0.5, 1.0, 2.0) if flags.two_budgets else (0.5, 1.0),
        quick=flags.quick,
        trunk=_trunk(flags),
    )


def _variants(flags: Flags, say: Say) -> list[Variant]:
    """The baseline, which is the lowest phase's trunk, then the others; a name that comes again is a copy.

    With --ablate all that the one phase has. Raises BadInput for what is not there.
    """
    given = [Variant.read(text) for text in flags.phases or map(str, present_phases())]
    if flags.ablate:
        return _ablation(given, say)
    named = [replace(one, copy=1 + given[:i].count(one)) for i, one in enumerate(given)]
    return sorted(named, key=lambda one: one != min(named, key=_height))


def _height(variant: Variant) -> tuple[Any, ...]:
    return variant.phase, variant.branch is not None, variant.recipe != DEFAULT, variant.copy


def _trunk(flags: Flags) -> Variant | None:
    """Of an ablation."""
    return Variant.read(flags.phases[0]) if flags.ablate else None


def _ablation(given: list[Variant], say: Say) -> list[Variant]:
    """The trunk, each branch, each recipe; before them the phase before, where an idea stands alone on top of it."""
    trunk = given[0]
    if given != [Variant(phase=trunk.phase)]:
        raise BadInput(f"--ablate with {', '.join(one.name for one in given)}: expected one phase, such as --phases 3")
    module, before = find_phase(trunk.phase), f"phase_{trunk.phase - 1}"
    ideas = [replace(trunk, branch=name) for name in module.BRANCHES if name != before]
    ideas += [
        replace(trunk, recipe=name) for name in module.RECIPES if name != before and not _emulated(name, module, say)
    ]
    if not ideas:
        raise BadInput(f"phase {trunk.phase} has no branch or recipe to ablate: give --phases with another")
    alone = [Variant(phase=trunk.phase - 1)] if any(idea.is_alone for idea in ideas) else []
    return [*alone, trunk, *(_as_before(idea, module, before) if idea.is_alone else idea for idea in ideas)]


def _emulated(recipe: str, module: ModuleType, say: Say) -> bool:
    """Whether it computes in halves of a float32, which no CPU does but in software: its times would say nothing."""
    emulated = device_info().backend == "cpu" and module.RECIPES[recipe].dtype != "float32"
    if emulated:
        say(f"left out on a CPU, which computes {module.RECIPES[recipe].dtype} in software: recipe {recipe}")
    return emulated


def _as_before(idea: Variant, module: ModuleType, before: str) -> Variant:
    """An idea that stands alone takes all else from the phase before, where this one keeps that under its name."""
    if idea.branch is None and before in module.BRANCHES:
        return replace(idea, branch=before)
    return replace(idea, recipe=before) if idea.recipe == DEFAULT and before in module.RECIPES else idea


def present_phases() -> list[int]:
    """Those of the ladder that are there."""
    return [n for n in range(1, 7) if (ROOT / "phases" / f"phase{n}.py").is_file()]


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
    """The run with an evaluation every so many tokens at least: the recipe's own where they are as dense."""
    most = max(1, interval // run.step_tokens)
    return run if run.evaluate_every <= most else run.with_settings(eval_every=most)


def _with_references(runs: list[Run], backends: tuple[str, ...], flags: Flags, say: Say) -> list[list[Run]]:
    """Each run followed by its references: in an ablation the trunk's alone, since the ideas are what is compared.

    Raises BadInput if a reference was asked for and nothing has one.
    """
    trunk = _trunk(flags)
    asked = [run for run in runs if trunk in (None, run.variant)]
    lacking = plan.lacks_reference(asked) if backends else ["" for _ in asked]
    if flags.reference is not None and backends and all(lacking):
        raise BadInput(f"--reference {flags.reference}: {lacking[0]}; give --reference none")
    families = {run.variant: [run] for run in runs}
    for run, why in zip(asked, lacking, strict=True):
        if why is None:
            references = [replace(run.variant, backend=name) for name in backends]
            families[run.variant] += [replace(run, variant=reference) for reference in references]
        elif why:
            say(f"{run.variant.name} has no reference in PyTorch: {why}")
    return list(families.values())


def find_folder(comparison: Comparison, out: Path | None) -> Path:
    """Where the results go: --out, else the newest unfinished folder of the same comparison, else a new one.

    Raises BadInput if --out holds anything else, or cannot be used.
    """
    if out is None:
        for path in sorted(RESULTS.glob(f"*/{_IDENTITY}"), reverse=True):
            if _read(path) == comparison.identity and not (_read(path.parent / "compare.json") or {}).get("complete"):
                return path.parent
        return RESULTS / time.strftime("%Y%m%d_%H%M%S")
    with as_bad_input(out):
        check_place(out)
        taken = out.is_dir() and any(out.iterdir())
    if taken and _read(out / _IDENTITY) != comparison.identity:
        raise BadInput(f"--out '{out}' holds something else, or a comparison by other settings or code: give another")
    return out


def _read(path: Path) -> Any:
    """What a JSON file holds; None if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def compare(comparison: Comparison, folder: Path, cache: Path, say: Say) -> dict[str, Any]:
    """Run what is missing, measure, write everything; what compare.json holds.

    Raises KeyboardInterrupt, with all that was done saved, and RunFailed, all else written, if a measurement fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = _recall(comparison, folder, cache)
    write_json(folder / _IDENTITY, comparison.identity)
    runs = comparison.all_runs()
    for i, run in enumerate(runs, 1):
        name, seed = run.variant.name, run.plan.seed
        there = seed in record.finished[name]
        say(f"{i} of {len(runs)}: {name}, seed {seed}{' (finished before)' if there else ''}")
        finished = record.finished[name][seed] = plan.execute(run, cache)
        say(f"    {told(finished)}")
        plan.keep_logs(finished, folder / "runs", f"{name} seed{seed}")
        if not there or i == len(runs):
            write_json(folder / "compare.json", record.document())
    failed = _measure(folder, record, say)
    log = json.loads(json.dumps(record.document()))  # as a reader of the file finds it
    write_json(folder / "compare.json", log)
    outputs.write_all(log, folder)
    if failed:
        raise RunFailed(f"{'; '.join(failed[:3])}; all else is in '{folder}', and the same command tries again")
    return log


def _recall(comparison: Comparison, folder: Path, cache: Path) -> Record:
    """What is known before anything runs now: what earlier commands left, in the cache and in the folder."""
    record = begin(comparison)
    record.groups, record.parity = (_read(folder / name) or [] for name in (_RATES, _PARITY))
    for run in comparison.all_runs():
        if (found := plan.look(run, cache)).status != "missing":
            record.finished[run.variant.name][run.plan.seed] = found
    return record


def begin(comparison: Comparison) -> Record:
    """What is known before anything ran. Raises BadInput where a model does not fit the device."""
    models = [family[0].plan.make_model() for family in comparison.families]
    sizes = [model.count_parameters()["total"] for model in models]
    return Record(
        comparison=comparison,
        machine=describe_machine(),
        corpus=known_before(comparison.runs[0].plan, models[0])["corpus"],
        parameters={
            run.variant.name: size for family, size in zip(comparison.families, sizes, strict=True) for run in family
        },
        finished={run.variant.name: {} for run in comparison.runs},
    )


def told(finished: Finished) -> str:
    """What came of a run, in a line."""
    if finished.result is None:
        return f"{finished.status}: {finished.error}"
    best, seconds = finished.result["best_valid_loss"], finished.result["train_seconds"]
    loss = "no evaluation" if best is None else f"validation loss {best:.4f}"
    return f"{finished.status}: {loss} after {seconds:,.0f} s of training"


def _measure(folder: Path, record: Record, say: Say) -> list[str]:
    """Tokens per second and parity where they are not known, each kept as soon as it is; why any could not be taken."""
    quick = record.comparison.quick
    count, least = (_QUICK_ROUNDS, _QUICK_ROUND_SECONDS) if quick else (_ROUNDS, _ROUND_SECONDS)

    def rate(runs: list[Run]) -> None:
        record.groups.append(rates.measure(runs, count, least, say))
        write_json(folder / _RATES, record.groups)

    def set_against(run: Run) -> None:
        record.parity.append(rates.parity(run, say))
        write_json(folder / _PARITY, record.parity)

    missing = [partial(rate, runs) for runs in record.without_rates()]
    missing += [partial(set_against, run) for run in record.without_parity()]
    failed = []
    for take in missing:
        try:
            take()
        except RunFailed as error:
            say(f"failed: {error}")
            failed.append(str(error))
    return failed


def show_plan(comparison: Comparison, cache: Path) -> Table:
    """What would run, and for how long."""
    parameters = begin(comparison).parameters
    heads = ("parameters", "finished", "begun", "to run", "about")
    table = Table(Column("contender", overflow="fold"), *heads, title="planned runs")
    total = 0.0
    for run in comparison.runs:
        runs = [run.with_settings(seed=seed) for seed in comparison.seeds]
        there = sum(plan.look(one, cache).status != "missing" for one in runs)
        begun = sum(plan.is_begun(one, cache) for one in runs)
        name = run.variant.name
        seconds = sum(plan.forecast(one, parameters[name], cache) for one in runs)
        total += seconds
        counts = (there, begun, len(runs) - there - begun)
        table.add_row(name, f"{parameters[name]:,}", *map(str, counts), _duration(seconds))
    most = f"{comparison.runs[0].plan.limits.max_tokens:,} tokens a run at most"
    table.caption = f"{most}; {_duration(total)} in all, and some minutes of tokens per second"
    return table


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main() -> None:
    """The command line."""
    end_as_by_ctrl_c()
    flags = parse(Flags, "python -m bench.compare")
    terminal = Terminal()

    def say(text: str) -> None:
        terminal.print(text, markup=False, highlight=False, soft_wrap=True)

    comparison = read(flags, say)
    folder = find_folder(comparison, flags.out)
    terminal.print(show_plan(comparison, plan.RUNS))
    if flags.plan:
        return
    with as_bad_input(folder):
        folder.mkdir(parents=True, exist_ok=True)
    say(f"everything goes to {folder}")
    try:
        log = compare(comparison, folder, plan.RUNS, say)
    except KeyboardInterrupt:
        given = [] if flags.out else [f"--out={folder}"]
        line = shlex.join(["python", "-m", "bench.compare", *sys.argv[1:], *given])
        raise Interrupted(f"saved; go on with: {line}") from None
    except OSError as error:
        raise RunFailed(f"could not write to '{folder}': {error}; the same command goes on") from error
    outputs.show(log, terminal)
    say(f"all of it: {folder / 'compare.html'}")
    _complain(log)


def _complain(log: dict[str, Any]) -> None:
    """Raises RunFailed, once everything is written, if a run could not be made."""
    failed = [run for run in log["runs"] if run["status"] == "failed"]
    if failed:
        which = "; ".join(f"{run['name']}, seed {run['seed']}: {run['error']}" for run in failed[:3])
        raise RunFailed(f"{len(failed)} of {len(log['runs'])} runs failed ({which}); the same command tries them again")
