"""What a compare.json says, in sentences and tables that have no form yet."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlx_transformer.run.plots import short

Log = Mapping[str, Any]
Found = Mapping[str, Any]

MEASURES = {"tokens_over_rate": "tokens ÷ rate", "clock": "clock", "tokens": "tokens"}  # the first is the headline's
FEWEST_SEEDS = 5  # under which an interval says little
MANY = 10  # comparisons, from which on chance has a say
MOST_APART = 0.02  # of the parameters of two contenders whose idea is not about parameters
REFERENCES = {"torch": "PyTorch", "torch-compile": "compiled PyTorch"}
SETTINGS = {  # flags that change the experiment, and how to say them
    "dropout": "dropout {:g}",
    "n_layers": "{} layers",
    "learning_rate": "learning rate {:g}",
    "stories": "{:,} stories",
}


class Cell(NamedTuple):
    """What a cell shows, and the number that it is sorted by; without one it is text."""

    text: str
    value: float | None = None


NOT_MEASURED = Cell("not measured")


# What stands in the log, by name


def variants(log: Log) -> list[str]:
    """All names, in the order of the log."""
    return list(dict.fromkeys(one["name"] for key in ("runs", "rates", "time_to_target") for one in log[key]))


def base(name: str) -> str:
    """The name without its backend: "phase 2 · torch" -> "phase 2"."""
    return name.split(" · ")[0]


def backend(name: str) -> str:
    """ "phase 2 · torch" -> "torch"; "" where it is ours."""
    return name.partition(" · ")[2]


def runs_of(log: Log, name: str) -> list[Found]:
    """The runs of a contender, one a seed."""
    return [run for run in log["runs"] if run["name"] == name]


def headline_measure(log: Log) -> str:
    """tokens_over_rate, which a noisy machine hardly moves; the clock where nothing was measured interleaved."""
    return next((key for key in MEASURES if any(one[key] for one in log["speedups"])), "clock")


def ladder(log: Log) -> list[Found]:
    """The speed-ups at one budget: in the order of the log, and the soonest first where all are of one phase.

    Those over one baseline stand together.
    """
    rows = [one for one in log["speedups"] if one["share_of_budget"] == 1 and one["target_loss"] is not None]
    key = headline_measure(log)
    one_phase = len({base(one["name"]).split("/")[0].split(":")[0] for one in rows}) == 1
    overs = [one["over"] for one in rows]
    return (
        sorted(rows, key=lambda one: (overs.index(one["over"]), -(times(one[key]).value or 0))) if one_phase else rows
    )


def against(rows: Sequence[Found]) -> tuple[str, list[str]]:
    """What speed-ups are measured against, and the name of each; where baselines differ, its own stands in its name."""
    overs = list(dict.fromkeys(row["over"] for row in rows))
    if len(overs) == 1:
        return overs[0], [row["name"] for row in rows]
    return "the baseline", [f"{row['name']} over {row['over']}" for row in rows]


# Numbers for people


def times(found: Found | None) -> Cell:
    """A ratio with its interval, "2.31× (1.90–2.80)"; what has no value lies beyond all that was measured."""
    if found is None:
        return NOT_MEASURED
    ratio, low, high = found["ratio"], found["low"], found["high"]
    if ratio is None:
        return Cell("not reached", 0.0) if low is None else Cell(f"> {low:.2f}×", math.inf)
    return Cell(f"{ratio:.2f}×{_interval(low, high, '.2f')}", ratio)


def _interval(low: float | None, high: float | None, form: str) -> str:
    if low is None and high is None:
        return ""
    if low is None or high is None:
        return f" (> {low:{form}})" if high is None else f" (< {high:{form}})"
    return f" ({low:{form}}–{high:{form}})"


def verdict(found: Found | None) -> str:
    """faster, slower, no difference; not reached, by the median seed; no interval, where nothing decides."""
    if found is None:
        return "not measured"
    ratio, low, high = found["ratio"], found["low"], found["high"]
    if low is None and (ratio is None or high is None):
        return "not reached" if ratio is None else "no interval"
    return found["verdict"]


def rate(one: Found) -> Cell:
    """The median tokens per second of a row of rates, and its interval."""
    found = one["tokens_per_second"]
    return Cell(f"{found['median']:,.0f}{_interval(found['low'], found['high'], ',.0f')}", found["median"])


def status(log: Log, name: str) -> str:
    """What became of a contender's runs: "4 done, 1 diverged"."""
    return ", ".join(f"{count} {what}" for what, count in Counter(run["status"] for run in runs_of(log, name)).items())


