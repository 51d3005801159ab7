"""Records of the speed run: the history in results/published/records.json, and the rule for a new one.

A record is a variant that reaches the first one's target at `small` in less time than the record before it, measured
beside that one in one comparison:

    python -m bench.compare --size small --phases LAST NEW --target LOSS --seeds 5 --data ... --valid ... --out FOLDER
    python -m bench.record_check FOLDER
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.compare import stats, summary
from bench.compare.stats import Interval
from bench.report.logs import read_log
from bench.report.placeholder import Logs
from mlx_transformer.utils.errors import BadInput

RECORDS = "records.json"
SEEDS = 5
_EQUAL_LOSS = 1e-3  # nats, between the target that was asked for and the first record's, in full


@dataclass(frozen=True)
class Record:
    """A line of the history. log: the folder of a comparison, in results/published/."""

    date: str
    idea: str
    name: str
    log: Mapping[str, Any]
    folder: str


class Ratios(NamedTuple):
    """How much faster a record is to the target loss than the one before it, and than the first."""

    over_last: Interval | None
    over_first: Interval


class Rule(NamedTuple):
    """One condition of a record: whether a claim meets it, and what was found."""

    text: str
    met: bool
    found: str


def read_records(logs: Logs, name: str = RECORDS) -> list[Record]:
    """Return the history in a log, oldest first. Raises BadInput for a log that is missing."""
    return [
        Record(row["date"], row["idea"], row["name"], logs.read(f"{row['log']}/compare.json"), row["log"])
        for row in logs.read(name)
    ]


def ratios(records: Sequence[Record]) -> list[Ratios]:
    """Return the ratios of each record: of one comparison as measured, else over the first as a product."""
    found: list[Ratios] = []
    one = Interval(value=1.0, low=1.0, high=1.0)
    for i, record in enumerate(records):
        if i == 0:
            found.append(Ratios(None, one))
            continue
        last = records[i - 1]
        direct = _speedup(record.log, record.name, records[0].name)
        before = found[-1].over_first
        over_last = _speedup(record.log, record.name, last.name)
        if over_last is None and direct is not None:  # both over the first, in one comparison
            over_last = stats.product(direct, before.inverse)
        if over_last is None:
            raise BadInput(f"{record.folder}: {record.name} was not measured beside {last.name} or {records[0].name}")
        found.append(Ratios(over_last, direct or stats.product(over_last, before)))
    return found


def _speedup(log: Mapping[str, Any], name: str, over: str) -> Interval | None:
    rows = [
        row["tokens_over_throughput"]
        for row in log["speedups"]
        if row["share_of_budget"] == 1 and (row["name"], row["over"]) == (name, over)
    ]
    if not rows or rows[0] is None or rows[0]["ratio"] is None:
        return None
    row = rows[0]
    return Interval(value=row["ratio"], low=row["low"] or 0.0, high=row["high"] or math.inf)


def check(folder: Path, records: Sequence[Record]) -> tuple[str, list[Rule]]:
    """Judge the comparison in a folder; returns the variant that is fastest over the last record, and each condition.

    Raises BadInput if the folder has no comparison, or none of the last record's variant with another.
    """
    path = folder / "compare.json"
    if not path.is_file():
        raise BadInput(f"'{folder}' has no compare.json: expected the folder of a finished python -m bench.compare")
    log, first, last = read_log(path), records[0], records[-1]
    if not isinstance(log, dict) or "speedups" not in log:
        raise BadInput(f"'{path}' is not the log of a comparison")
    over_last = {
        name: _speedup(log, name, last.name)
        for name in summary.variants(log)
        if name != last.name and not summary.backend(name)
    }
    if not any(row["over"] == last.name for row in log["speedups"]):
        raise BadInput(
            f"'{folder}' compares nothing with the last record, {last.name}: "
            f"expected --phases {last.name.removeprefix('phase ')} NEW, the last record first"
        )
    name = max(over_last, key=lambda one: ratio.value if (ratio := over_last[one]) else 0.0)
    ratio = over_last[name]
    reached = {one["name"]: (one["reached"], one["seeds"]) for one in log["time_to_target"]}
    counts = [f"{one}: {reached[one][0]} of {reached[one][1]}" for one in (last.name, name)]
    parameters = {row["name"]: row["parameters"] for row in log["throughput"]}
    here, there = (_terms(one) for one in (log, first.log))
    different = [f"{key} {here[key]} instead of {there[key]}" for key in there if here[key] != there[key]]
    loss, target = log["target"]["loss"], first.log["target"]["loss"]
    rules = [
        Rule("the comparison is finished and not a quick one", log["complete"] and not log["quick"], ""),
        Rule("size, text and validation text of the first record", not different, "; ".join(different)),
        Rule("nothing but the variant is changed", not log["settings"], ", ".join(log["settings"])),
        Rule(
            f"the first record's target, {target:.4f} nats, or a lower one",
            loss is not None and loss <= target + _EQUAL_LOSS,
            "none" if loss is None else f"{loss:.4f}",
        ),
        Rule(
            f"{SEEDS} seeds or more, all of which reach the target",
            all(reached[one][0] == reached[one][1] >= SEEDS for one in (last.name, name)),
            "; ".join(counts),
        ),
        Rule(
            "throughput was measured interleaved with the last record's",
            {last.name, name} <= parameters.keys(),
            ", ".join(f"{one}: {count:,} parameters" for one, count in parameters.items()),
        ),
        Rule("preparation is part of the time", _states_preparation(log, name), _preparation(log, name)),
        Rule(
            "faster than the last record: the interval of the ratio excludes 1",
            ratio is not None and ratio.low > 1,
            "not measured" if ratio is None else _text(ratio),
        ),
    ]
    return name, rules


def _terms(log: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be equal for a target loss to mean the same; tokenizers follow from text and size."""
    corpus = log["corpus"]
    return {"size": log["size"], **{key: corpus[key] for key in ("sha256", "valid_tokens", "valid_bytes")}}


