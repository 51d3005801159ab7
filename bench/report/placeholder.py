"""Evaluate a placeholder of docs/results/*.md: the path of a number in a log, and a format.

run.json: best_valid_bpb | .3f              a value in a Python format (`.1%` gives 5.0 %), short (1.84M) or GB
run.json: tokens / corpus.train_tokens      a quotient; `/ b.json: tokens` divides by a number of another log
step.json: ratios[b=torch].low | .2f        in a list, the record whose b is torch; [0] and [-1] by index
step.json: ratios[b=torch] | ratio          1.00× (0.99–1.02): no difference
curve.jsonl: [kind=log].loss | mean | .2f   of several values the mean, median, min, max or count
log.txt: # training and                     in a text, the number at # beside these words; * is any word
"""

import functools
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.compare import summary
from bench.report.logs import read_log
from mlx_transformer.run.plots import short
from mlx_transformer.utils.errors import BadInput

_NUMBER = r"(\d[\d,]*(?:\.\d+)?)(?:m([\d.]+)s)?"  # 5m22.7s is a duration as printed by the shell's `time`
_REDUCE: dict[str, Callable[[Sequence[Any]], Any]] = {
    "mean": statistics.fmean,
    "median": statistics.median,
    "min": min,
    "max": max,
    "count": len,
}


class Logs:
    """The logs in a folder, by path or short name. All methods raise BadInput with one sentence."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, str] = {}

    def read(self, name: str) -> Any:
        """Read a log as read_log does; folder/ is the list of the JSON logs in it."""
        path = self.folder / self.names.get(name, name)
        if name.endswith("/"):
            return [_read(log) for log in sorted(path.glob("*.json"))]
        if not path.is_file():
            known = f" or one of the names {', '.join(self.names)}" if self.names else ""
            raise BadInput(f"'{name}' is not a log: expected a file in {self.folder.name}/{known}")
        return _read(path)

    def evaluate(self, text: str) -> str:
        """Evaluate the text of a placeholder (syntax above)."""
        reference, *steps = (part.strip() for part in text.split(" | "))
        over, *under = reference.split(" / ")
        source, separator, _ = over.partition(": ")
        if not separator:
            raise BadInput("expected LOG: PATH")
        values = self._find(over)
        for other in under:
            values = [_divided(_one(values), _one(self._find(other if ": " in other else f"{source}: {other}")))]
        while steps and steps[0] in _REDUCE:
            values = [_REDUCE[steps.pop(0)](values)]
        return write(_one(values), *steps)

    def _find(self, reference: str) -> list[Any]:
        name, _, path = reference.partition(": ")
        log = self.read(name.strip())
        return numbers_at(log, path) if isinstance(log, str) else values_at(log, path.strip())


_read = functools.lru_cache(read_log)


def values_at(log: Any, path: str) -> list[Any]:
    """Return the values in a JSON log at a path such as `a.b[name=x].c`, `[0]`, or `[].c` for the c of each record."""
    found = [log]
    for key, pick in re.findall(r"([^.\[\]]+)|\[([^\]]*)\]", path):
        before, found = found, [value for one in found for value in (_member(one, key) if key else _picked(one, pick))]
        if not found:
            there = sorted({name for one in before if isinstance(one, dict) for name in one})
            raise BadInput(f"nothing is at {key or f'[{pick}]'}" + (f"; there is {', '.join(there)}" if there else ""))
    return found


def _member(value: Any, key: str) -> list[Any]:
    return [value[key]] if isinstance(value, dict) and key in value else []


def _picked(value: Any, pick: str) -> list[Any]:
    """Select from a list: everything (empty brackets), an index, or the records with these values."""
    if not isinstance(value, list):
        return []
    if re.fullmatch(r"-?\d+", pick):
        return value[int(pick) :][:1]
    wanted = dict(condition.strip().partition("=")[::2] for condition in pick.split(",") if pick)
    return [one for one in value if all(_spelled(one.get(key)) == wanted[key] for key in wanted)]


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def numbers_at(text: str, phrase: str) -> list[float]:
    """Return the numbers of a text at the # of a phrase; * is any word. A duration is in seconds."""
    if phrase.split().count("#") != 1:
        raise BadInput("expected words of the text, one of them # for the number")
    words = r"\s+".join({"#": _NUMBER, "*": r"\S+"}.get(word, re.escape(word)) for word in phrase.split())
    found = re.findall(rf"(?<!\S){words}(?!\S)", text)
    if not found:
        raise BadInput(f"the text does not have '{phrase.strip()}'")
    return [_number(whole.replace(",", ""), seconds) for whole, seconds in found]


def _number(whole: str, seconds: str) -> float:
    if seconds:
        return 60 * int(whole) + float(seconds)
    return float(whole) if "." in whole else int(whole)


def _one(values: list[Any]) -> Any:
    if len(values) != 1:
        raise BadInput(f"that is {len(values)} values: expected one, or a reduction ({', '.join(_REDUCE)})")
    return values[0]


def _divided(over: Any, under: Any) -> float:
    try:
        return over / under
    except (TypeError, ZeroDivisionError) as error:
        raise BadInput(f"{over!r} cannot be divided by {under!r}") from error


def write(value: Any, form: str = "") -> str:
    """Format a value: a Python format (with a space before %), "short", "GB" of bytes, or "ratio"."""
    if value is None:
        raise BadInput("the log has null there: not measured")
    if isinstance(value, float) and not form:
        raise BadInput(f"{value} needs a format, such as `| .2f`")
    try:
        if form == "ratio":
            return write_ratio(value)
        if form == "GB":
            return f"{value / 1e9:.2f} GB"
        return short(value) if form == "short" else format(value, form).replace("%", " %")
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{value!r} cannot be written as '{form}' ({error})") from error


def write_ratio(found: Mapping[str, Any]) -> str:
    """Format a ratio with its interval, 1.13× (1.11–1.15), plus "no difference" if the interval contains 1.

    A bound that is missing beside another one belongs to a seed that never reached the target: "1.73× (< 1.86)".
    """
    low, high = found["low"], found["high"]
    known = found["ratio"] is not None and (low is not None or high is not None)
    same = known and (low is None or low <= 1) and (high is None or high >= 1)
    return summary.ratio({"verdict": None, **found}).text + (": no difference" if same else "")