# Sentences


def caveat(log: Log) -> str:
    """What stands on everything that a quick or an incomplete comparison shows."""
    return "rough, from a quick run" if log["quick"] else "" if log["complete"] else "incomplete"


def headline(log: Log) -> list[str]:
    """Does it pay? The answer, and in further sentences by which measure, at which target, and against PyTorch."""
    rows, key = [row for row in ladder(log) if not backend(row["name"])], headline_measure(log)
    said = [*_answers(log, rows, key), _by_other_measures(log, rows, key)] if rows else []
    made = [_against_reference(one) for one in log["speed"] if backend(one["b"]) and base(one["b"]) == one["a"]]
    said += [f"{'; '.join(made)}."] if made else []
    said = said or ["there is nothing to compare." if log["complete"] else "nothing to compare has been measured yet."]
    doubt = f"{caveat(log)}: " if caveat(log) else ""
    return [sentence[:1].upper() + sentence[1:] for sentence in (doubt + said[0], *said[1:])]


def _answers(log: Log, rows: Sequence[Found], key: str) -> list[str]:
    if len(rows) == 1:
        return [_answer_for_one(log, rows[0], key)]
    verdicts = Counter(verdict(row[key]) for row in rows)
    counts = ", ".join(f"{count} {kind}" for kind, count in verdicts.most_common())
    counted = f"of {len(rows)} contenders: {counts}."
    sooner = [row for row in rows if verdict(row[key]) == "faster"]
    if not sooner:
        return [f"no: none of {len(rows)} contenders reaches the target loss sooner than {against(rows)[0]}.", counted]
    best = max(sooner, key=lambda row: times(row[key]).value or 0)
    return [f"{best['name']} pays most: it reaches the target loss {_as_soon(best, key)}.", counted]


def _as_soon(row: Found, key: str) -> str:
    found = row[key]
    if found["ratio"] is None:
        return f"more than {found['low']:.2f} times as soon as {row['over']}"
    return f"{found['ratio']:.2f} times as soon as {row['over']}{_of_95(found['low'], found['high'])}"


def _of_95(low: float | None, high: float | None) -> str:
    return _interval(low, high, ".2f").replace("(", "(95 % interval ")


def _answer_for_one(log: Log, row: Found, key: str) -> str:
    found, name, over = row[key], row["name"], row["over"]
    kind = verdict(found)
    if kind == "not measured":
        return f"not known yet: {name} against {over} has not been measured."
    if kind == "not reached":
        known = {one["name"]: one for one in log["time_to_target"]}
        if not known[name]["reached"] and not known[over]["reached"]:
            return f"undecided: neither {name} nor {over} reaches the target loss; give a higher --target."
        ours, theirs = (f"{known[one]['reached']} of {known[one]['seeds']} seeds" for one in (name, over))
        return f"no: {name} reaches the target loss with {ours}, {over} with {theirs}."
    if kind == "slower":
        low, high = (found[bound] and 1 / found[bound] for bound in ("high", "low"))
        return f"no: {name} takes {1 / found['ratio']:.2f} times as long as {over} to the target{_of_95(low, high)}."
    opening, closing = {
        "faster": ("yes", ""),
        "no difference": ("no difference", "; the interval contains 1"),
        "no interval": ("undecided", ", with no interval to tell it from chance"),
    }[kind]
    return f"{opening}: {name} reaches the target loss {_as_soon(row, key)}{closing}."


def _by_other_measures(log: Log, rows: Sequence[Found], key: str) -> str:
    loss = rows[0]["target_loss"]
    said = f"target: {loss:.3f} nats per piece on held-out text, {log['target']['rule']}. Measured by {MEASURES[key]}"
    if len(rows) > 1:
        return f"{said}."
    others = [f"{name} {times(rows[0][other]).text}" for other, name in MEASURES.items() if other != key]
    return f"{said}; {', '.join(others)}."


