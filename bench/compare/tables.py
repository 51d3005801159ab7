"""The tables of a comparison: what they hold, as Markdown (one function a table), in compare.md and on a terminal."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from bench.compare import findings
from bench.compare.findings import (
    MEASURES,
    NOT_MEASURED,
    Cell,
    Found,
    Log,
    against,
    backend,
    base,
    headline_measure,
    rate,
    runs_of,
    status,
    times,
    variants,
    verdict,
)
from mlx_transformer.run.plots import short
from mlx_transformer.run.report import FIGURES, escaped, memory
from mlx_transformer.utils.files import atomic_write

QUALITIES = ("distinct_2", "repetition", "known_words", "grammatical", "consistent")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table before it has a form. Every column head says its unit or direction."""

    title: str
    note: str
    head: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]

    def numeric(self) -> list[bool]:
        """Of each column: does it hold numbers?"""
        return [any(row[i].value is not None for row in self.rows) for i in range(len(self.head))]


def speedups(log: Log) -> Table:
    """How many times sooner than the baseline, the three ways, at each share of the budget."""
    key = headline_measure(log)
    measures = [key, *(measure for measure in MEASURES if measure != key)]
    found = sorted(log["speedups"], key=lambda one: one["share_of_budget"] != 1)  # the headline's first
    baseline, names = against(found)
    rows = [
        (Cell(name), _target(one), Cell(verdict(one[key])), *(times(one[measure]) for measure in measures))
        for name, one in zip(names, found, strict=True)
    ]
    ways = (f"times as soon, {MEASURES[measure]}" for measure in measures)
    head = ("contender", "target loss (budgets)", "verdict", *ways)
    note = (
        "2× is half the time. Ratios of medians over seeds with 95 % intervals; “no difference”: the interval holds 1."
        " Tokens ÷ rate: tokens needed ÷ tokens per second measured interleaved, which a noisy machine hardly moves;"
        " tokens alone are exact for a seed. The verdict is by " + MEASURES[key] + "."
    )
    return Table(title=f"Time to target against {baseline}", note=note, head=head, rows=rows)


def _target(one: Found) -> Cell:
    loss, share = one["target_loss"], one["share_of_budget"]
    return Cell(f"{'none' if loss is None else format(loss, '.4f')} ({share:g})", share)


def targets(log: Log) -> Table:
    """What each contender needs to the target, in absolute figures."""
    loss = log["target"]["loss"]
    title = "Time to target" if loss is None else f"Time to a validation loss of {loss:.4f}"
    note = (
        "Medians over seeds with 95 % intervals; “> x”: not reached by then. A run that diverged or failed counts as"
        " longer than any other. The clock leaves out validation and saving."
        f" Measured on {log['machine']['device']}."
    )
    head = ("contender", "seeds at the target", "tokens ÷ rate (s)", "clock (s)", "tokens", "runs")
    return Table(title=title, note=note, head=head, rows=[_target_row(log, name) for name in variants(log)])


def _target_row(log: Log, name: str) -> Sequence[Cell]:
    known = next((one for one in log["time_to_target"] if one["name"] == name), None)
    if known is None:
        return Cell(name), *[NOT_MEASURED] * 4, Cell(status(log, name))
    tokens, clock = (_end(log, name, key) for key in ("tokens", "seconds"))
    rated = next((one["tokens_per_second"]["median"] for one in log["rates"] if one["name"] == name), None)
    return (
        Cell(name),
        Cell(f"{known['reached']} of {known['seeds']}", known["reached"]),
        amount(known["tokens_over_rate"], tokens / rated if tokens and rated else None, seconds),
        amount(known["clock"], clock, seconds),
        amount(known["tokens"], tokens, short),
        Cell(status(log, name)),
    )


def _end(log: Log, name: str, key: str) -> float | None:
    """Tokens or seconds at the end of a contender's shortest finished run, of those that missed the target if any."""
    done = [run["evals"] for run in runs_of(log, name) if run["status"] == "done" and run["evals"]]
    target = log["target"]["loss"] or 0.0
    missed = [evals for evals in done if all(one["valid_loss"] > target for one in evals)]
    return min((evals[-1][key] for evals in missed or done), default=None)


def rates(log: Log) -> Table:
    """Tokens per second, memory and size."""
    rows = [
        (
            Cell(one["name"]),
            rate(one),
            Cell(memory(one["memory_bytes"]), one["memory_bytes"]),
            _number(one["parameters"], ","),
            _number(one["rounds"]),
        )
        for one in log["rates"]
    ]
    note = (
        f"Training steps, measured interleaved, each contender in a process of its own, on {log['machine']['device']}."
        " Memory: of the whole process on a CPU, of the device on a GPU."
    )
    head = ("contender", "tokens/s (95 %)", "peak memory", "parameters", "rounds")
    return Table(title="Tokens per second and memory", note=note, head=head, rows=rows)


