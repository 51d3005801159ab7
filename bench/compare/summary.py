"""Summary of a compare.json: its rows by name, its figures as text, and sentences."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bench.compare import stats
from mlx_transformer.run.plots import short
from mlx_transformer.utils.text import plural

Log = Mapping[str, Any]
Row = Mapping[str, Any]

MEASURES = {"tokens_over_throughput": "tokens ÷ throughput", "clock": "clock", "tokens": "tokens"}  # headline's first
FEWEST_SEEDS = 5  # with fewer an interval says little
MANY = 10  # comparisons: some will differ by chance
MOST_APART = 0.02  # relative difference in parameters of variants that are not about parameters
REFERENCES = {"torch": "PyTorch", "torch-compile": "compiled PyTorch"}
SETTINGS = {  # flags that change the experiment, and how the text names them
    "dropout": "dropout {:g}",
    "n_layers": "{} layers",
    "learning_rate": "learning rate {:g}",
    "stories": "{:,} stories",
}


class Cell(NamedTuple):
    """The text of a table's cell, and the number to sort it by; without a number it sorts as text."""

    text: str
    value: float | None = None


NOT_MEASURED = Cell("not measured")


# Rows of the log, by name


def variants(log: Log) -> list[str]:
    """Return the names of all variants, in the order of the log."""
    keys = ("runs", "throughput", "time_to_target")
    return list(dict.fromkeys(row["name"] for key in keys for row in log[key]))


def base(name: str) -> str:
    """Return a name without its backend: "phase 2 · torch" -> "phase 2"."""
    return name.split(" · ")[0]


def backend(name: str) -> str:
    """Return the backend of a name: "phase 2 · torch" -> "torch"; "" for MLX."""
    return name.partition(" · ")[2]


def runs_of(log: Log, name: str) -> list[Row]:
    """Return the runs of a variant, one per seed."""
    return [run for run in log["runs"] if run["name"] == name]


def headline_measure(log: Log) -> str:
    """Return tokens_over_throughput, robust to load drift, or the clock where nothing was measured interleaved."""
    return next((key for key in MEASURES if any(row[key] for row in log["speedups"])), "clock")


def ladder(log: Log) -> list[Row]:
    """Return the speedups at one budget: in the order of the log, and the fastest first where all are of one phase.

    Those over the same baseline stand together.
    """
    rows = [row for row in log["speedups"] if row["share_of_budget"] == 1 and row["target_loss"] is not None]
    key = headline_measure(log)
    if len({re.split(r"[/:]| \(", base(row["name"]))[0] for row in rows}) != 1:
        return rows
    baselines = [row["over"] for row in rows]
    return sorted(rows, key=lambda row: (baselines.index(row["over"]), -(ratio(row[key]).value or 0)))


def against(rows: Sequence[Row]) -> tuple[str, list[str]]:
    """Return the baseline of speedups and their names; where baselines differ, each is part of the name."""
    baselines = list(dict.fromkeys(row["over"] for row in rows))
    if len(baselines) == 1:
        return baselines[0], [row["name"] for row in rows]
    return "the baseline", [f"{row['name']} over {row['over']}" for row in rows]


# Figures as text


def ratio(row: Row | None) -> Cell:
    """Format a ratio with its interval, "2.31× (1.90–2.80)"; without a value it exceeds everything measured."""
    if row is None:
        return NOT_MEASURED
    value, low, high = row["ratio"], row["low"], row["high"]
    if value is None:
        return Cell("not reached", 0.0) if low is None else Cell(f"> {low:.2f}×", math.inf)
    return Cell(f"{value:.2f}×{_interval(low, high, '.2f')}", value)


def _interval(low: float | None, high: float | None, form: str) -> str:
    if low is None and high is None:
        return ""
    if low is None or high is None:
        return f" (> {low:{form}})" if high is None else f" (< {high:{form}})"
    return f" ({low:{form}}–{high:{form}})"


def verdict(row: Row | None) -> str:
    """Return faster, slower, no difference, not measured, not reached (by the median seed) or no interval."""
    if row is None:
        return "not measured"
    value, low, high = row["ratio"], row["low"], row["high"]
    if low is None and (value is None or high is None):
        return "not reached" if value is None else "no interval"
    return row["verdict"]


def tokens_per_second(row: Row) -> Cell:
    """Format the median throughput of a row of `throughput`, and its interval."""
    value = row["tokens_per_second"]
    return Cell(f"{value['median']:,.0f}{_interval(value['low'], value['high'], ',.0f')}", value["median"])


def status(log: Log, name: str) -> str:
    """Count a variant's runs by status: "4 done, 1 diverged"."""
    return ", ".join(f"{count} {what}" for what, count in Counter(run["status"] for run in runs_of(log, name)).items())


# Sentences


def caveat(log: Log) -> str:
    """Return the warning that everything of a quick or incomplete comparison carries."""
    return "rough, from a quick run" if log["quick"] else "" if log["complete"] else "incomplete"


