"""The steps of a comparison: find its folder, make missing runs, measure throughput and parity, write the results."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from bench.compare import outputs, runs, throughput
from bench.compare.forecast import describe_range, remaining
from bench.compare.record import Comparison, Record
from bench.compare.runs import Finished, Run, find_finished, keep_logs
from bench.options import Say
from bench.workers.machine import describe_machine
from mlx_transformer.run.result import known_before
from mlx_transformer.utils.errors import BadInput, RunFailed
from mlx_transformer.utils.files import as_bad_input, check_place, write_json

RESULTS = Path("results/bench")
_IDENTITY, _THROUGHPUT, _PARITY = "comparison.json", "throughput.json", "parity.json"
_ROUNDS, _ROUND_SECONDS = 8, 2.0
_QUICK_ROUNDS, _QUICK_ROUND_SECONDS = 3, 0.5


def find_folder(comparison: Comparison, out: Path | None) -> Path:
    """Return the folder of the results: --out, else the newest unfinished one of the same comparison, else a new one.

    Raises BadInput if --out holds anything else, or cannot be used.
    """
    if out is None:
        for path in sorted(RESULTS.glob(f"*/{_IDENTITY}"), reverse=True):
            if _read(path) == comparison.identity and not (_read(path.parent / "compare.json") or {}).get("complete"):
                return path.parent
        return RESULTS / time.strftime("%Y%m%d_%H%M%S")
    with as_bad_input(out):
        check_place(out)
        occupied = out.is_dir() and any(out.iterdir())
    if occupied and (there := _read(out / _IDENTITY)) != comparison.identity:
        raise BadInput(f"--out '{out}' holds {_how_it_differs(there, comparison.identity)}: give another folder")
    return out


def _how_it_differs(there: Any, here: dict[str, Any]) -> str:
    """Say what a folder holds if not the results of this comparison: another one, by the first setting that differs."""
    if not isinstance(there, dict):
        return "no comparison"
    name = next(name for name in {**here, **there} if here.get(name) != there.get(name))
    short = name in here and len(str(here[name])) < 60
    values = f", {there.get(name)} there and {here[name]} here" if short else ""
    return f"a comparison with other {name}{values}"


def _read(path: Path) -> Any:
    """Read a JSON file; None if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def compare(comparison: Comparison, folder: Path, cache: Path, say: Say) -> dict[str, Any]:
    """Make the missing runs, measure, write everything; returns compare.json.

    Raises KeyboardInterrupt with everything so far saved, and RunFailed, all else written, if a measurement fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = _recall(comparison, folder, cache)
    write_json(folder / _IDENTITY, comparison.identity)
    planned, timed = comparison.all_runs(), dict[str, list[float]]()
    for i, run in enumerate(planned, 1):
        name, seed = run.variant.name, run.plan.seed
        known = seed in record.finished[name]
        say(f"{i} of {len(planned)}: {name}, seed {seed}{' (finished before)' if known else ''}")
        began = time.monotonic()
        finished = record.finished[name][seed] = runs.execute(run, cache, say)
        if not known and finished.result is not None:
            timed.setdefault(name, []).append(time.monotonic() - began)
        say(f"    {summarize(finished)}")
        if missing := [one for one in planned[i:] if one.plan.seed not in record.finished[one.variant.name]]:
            say(f"    {describe_range(*remaining(missing, timed, record.parameters, cache))} left, without throughput")
        keep_logs(finished, folder / "runs", f"{name} seed{seed}")
        if not known or i == len(planned):
            write_json(folder / "compare.json", record.document())
    failures = _measure(folder, record, say)
    log = json.loads(json.dumps(record.document()))  # as a reader of the file finds it
    write_json(folder / "compare.json", log)
    outputs.write_all(log, folder)
    if failures:
        raise RunFailed(f"{'; '.join(failures[:3])}; all else is in '{folder}', and the same command tries again")
    return log


def _recall(comparison: Comparison, folder: Path, cache: Path) -> Record:
    """Return the results that earlier commands left in the cache and in the folder."""
    record = begin(comparison)
    record.groups, record.parity = (_read(folder / name) or [] for name in (_THROUGHPUT, _PARITY))
    for run in comparison.all_runs():
        if (finished := find_finished(run, cache)).status != "missing":
            record.finished[run.variant.name][run.plan.seed] = finished
    return record


def begin(comparison: Comparison) -> Record:
    """Return a record without results. Raises BadInput where a model does not fit the device."""
    models = [in_mlx.plan.make_model() for in_mlx, *_ in comparison.by_variant]
    sizes = [model.count_parameters()["total"] for model in models]
    return Record(
        comparison=comparison,
        machine=describe_machine(),
        corpus=known_before(comparison.runs[0].plan, models[0])["corpus"],
        parameters={
            run.variant.name: size
            for backends, size in zip(comparison.by_variant, sizes, strict=True)
            for run in backends
        },
        finished={run.variant.name: {} for run in comparison.runs},
    )


def summarize(finished: Finished) -> str:
    """Say in a line how a run ended."""
    if finished.result is None:
        return f"{finished.status}: {finished.error}"
    best, seconds = finished.result["best_valid_loss"], finished.result["train_seconds"]
    loss = "no evaluation" if best is None else f"validation loss {best:.4f}"
    return f"{finished.status}: {loss} after {seconds:,.0f} s of training"


def _measure(folder: Path, record: Record, say: Say) -> list[str]:
    """Measure missing throughput and parity, each saved as soon as it is known; returns the reasons of failures."""
    quick = record.comparison.quick
    rounds, least = (_QUICK_ROUNDS, _QUICK_ROUND_SECONDS) if quick else (_ROUNDS, _ROUND_SECONDS)

    def measure_throughput(group: list[Run]) -> None:
        record.groups.append(throughput.measure(group, rounds, least, say))
        write_json(folder / _THROUGHPUT, record.groups)

    def measure_parity(run: Run) -> None:
        record.parity.append(throughput.parity(run, say))
        write_json(folder / _PARITY, record.parity)

    missing = [partial(measure_throughput, group) for group in record.without_throughput()]
    missing += [partial(measure_parity, run) for run in record.without_parity()]
    failures = []
    for measure in missing:
        try:
            measure()
        except RunFailed as error:
            say(f"failed: {error}")
            failures.append(str(error))
    return failures