def speed(log: Log) -> Table:
    """Pairs measured in turn."""
    rows = [
        (Cell(one["a"]), Cell(one["b"]), times(one), Cell(verdict(one)), _number(one["rounds"])) for one in log["speed"]
    ]
    note = "Ratios of median tokens per second, measured A B A B … in one run, with 95 % intervals."
    head = ("contender", "against", "times the tokens/s", "verdict", "rounds")
    return Table(title="Tokens per second, one against the other", note=note, head=head, rows=rows)


def quality(log: Log) -> Table:
    """How good the models are at their best."""
    results = {name: [run["result"] for run in runs_of(log, name) if run["result"]] for name in variants(log)}
    known = [key for key in QUALITIES if any(key in one["quality"] for own in results.values() for one in own)]
    rows = [
        (
            Cell(name),
            spread([one["best_valid_loss"] for one in own], ".4f"),
            spread([one["best_valid_bpb"] for one in own], ".4f"),
            *(spread([one["quality"].get(key) for one in own], ".1%") for key in known),
            Cell(status(log, name)),
        )
        for name, own in results.items()
    ]
    labels = [FIGURES[key][0] for key in known]
    meanings = "".join(f" {label.capitalize()}: {FIGURES[key][1]}." for label, key in zip(labels, known, strict=True))
    note = "Median over seeds and the range, each run at its best evaluation." + meanings
    head = ("contender", "best loss (nats per piece)", "best bits per byte", *labels, "runs")
    return Table(title="Quality", note=note, head=head, rows=rows)


def parity(log: Log) -> Table:
    """How far ours and the reference drift apart from equal weights and batches."""
    rows = [
        (
            Cell(f"phase {one['phase']}" + (f"/{one['branch']}" if one["branch"] else "")),
            _number(one["max_difference"], ".1e"),
            _number(one["steps"]),
            _number(one["learning_rate"], "g"),
            _number(one["seed"]),
        )
        for one in log["parity"]
    ]
    note = "Training losses of ours and of the reference in PyTorch from equal weights on equal batches, dropout 0."
    head = ("contender", "largest difference (nats)", "steps", "learning rate", "seed")
    return Table(title="Parity with the reference", note=note, head=head, rows=rows)


def agreement(log: Log) -> Table:
    """How far the validation losses of ours and of each reference lie apart, at equal seeds and tokens."""
    rows = []
    for name in variants(log):
        if backend(name) and (apart := _apart(runs_of(log, base(name)), runs_of(log, name))):
            largest, mean = max(map(abs, apart)), sum(apart) / len(apart)
            rows.append((Cell(name), _number(len(apart)), _number(largest, ".4f"), _number(mean, "+.4f")))
    note = (
        "Ours minus the reference's, from equal weights over equal batches. Without dropout what is left is float"
        " noise, which grows with the steps and the learning rate; with dropout the two drop other activations."
    )
    head = ("reference", "evaluations", "largest difference (nats)", "mean difference (nats)")
    return Table(title="Validation losses against the reference", note=note, head=head, rows=rows)


def _apart(ours: Sequence[Found], theirs: Sequence[Found]) -> list[float]:
    """Differences of the losses of runs of one seed, evaluation by evaluation."""
    known = {(run["seed"], one["tokens"]): one["valid_loss"] for run in theirs for one in run["evals"]}
    evals = [((run["seed"], one["tokens"]), one["valid_loss"]) for run in ours for one in run["evals"]]
    return [loss - known[key] for key, loss in evals if key in known]


def ideas(log: Log) -> Table:
    """One row a contender, for an ablation: what it gains at the whole budget, what it costs, where it ends."""
    sooner = {one["name"]: one for one in log["speedups"] if one["share_of_budget"] == 1}
    needs = {one["name"]: one["tokens"] for one in log["time_to_target"]}
    cost = {one["name"]: one for one in log["rates"]}
    key = headline_measure(log)
    rows = []
    for name in variants(log):
        own, rated = sooner.get(name), cost.get(name)
        losses = [run["result"]["best_valid_loss"] for run in runs_of(log, name) if run["result"]]
        rows.append(
            (
                Cell(name),
                Cell(own["over"] if own else "—"),
                Cell(verdict(own[key]) if own else "—"),
                times(own[key]) if own else Cell("—"),
                amount(needs.get(name), _end(log, name, "tokens"), short),
                rate(rated) if rated else NOT_MEASURED,
                Cell(memory(rated["memory_bytes"]), rated["memory_bytes"]) if rated else NOT_MEASURED,
                _number(rated and rated["parameters"], ","),
                spread(losses, ".4f"),
            )
        )
    note = (
        f"Times as soon, by {MEASURES[key]}: 2× is half the time; “no difference”: the interval holds 1. Medians over"
        " seeds with 95 % intervals, of the best loss with the range; “> x”: not reached by then. Tokens per second"
        f" were measured interleaved. On {log['machine']['device']}."
    )
    measured = ("tokens to the target", "tokens/s (95 %)", "peak memory", "parameters", "best loss (nats per piece)")
    head = ("contender", "against", "verdict", "times as soon", *measured)
    return Table(title="Idea by idea", note=note, head=head, rows=rows)