def headline(log: Log) -> list[str]:
    """Answer whether it pays, then say by which measure, at which target loss, and how MLX compares with PyTorch."""
    rows, key = [row for row in ladder(log) if not backend(row["name"])], headline_measure(log)
    sentences = [*_answers(log, rows, key), *_losses(log, rows), _measures(log, rows, key)] if rows else []
    pairs = [_against_reference(row) for row in log["speed"] if backend(row["b"]) and base(row["b"]) == row["a"]]
    sentences += [f"{'; '.join(pairs)}."] if pairs else []
    nothing = "there is nothing to compare." if log["complete"] else "nothing to compare has been measured yet."
    first, *others = sentences or [nothing]
    warning = f"{caveat(log)}: " if caveat(log) else ""
    return [sentence[:1].upper() + sentence[1:] for sentence in (warning + first, *others)]


def _answers(log: Log, rows: Sequence[Row], key: str) -> list[str]:
    if len(rows) == 1:
        return [_answer_for_one(log, rows[0], key)]
    verdicts = Counter(verdict(row[key]) for row in rows)
    counts = ", ".join(f"{count} {kind}" for kind, count in verdicts.most_common())
    counted = f"of {len(rows)} variants: {counts}."
    faster = [row for row in rows if verdict(row[key]) == "faster"]
    if not faster and verdicts["not measured"] == len(rows):
        return [f"not known yet: none of {len(rows)} variants has been measured."]
    if not faster:
        return [f"no: none of {len(rows)} variants is faster to the target loss than {against(rows)[0]}.", counted]
    best = max(faster, key=lambda row: ratio(row[key]).value or 0)
    return [f"{best['name']} pays most: it is {_speedup(best, key)}.", counted]


def _speedup(row: Row, key: str) -> str:
    value = row[key]
    if value["ratio"] is None:
        return f"more than {value['low']:.2f}× faster to the target loss than {row['over']}"
    interval = _interval_95(value["low"], value["high"])
    return f"{value['ratio']:.2f}× faster to the target loss than {row['over']}{interval}"


def _interval_95(low: float | None, high: float | None) -> str:
    return _interval(low, high, ".2f").replace("(", "(95 % interval ")


def _answer_for_one(log: Log, row: Row, key: str) -> str:
    value, name, over = row[key], row["name"], row["over"]
    kind = verdict(value)
    if kind == "not measured":
        failed = [one for one in (name, over) if {run["status"] for run in runs_of(log, one)} == {"failed"}]
        reason = f"every run of {failed[0]} failed" if failed else f"{name} against {over} has not been measured"
        return f"not known yet: {reason}."
    if kind == "not reached":
        known = {one["name"]: one for one in log["time_to_target"]}
        if not known[name]["reached"] and not known[over]["reached"]:
            return f"undecided: neither {name} nor {over} reaches the target loss; give a higher --target."
        counts = [f"{known[one]['reached']} of {plural(known[one]['seeds'], 'seed')}" for one in (name, over)]
        return f"no: {name} reaches the target loss with {counts[0]}, {over} with {counts[1]}."
    if kind == "slower":
        low, high = (value[bound] and 1 / value[bound] for bound in ("high", "low"))
        interval = _interval_95(low, high)
        return f"no: {name} is {1 / value['ratio']:.2f}× slower to the target loss than {over}{interval}."
    if kind == "faster":
        return f"yes: {name} is {_speedup(row, key)}."
    opening, closing = {
        "no difference": ("no difference", "; the interval contains 1"),
        "no interval": ("undecided", ", with no interval to tell it from chance"),
    }[kind]
    if value["ratio"] is None:
        return f"{opening}: the speedup of {name} over {over} is more than {value['low']:.2f}×."
    interval = _interval_95(value["low"], value["high"])
    return f"{opening}: the speedup of {name} over {over} is {value['ratio']:.2f}×{interval}{closing}."


def _losses(log: Log, rows: Sequence[Row]) -> list[str]:
    """Compare the final losses of the one variant with the baseline's, seed by seed: sharper than a time to target."""
    found = loss_difference(log, rows[0]["name"], rows[0]["over"]) if len(rows) == 1 else None
    if found is None:
        return []
    mean, low, high = found
    clear = "lower" if high < 0 else "higher" if low > 0 else "not clearly different"
    return [f"its final loss is {clear}: {mean:+.4f} nats (95 % interval {low:+.4f} to {high:+.4f}, paired by seed)."]


def final_loss(run: Row) -> float | None:
    """Return the validation loss of the last evaluation; inf for a run that diverged or failed, None without one."""
    if run["status"] in ("diverged", "failed"):
        return math.inf
    return run["evals"][-1]["valid_loss"] if run["status"] == "done" and run["evals"] else None


def loss_difference(log: Log, name: str, over: str) -> tuple[float, float, float] | None:
    """Return the mean difference of two variants' final losses at equal seeds, with its 95 % bounds."""
    mine, theirs = ({run["seed"]: final_loss(run) for run in runs_of(log, one)} for one in (name, over))
    both = [seed for seed in mine if mine[seed] is not None and theirs.get(seed) is not None]
    return stats.mean_difference(np.array([mine[s] for s in both]), np.array([theirs[s] for s in both]))


