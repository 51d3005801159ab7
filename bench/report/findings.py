"""What a figure shows, in a sentence computed from its logs, so that it stays true when they change."""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.compare import summary
from bench.compare.summary import Log

Steps = Sequence[Mapping[str, Any]]


_CHANGE = re.compile(r"(?:phase_\d+_)?(with|without)_(\w+)")
_SPELLINGS = {
    **{name.lower(): name for name in ("AGC", "ALiBi", "EMA", "GEGLU", "GLU", "GQA", "MQA", "ReGLU", "ReLU", "RoPE")},
    **{name.lower(): name for name in ("QK", "RMS", "SiLU", "SwiGLU", "T5", "XL", "ZClip")},
}


def change_of(name: str) -> tuple[str, str]:
    """Return how a variant differs from its baseline ("with", "without", or "" for a phase) and in what."""
    if found := _CHANGE.search(name):
        return found[1], spelled(found[2])
    branch = re.split("[/:]", name, maxsplit=1)[1:]
    return ("with", spelled(branch[0])) if branch else ("", "")


def spelled(name: str) -> str:
    """Write the name of an idea as the field does: "rope" -> "RoPE", "qk_norm" -> "QK norm"."""
    return " ".join(_SPELLINGS.get(word, word) for word in name.replace(":", "_").split("_"))


def change(name: str, over: str) -> str:
    """Name a variant beside its baseline: "5 + muon", "6 − muon", or the phase alone."""
    kind, what = change_of(name)
    sign = {"with": "+", "without": "−"}.get(kind)
    return f"{over.removeprefix('phase ')} {sign} {what}" if sign else name


def label(name: str) -> str:
    """Shorten the name of a variant: "phase 3/t5" -> "T5", "phase 6:without_short" -> "phase 6 without short"."""
    kind, what = change_of(name)
    return f"{name[:7]} without {what}" if kind == "without" else what or name


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def seconds_to_target(log: Log) -> dict[str, float | None]:
    """Return the median seconds to the target by variant: tokens ÷ interleaved throughput; None: not reached."""
    return {row["name"]: (row["tokens_over_throughput"] or {}).get("median") for row in log["time_to_target"]}


def race(log: Log) -> str:
    """Say which phase is first at the baseline's best loss, and how much faster."""
    rows = [row for row in summary.ladder(log) if row["tokens_over_throughput"]]
    best = max(rows, key=lambda row: row["tokens_over_throughput"]["ratio"] or 0)
    times, over = seconds_to_target(log), best["over"]
    name, ratio, target = best["name"].capitalize(), best["tokens_over_throughput"]["ratio"], log["target"]["loss"]
    ours, theirs = (f"{times[one]:.0f}\u00a0s" for one in (best["name"], over))
    return f"{name} reaches the target of {target:.3f} nats in {ours}, {over} in {theirs}: {ratio:.1f}× faster"


def ladder(log: Log) -> str:
    """Say which variant is fastest to the target loss, over what."""
    rows, key = summary.ladder(log), summary.headline_measure(log)
    best = max(rows, key=lambda row: summary.ratio(row[key]).value or 0)
    faster = sum(summary.verdict(row[key]) == "faster" for row in rows)
    return (
        f"{_capital(label(best['name']))} is fastest, {best[key]['ratio']:.2f}× over {best['over']};"
        f" {faster} of {len(rows)} are faster"
    )


def loss(log: Log) -> str:
    """Say which variant ends lowest, or how far MLX and PyTorch are apart where there is a reference."""
    names = summary.variants(log)
    if any(map(summary.backend, names)):
        gaps = [
            abs(_final(log, name) - _final(log, summary.base(name)))
            for name in names
            if summary.backend(name) == "torch"
        ]
        seeds = f"medians of {len(log['seeds'])} seeds"
        return f"MLX and PyTorch end within {max(1e-4, *gaps):.4f} nats of each other ({seeds})"
    ordered = sorted(names, key=lambda name: _final(log, name))
    low, first = ordered[0], names[0]
    high = ordered[-1]
    if low == first:
        return f"{low.capitalize()} ends lowest, {label(high)} {_final(log, high) - _final(log, low):.2f} nats above it"
    return f"{_capital(label(low))} ends {_final(log, first) - _final(log, low):.2f} nats below {label(first)}"


def _final(log: Log, name: str) -> float:
    values = [value for run in summary.runs_of(log, name) if (value := summary.final_loss(run)) is not None]
    return statistics.median(values)