def _against_reference(pair: Found) -> str:
    reference = REFERENCES[backend(pair["b"])]
    return f"{pair['a']} makes {times(pair).text} the tokens per second of {reference} ({verdict(pair)})"


def remarks(log: Log) -> list[str]:
    """What a reader could be misled about, said plainly, the gravest first."""
    said = []
    if not log["complete"]:
        wanting = sum(run["status"] in ("missing", "failed") for run in log["runs"])
        what = f"{wanting} of {len(log['runs'])} runs are missing or failed" if wanting else "not all has been measured"
        said.append(f"Incomplete: {what}; the same command goes on.")
    if log["quick"]:
        said.append("A quick run: the answer is rough. Leave out --quick before you believe or repeat it.")
    said += [f"{name}: {fate}." for name in variants(log) if (fate := _fate(log, name))]
    if log["target"]["loss"] is None:
        said.append(f"There is no target loss ({log['target']['rule']}), so there is no time to it.")
    said += [f"{name} meets the target at its first evaluation: give a lower --target." for name in _at_once(log)]
    if len(log["seeds"]) < FEWEST_SEEDS:
        count = "one seed" if len(log["seeds"]) == 1 else f"{len(log['seeds'])} seeds"
        said.append(f"Only {count}: runs that differ in nothing but the seed differ too. Five or more say something.")
    if len(ladder(log)) >= MANY:
        chance = len(ladder(log)) / 20
        said.append(f"{len(ladder(log))} intervals of 95 %: about {chance:.0f} would leave out 1 by chance alone.")
    if not any(backend(name) for name in variants(log)):
        said.append("No reference in PyTorch was measured, so nothing here says how fast this code is as such.")
    return [*said, *_unequal_sizes(log)]


def _fate(log: Log, name: str) -> str:
    """What went amiss with a contender: "3 done, 2 diverged; 3 of 5 seeds reach the target"."""
    broken = any(run["status"] in ("diverged", "failed") for run in runs_of(log, name))
    short_of = [one for one in log["time_to_target"] if one["name"] == name and one["reached"] < one["seeds"]]
    reached = [f"{one['reached']} of {one['seeds']} seeds reach the target" for one in short_of]
    return "; ".join([status(log, name)] * broken + reached)


def _at_once(log: Log) -> list[str]:
    """Contenders of whom no evaluation lies above the target, so that how soon they met it is not known."""
    loss = log["target"]["loss"]
    seen = {name: [run["evals"] for run in runs_of(log, name) if run["evals"]] for name in variants(log)}
    return [
        name
        for name, evals in seen.items()
        if loss is not None and evals and all(own[0]["valid_loss"] <= loss for own in evals)
    ]


def _unequal_sizes(log: Log) -> list[str]:
    sizes = {rate["name"]: rate["parameters"] for rate in log["rates"]}
    if not sizes:
        return []
    first, own = next(iter(sizes.items()))
    apart = [f"{name} ({size / own - 1:+.1%})" for name, size in sizes.items() if abs(size / own - 1) > MOST_APART]
    return [f"Not of the size of {first} in parameters: {', '.join(apart)}."] if apart else []


def chip(log: Log) -> str:
    """The machine's name alone."""
    return log["machine"]["device"].split(",")[0]


def machine(log: Log) -> str:
    """Where, with which versions and code all absolute figures were measured."""
    found = log["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    commit = f", commit {found['commit']}" if found["commit"] else ""
    return f"{found['device']}; {found['system']}; {versions}{commit}"


def setting(log: Log) -> str:
    """What was trained on what: one line."""
    seeds = f"{len(log['seeds'])} seed{'s' if len(log['seeds']) != 1 else ''}"
    shares = {row["share_of_budget"] for row in log["speedups"]}
    on = " and trained on for as many again" if 2 in shares else ""
    said = [f"Size {log['size']} on {log['corpus']['name']}", seeds, f"{short(log['budget_tokens'])} tokens a run{on}"]
    return ", ".join([*said, *(SETTINGS[name].format(value) for name, value in log.get("settings", {}).items())])