def runs(log: Log) -> Table:
    """Every run, with what became of it."""
    rows = [
        (
            Cell(run["name"]),
            _number(run["seed"]),
            Cell(run["status"]),
            *_outcome(run["result"]),
            Cell(run["error"] or ""),
        )
        for run in log["runs"]
    ]
    head = ("contender", "seed", "status", "best loss", "tokens", "clock (s)", "stopped by", "error")
    return Table(title="Every run", note=f"On {log['machine']['device']}.", head=head, rows=rows)


def _outcome(result: Found | None) -> Sequence[Cell]:
    if result is None:
        return (Cell("—"),) * 4
    return (
        _number(result["best_valid_loss"], ".4f"),
        _number(result["tokens"], ","),
        Cell(seconds(result["train_seconds"]), result["train_seconds"]),
        Cell(result["stopped"]),
    )


def amount(found: Found | None, cut: float | None, form: Callable[[float], str]) -> Cell:
    """A median and its interval; what has no value was not reached by the cut, shown unless it is below the median."""
    if found is None:
        return NOT_MEASURED
    middle, low, high = found["median"], found["low"], found["high"]
    beyond = "not reached" if cut is None or cut < (middle or 0) else f"> {form(cut)}"
    if middle is None:
        return Cell(beyond, math.inf)
    if low is None:
        return Cell(form(middle), middle)
    return Cell(f"{form(middle)} ({form(low)}{f' to {beyond}' if high is None else f'–{form(high)}'})", middle)


def seconds(value: float) -> str:
    """12.3, 1,234."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _number(value: float | None, form: str = "d") -> Cell:
    return NOT_MEASURED if value is None else Cell(f"{value:{form}}", value)


def spread(values: Sequence[float | None], form: str) -> Cell:
    """The median over seeds and the range, of those that are numbers."""
    known = [value for value in values if value is not None]
    if not known:
        return NOT_MEASURED
    middle, low, high = median(known), min(known), max(known)
    return Cell(f"{middle:{form}}" + (f" ({low:{form}}–{high:{form}})" if len(known) > 1 else ""), middle)


ON_A_TERMINAL = (speedups, targets, rates, speed)
ALL: tuple[Callable[[Log], Table], ...] = (*ON_A_TERMINAL, quality, parity, agreement, runs)


def markdown(table: Table) -> str:
    """A GitHub table and its note, without the title; a sentence where there is no row."""
    if not table.rows:
        return "Not measured."
    rule = ["---:" if numeric else "---" for numeric in table.numeric()]
    lines = [table.head, rule, *([_marked(cell) for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{table.note}"


def _marked(cell: Cell) -> str:
    return escaped(" ".join(cell.text.split())) if cell.value is None else cell.text


def write_markdown(path: Path, log: Log, pictures: Sequence[tuple[str, str]]) -> None:
    """compare.md: the answer, what to bear in mind, the pictures (file, what it shows), all tables. Raises OSError."""
    answer, *further = findings.headline(log)
    parts = ["# Does it pay?", f"**{escaped(answer)}**", *map(escaped, further), escaped(findings.setting(log))]
    parts.append("\n".join(f"- {escaped(remark)}" for remark in findings.remarks(log)))
    parts += [f"![{escaped(shows)}]({name})" for name, shows in pictures]
    for make in ALL:
        table = make(log)
        parts += [f"## {table.title}", markdown(table)]
    parts += ["## Machine", escaped(findings.machine(log))]
    atomic_write(path, "\n\n".join(part for part in parts if part) + "\n")


def show(log: Log, console: Console) -> None:
    """The answer, what to bear in mind and the tables that bear on it, for a terminal."""
    answer, *further = findings.headline(log)
    console.print(Text(answer, style="bold"))
    for sentence in further:
        console.print(Text(sentence))
    for remark in findings.remarks(log):
        console.print(Text(f"! {remark}", style="yellow"))
    for make in ON_A_TERMINAL:
        table = make(log)
        if table.rows:
            console.print(on_terminal(table))
    console.print(Text(f"{findings.setting(log)}; {findings.machine(log)}", style="dim"))


def on_terminal(table: Table) -> RichTable:
    """For a terminal, with its title above and its note below."""
    shown = RichTable(title=Text(table.title), caption=Text(table.note), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.show_edge = False  # else the note is cut off by a letter where the table is as wide as the terminal
    shown.title_justify = shown.caption_justify = "left"
    for i, (head, numeric) in enumerate(zip(table.head, table.numeric(), strict=True)):
        longest = max(len(word) for text in (head, *(row[i].text for row in table.rows)) for word in text.split())
        shown.add_column(Text(head), justify="right" if numeric else "left", min_width=longest, overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(cell.text) for cell in row))
    return shown