def baseline_of(log: Log, name: str) -> str | None:
    """Return the variant that another is compared with: as its speedups say, else the log's first; None for that."""
    over = next((row["over"] for row in log["speedups"] if row["name"] == name), variants(log)[0])
    return None if over == name else over


def _measures(log: Log, rows: Sequence[Row], key: str) -> str:
    loss = rows[0]["target_loss"]
    text = f"target: {loss:.3f} nats per token on held-out text, {log['target']['rule']}. Measured by {MEASURES[key]}"
    if len(rows) > 1:
        return f"{text}."
    others = [f"{name} {ratio(rows[0][other]).text}" for other, name in MEASURES.items() if other != key]
    return f"{text}; {', '.join(others)}."


def _against_reference(pair: Row) -> str:
    reference = REFERENCES[backend(pair["b"])]
    return f"{pair['a']} has {ratio(pair).text} the throughput of {reference} ({verdict(pair)})"


def remarks(log: Log) -> list[str]:
    """Return what a reader could be misled about, the gravest first."""
    texts = []
    if not log["complete"]:
        absent = sum(run["status"] in ("missing", "failed") for run in log["runs"])
        total = plural(len(log["runs"]), "run")
        what = f"{absent} of {total} are missing or failed" if absent else "not all has been measured"
        texts.append(f"Incomplete: {what}; the same command resumes.")
    if log["quick"]:
        texts.append("A quick run: the answer is rough. Leave out --quick before you believe or repeat it.")
    texts += [f"{name}: {problems}." for name in variants(log) if (problems := _problems(log, name))]
    if log["target"]["loss"] is None:
        texts.append(f"There is no target loss ({log['target']['rule']}), so there is no time to it.")
    at_once = _reached_at_once(log)
    texts += [f"{name} reaches the target at its first evaluation: give a lower --target." for name in at_once]
    if len(log["seeds"]) < FEWEST_SEEDS:
        count = "one seed" if len(log["seeds"]) == 1 else f"{len(log['seeds'])} seeds"
        texts.append(f"Only {count}: runs that differ only in the seed differ too. Give five or more.")
    if len(ladder(log)) >= MANY:
        chance = len(ladder(log)) / 20
        texts.append(f"{len(ladder(log))} intervals of 95 %: about {chance:.0f} would exclude 1 by chance alone.")
    if not any(backend(name) for name in variants(log)):
        texts.append("No PyTorch reference was measured, so nothing here says how fast this code is in itself.")
    return [*texts, *_unequal_sizes(log)]


def _problems(log: Log, name: str) -> str:
    """Say what went wrong with a variant: "3 done, 2 diverged; 3 of 5 seeds reach the target"."""
    broken = any(run["status"] in ("diverged", "failed") for run in runs_of(log, name))
    rows = [row for row in log["time_to_target"] if row["name"] == name and row["reached"] < row["seeds"]]
    reached = [f"{row['reached']} of {plural(row['seeds'], 'seed')} reach the target" for row in rows]
    return "; ".join([status(log, name)] * broken + reached)


def _reached_at_once(log: Log) -> list[str]:
    """Return the variants whose first evaluations reach the target, so that their time to it is unknown."""
    loss = log["target"]["loss"]
    by_name = {name: [run["evals"] for run in runs_of(log, name) if run["evals"]] for name in variants(log)}
    return [
        name
        for name, runs in by_name.items()
        if loss is not None and runs and all(evals[0]["valid_loss"] <= loss for evals in runs)
    ]


def _unequal_sizes(log: Log) -> list[str]:
    sizes = {row["name"]: row["parameters"] for row in log["throughput"]}
    if not sizes:
        return []
    first, size = next(iter(sizes.items()))
    apart = [f"{name} ({other / size - 1:+.1%})" for name, other in sizes.items() if abs(other / size - 1) > MOST_APART]
    return [f"Other numbers of parameters than {first}: {', '.join(apart)}."] if apart else []


def chip(log: Log) -> str:
    """Return the machine's name alone."""
    return log["machine"]["device"].split(",")[0]


def describe_machine(log: Log) -> str:
    """Describe where, and with which versions and code, all absolute figures were measured."""
    machine = log["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    commit = f", commit {machine['commit']}" if machine["commit"] else ""
    return f"{machine['device']}; {machine['system']}; {versions}{commit}"


def setting(log: Log) -> str:
    """Say in a line what was trained on what."""
    seeds = f"{len(log['seeds'])} seed{'s' if len(log['seeds']) != 1 else ''}"
    shares = {row["share_of_budget"] for row in log["speedups"]}
    twice = ", then as many again" if 2 in shares else ""
    parts = [
        f"Size {log['size']} on {log['corpus']['name']}",
        seeds,
        f"{short(log['budget_tokens'])} tokens a run{twice}",
    ]
    return ", ".join([*parts, *(SETTINGS[name].format(value) for name, value in log.get("settings", {}).items())])