def run(result: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> str:
    """Say how far the validation loss of a run came down."""
    first = next(one["valid_loss"] for one in curve if one["kind"] == "eval")
    return (
        f"Phase {result['phase']}: from {first:.2f} to {result['best_valid_loss']:.2f} nats per token"
        f" in {result['train_seconds'] / 60:.0f} minutes"
    )


def gate(*curves: Sequence[Mapping[str, Any]]) -> str:
    """Say how the network's share of a mixture with an n-gram expert changes over training: the median over seeds."""
    values = [[one["gate"] for one in curve if one["kind"] == "log"] for curve in curves]
    first, lowest, last = (statistics.median(map(at, values)) for at in (lambda own: own[0], min, lambda own: own[-1]))
    return f"Network's share of the mixture: {first:.2f} at first, {lowest:.2f} at least, {last:.2f} at the end"


def ratios_of(logs: Steps, rival: str) -> list[Mapping[str, Any]]:
    """Return the speedups over a rival in logs of `bench step`."""
    return [one for log in logs if log["measures"] == "step" for one in log["ratios"] if one["b"] == rival]


def steps(logs: Steps) -> str:
    """Say in how many of the measured steps MLX is faster than PyTorch, and by how much at most."""
    found = ratios_of(logs, "torch")
    faster, best = [one for one in found if (one["low"] or 0) > 1], max(one["ratio"] for one in found)
    return f"A step is faster than PyTorch's in {len(faster)} of {len(found)} shapes, at most {best:.2f}×"


def losses_at(log: Log, length: str) -> dict[str, float]:
    """Return the median loss of each variant at a length."""
    done = [one for one in log["runs"] if one["status"] == "done"]
    names = dict.fromkeys(one["name"] for one in done)
    return {name: statistics.median(one["losses"][length] for one in done if one["name"] == name) for name in names}


def length(log: Log) -> str:
    """Say which variants lose nothing on sequences longer than those trained on, and which most."""
    lengths = list(next(one for one in log["runs"] if one["status"] == "done")["losses"])
    short, long = (losses_at(log, one) for one in (lengths[0], lengths[-1]))
    extra = {name: long[name] - short[name] for name in long}
    held, worst = sum(value <= 0 for value in extra.values()), max(extra, key=lambda name: extra[name])
    times, name = int(lengths[-1]) // int(lengths[0]), "learned positions" if worst == "phase 3" else label(worst)
    return (
        f"At {times} times the trained length {held} of {len(extra)} variants lose nothing; the worst ({name}) loses"
        f" {extra[worst]:.2f} nats"
    )


def passes(log: Log, name: str) -> dict[int, dict[str, float]]:
    """Return the figures of a variant in a log of `bench sweep` by length: seconds of both passes, peak bytes."""
    own = [one for one in log["settings"] if one["name"] == name and one["status"] == "done"]
    return {
        one["seq_len"]: {key: statistics.median(values) for key, values in one["pass_seconds"].items()}
        | {"peak": one["peak_bytes"]["gradients"]}
        for one in own
    }


def longcontext(log: Log) -> str:
    """Say how much less time the second variant takes at the longest sequence."""
    first, second = list(dict.fromkeys(one["name"] for one in log["settings"]))[:2]
    ours, theirs = passes(log, first), passes(log, second)
    longest = max(ours.keys() & theirs.keys())
    ratio = ours[longest]["gradients"] / theirs[longest]["gradients"]
    return f"At {longest:,} tokens {label(second)} is {ratio:.1f}× as fast as full attention, forward and backward"


def fables(log: Log) -> str:
    """Say which variant is closest to the entropy of the fables at equal tokens."""
    rows = [row for row in log["rows"] if row["budget"] == "max_tokens" and row["ratio"]["median"]]
    best, first = min(rows, key=lambda row: row["ratio"]["median"]), rows[0]
    low, high = (row["ratio"]["median"] for row in (best, first))
    name = _capital(label(best["name"]))
    return f"{name} is closest to the entropy at equal tokens: {low:.2f} times it, {first['name']} {high:.2f}"


def sweep(log: Log) -> str:
    """Say which setting is fastest, and how much of the machine's matmul throughput it uses."""
    done = [one for one in log["settings"] if "tokens_per_second" in one]
    best = max(done, key=lambda one: one["matmul_share"])
    return (
        f"The best use of the machine, {best['matmul_share']:.0%} of its matmul throughput: width {best['d_model']},"
        f" {best['batch_size']} × {best['seq_len']} tokens"
    )