def _results(log: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    return [run["result"] for run in summary.runs_of(log, name) if run["result"]]


def _states_preparation(log: Mapping[str, Any], name: str) -> bool:
    results = _results(log, name)
    return bool(results) and all("preparation_seconds" in result for result in results)


def _preparation(log: Mapping[str, Any], name: str) -> str:
    """Return the median seconds that a variant prepares for; a log from before they were recorded has none."""
    seconds = [result.get("preparation_seconds", 0.0) for result in _results(log, name)]
    return f"{statistics.median(seconds):.1f} s" if any(seconds) else "none"


def _text(interval: Interval) -> str:
    return f"{interval.value:.2f}× ({interval.low:.2f}–{interval.high:.2f})"


def history(records: Sequence[Record], table: Callable[[Sequence[str], Sequence[Sequence[str]]], str]) -> str:
    """Return the table of the records."""
    rows = []
    for record, ratio in zip(records, ratios(records), strict=True):
        spent = next(one for one in record.log["time_to_target"] if one["name"] == record.name)
        throughput = next(one for one in record.log["throughput"] if one["name"] == record.name)
        rows.append(
            (
                record.date,
                record.idea,
                f"`{record.name}`",
                f"{spent['tokens']['median'] / 1e6:.2f}M",
                _text(ratio.over_last) if ratio.over_last else "",
                _text(ratio.over_first) if ratio.over_last else "1×",
                str(spent["seeds"]),
                f"{throughput['parameters'] / 1e6:.2f}M",
                _preparation(record.log, record.name),
                f"`results/published/{record.folder}`",
            )
        )
    head = (
        "date",
        "idea",
        "variant",
        "tokens",
        "over the last",
        "over the first",
        "seeds",
        "parameters",
        "preparation",
    )
    return table((*head, "log"), rows)
