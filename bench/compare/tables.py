"""The tables of a comparison, one function each, as Markdown, in compare.md and on a terminal."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text

from bench.compare import stats
from bench.compare.summary import (
    MEASURES,
    NOT_MEASURED,
    Cell,
    Log,
    Row,
    against,
    backend,
    base,
    baseline_of,
    final_loss,
    headline_measure,
    loss_difference,
    ratio,
    runs_of,
    status,
    tokens_per_second,
    variants,
    verdict,
)
from mlx_transformer.run.plots import short
from mlx_transformer.run.report import FIGURES, escaped, memory

QUALITIES = ("distinct_2", "repetition", "known_words", "grammatical", "consistent")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table without a format. Every column head has its unit or direction."""

    title: str
    note: str
    head: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]

    def numeric(self) -> list[bool]:
        """Whether each column has numbers."""
        return [any(row[i].value is not None for row in self.rows) for i in range(len(self.head))]


def final_losses(log: Log) -> Table:
    """Validation loss of each variant at the end of its runs, and its accuracy where the corpus is a task."""
    rows, with_accuracy = [], any(_accuracies(log, name) for name in variants(log))
    for name in variants(log):
        if values := [loss for run in runs_of(log, name) if (loss := final_loss(run)) is not None]:
            own = (_accuracy(log, name),) if with_accuracy else ()
            cells = _final(values), _difference(log, name), *own, _number(len(values)), Cell(status(log, name))
            rows.append((Cell(name), *cells))
    note = (
        "Validation loss of the last evaluation: the median over seeds, with its 95 % interval from three seeds on. A"
        " run that diverged or failed counts as higher than any other. The difference is the mean over equal seeds,"
        " with its 95 % interval by Student's t."
    )
    accuracy = ("accuracy (%)",) if with_accuracy else ()
    if with_accuracy:
        note += " The accuracy is that of the best weights on held-out examples: the median over seeds, and its range."
    head = (
        *("variant", "final loss (nats per token)", "difference from the baseline (nats)"),
        *(*accuracy, "seeds", "runs"),
    )
    return Table(title="Final validation loss", note=note, head=head, rows=rows)


def _accuracies(log: Log, name: str) -> list[float]:
    """Return the accuracy of each run of a variant on the task that is the corpus, in percent; none for a text."""
    tasks = [run["result"]["quality"].get("task") for run in runs_of(log, name) if run["result"]]
    return [100 * task["accuracy"] for task in tasks if task is not None]


def _accuracy(log: Log, name: str) -> Cell:
    values = _accuracies(log, name)
    if not values:
        return NOT_MEASURED
    spread = f" ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else ""
    return Cell(f"{median(values):.1f}{spread}", median(values))


def _difference(log: Log, name: str) -> Cell:
    over = baseline_of(log, name)
    found = over and loss_difference(log, name, over)
    if not found:
        return Cell("—")
    mean, low, high = found
    return Cell(f"{mean:+.4f} ({low:+.4f} to {high:+.4f})", mean)


def _final(values: Sequence[float]) -> Cell:
    found = stats.median(np.array(values))
    if math.isinf(found.value):
        return Cell("diverged", math.inf)
    if len(values) < stats.FEWEST_ROUNDS or not found.low:
        return Cell(f"{found.value:.4f}", found.value)
    high = " to diverged" if math.isinf(found.high) else f"–{found.high:.4f}"
    return Cell(f"{found.value:.4f} ({found.low:.4f}{high})", found.value)


def speedups(log: Log) -> Table:
    """Speedups over the baseline by each measure, at each share of the budget."""
    key = headline_measure(log)
    measures = [key, *(measure for measure in MEASURES if measure != key)]
    logged = sorted(log["speedups"], key=lambda row: row["share_of_budget"] != 1)  # the headline's first
    baseline, names = against(logged)
    rows = [
        (Cell(name), _target(row), Cell(verdict(row[key])), *(ratio(row[measure]) for measure in measures))
        for name, row in zip(names, logged, strict=True)
    ]
    columns = (f"speedup, {MEASURES[measure]}" for measure in measures)
    head = ("variant", "target loss (budgets)", "verdict", *columns)
    note = (
        "2× is half the time. Ratios of medians over seeds with 95 % intervals; “no difference”: the interval has 1."
        " Tokens ÷ throughput: tokens needed ÷ tokens per second measured interleaved, robust to load drift;"
        " tokens alone are exact for a seed. The verdict is by " + MEASURES[key] + "."
    )
    return Table(title=f"Time to target: speedup over {baseline}", note=note, head=head, rows=rows)


def _target(row: Row) -> Cell:
    loss, share = row["target_loss"], row["share_of_budget"]
    return Cell(f"{'none' if loss is None else format(loss, '.4f')} ({share:g})", share)


def targets(log: Log) -> Table:
    """Time and tokens that each variant needs to the target, in absolute figures."""
    loss = log["target"]["loss"]
    *first, last = log.get("clock_excludes", ("validation", "saving"))
    excluded = f"{', '.join(first)} and {last}"
    title = "Time to target" if loss is None else f"Time to a validation loss of {loss:.4f}"
    note = (
        "Medians over seeds with 95 % intervals; “> x”: not reached by then. A run that diverged or failed counts as"
        f" longer than any other. The clock excludes {excluded}."
        f" Measured on {log['machine']['device']}."
    )
    head = ("variant", "seeds at the target", "tokens ÷ throughput (s)", "clock (s)", "tokens", "runs")
    return Table(title=title, note=note, head=head, rows=[_target_row(log, name) for name in variants(log)])


def _target_row(log: Log, name: str) -> Sequence[Cell]:
    row = next((row for row in log["time_to_target"] if row["name"] == name), None)
    if row is None:
        return Cell(name), *[NOT_MEASURED] * 4, Cell(status(log, name))
    tokens, clock = (_end(log, name, key) for key in ("tokens", "seconds"))
    medians = {row["name"]: row["tokens_per_second"]["median"] for row in log["throughput"]}
    seconds_at_end = tokens / medians[name] if tokens and name in medians else None
    return (
        Cell(name),
        Cell(f"{row['reached']} of {row['seeds']}", row["reached"]),
        amount(row["tokens_over_throughput"], seconds_at_end, seconds),
        amount(row["clock"], clock, seconds),
        amount(row["tokens"], tokens, short),
        Cell(status(log, name)),
    )


def _end(log: Log, name: str, key: str) -> float | None:
    """Return tokens or seconds at the end of a variant's shortest run, of those that missed the target if any."""
    done = [run["evals"] for run in runs_of(log, name) if run["status"] == "done" and run["evals"]]
    target = log["target"]["loss"] or 0.0
    missed = [evals for evals in done if all(one["valid_loss"] > target for one in evals)]
    return min((evals[-1][key] for evals in missed or done), default=None)


def throughput(log: Log) -> Table:
    """Tokens per second, memory and size."""
    rows = [
        (
            Cell(row["name"]),
            tokens_per_second(row),
            Cell(memory(row["memory_bytes"]), row["memory_bytes"]),
            _number(row["parameters"], ","),
            _number(row["rounds"]),
        )
        for row in log["throughput"]
    ]
    note = (
        f"Training steps, measured interleaved, each variant in a process of its own, on {log['machine']['device']}."
        " Memory: of the whole process on a CPU, of the device on a GPU."
    )
    head = ("variant", "tokens/s (95 %)", "peak memory", "parameters", "rounds")
    return Table(title="Throughput and memory", note=note, head=head, rows=rows)


def speed(log: Log) -> Table:
    """Throughput of pairs, measured interleaved."""
    rows = [
        (Cell(row["a"]), Cell(row["b"]), ratio(row), Cell(verdict(row)), _number(row["rounds"])) for row in log["speed"]
    ]
    note = "Ratios of median tokens per second, measured interleaved (A B A B …) in one run, with 95 % intervals."
    head = ("variant", "against", "relative throughput", "verdict", "rounds")
    return Table(title="Relative throughput", note=note, head=head, rows=rows)


def quality(log: Log) -> Table:
    """Quality of the models at their best evaluation."""
    results = {name: [run["result"] for run in runs_of(log, name) if run["result"]] for name in variants(log)}
    known = [key for key in QUALITIES if any(key in one["quality"] for seeds in results.values() for one in seeds)]
    rows = [
        (
            Cell(name),
            spread([one["best_valid_loss"] for one in seeds], ".4f"),
            spread([one["best_valid_bpb"] for one in seeds], ".4f"),
            *(spread([one["quality"].get(key) for one in seeds], ".1%") for key in known),
            Cell(status(log, name)),
        )
        for name, seeds in results.items()
    ]
    labels = [FIGURES[key][0] for key in known]
    meanings = "".join(f" {label.capitalize()}: {FIGURES[key][1]}." for label, key in zip(labels, known, strict=True))
    note = "Median over seeds and the range, each run at its best evaluation." + meanings
    head = ("variant", "best loss (nats per token)", "best bits per byte", *labels, "runs")
    return Table(title="Quality", note=note, head=head, rows=rows)


def parity(log: Log) -> Table:
    """Difference of MLX's and the reference's training losses from equal weights and batches."""
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
    note = "Training losses in MLX and of the PyTorch reference from equal weights on equal batches, dropout 0."
    head = ("variant", "largest difference (nats)", "steps", "learning rate", "seed")
    return Table(title="Parity with the reference", note=note, head=head, rows=rows)


def agreement(log: Log) -> Table:
    """Difference of MLX's and each reference's validation losses, at equal seeds and tokens."""
    rows = []
    for name in variants(log):
        if backend(name) and (differences := _differences(runs_of(log, base(name)), runs_of(log, name))):
            largest, mean = max(map(abs, differences)), sum(differences) / len(differences)
            rows.append((Cell(name), _number(len(differences)), _number(largest, ".4f"), _number(mean, "+.4f")))
    note = (
        "MLX minus the reference, from equal weights over equal batches. Without dropout only float noise is left,"
        " which grows with the steps and the learning rate; with dropout the two drop other activations."
    )
    head = ("reference", "evaluations", "largest difference (nats)", "mean difference (nats)")
    return Table(title="Validation losses against the reference", note=note, head=head, rows=rows)


def _differences(ours: Sequence[Row], theirs: Sequence[Row]) -> list[float]:
    """Return the differences of the losses at equal seeds and evaluations."""
    known = {(run["seed"], one["tokens"]): one["valid_loss"] for run in theirs for one in run["evals"]}
    evals = [((run["seed"], one["tokens"]), one["valid_loss"]) for run in ours for one in run["evals"]]
    return [loss - known[key] for key, loss in evals if key in known]


def ideas(log: Log) -> Table:
    """One row per variant of an ablation: speedup at the whole budget, cost and final loss."""
    gains = {row["name"]: row for row in log["speedups"] if row["share_of_budget"] == 1}
    tokens = {row["name"]: row["tokens"] for row in log["time_to_target"]}
    costs = {row["name"]: row for row in log["throughput"]}
    key = headline_measure(log)
    rows = []
    for name in variants(log):
        gain, cost = gains.get(name), costs.get(name)
        losses = [run["result"]["best_valid_loss"] for run in runs_of(log, name) if run["result"]]
        rows.append(
            (
                Cell(name),
                Cell(gain["over"] if gain else "—"),
                Cell(verdict(gain[key]) if gain else "—"),
                ratio(gain[key]) if gain else Cell("—"),
                amount(tokens.get(name), _end(log, name, "tokens"), short),
                tokens_per_second(cost) if cost else NOT_MEASURED,
                Cell(memory(cost["memory_bytes"]), cost["memory_bytes"]) if cost else NOT_MEASURED,
                _number(cost and cost["parameters"], ","),
                spread(losses, ".4f"),
            )
        )
    note = (
        f"Speedup by {MEASURES[key]}: 2× is half the time; “no difference”: the interval has 1. Medians over seeds with"
        " 95 % intervals, of the best loss with the range; “> x”: not reached by then. Throughput was measured"
        f" interleaved. On {log['machine']['device']}."
    )
    measured = ("tokens to the target", "tokens/s (95 %)", "peak memory", "parameters", "best loss (nats per token)")
    head = ("variant", "against", "verdict", "speedup", *measured)
    return Table(title="Idea by idea", note=note, head=head, rows=rows)


def runs(log: Log) -> Table:
    """Every run and how it ended."""
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
    head = ("variant", "seed", "status", "best loss", "tokens", "clock (s)", "stopped by", "error")
    return Table(title="Every run", note=f"On {log['machine']['device']}.", head=head, rows=rows)


def _outcome(result: Row | None) -> Sequence[Cell]:
    if result is None:
        return (Cell("—"),) * 4
    return (
        _number(result["best_valid_loss"], ".4f"),
        _number(result["tokens"], ","),
        Cell(seconds(result["train_seconds"]), result["train_seconds"]),
        Cell(result["stopped"]),
    )


def amount(row: Row | None, end: float | None, form: Callable[[float], str]) -> Cell:
    """Format a median and its interval; a missing bound was not reached by the end, shown unless below the median."""
    if row is None:
        return NOT_MEASURED
    middle, low, high = row["median"], row["low"], row["high"]
    beyond = "not reached" if end is None or end < (middle or 0) else f"> {form(end)}"
    if middle is None:
        return Cell(beyond, math.inf)
    if low is None:
        return Cell(form(middle), middle)
    return Cell(f"{form(middle)} ({form(low)}{f' to {beyond}' if high is None else f'–{form(high)}'})", middle)


def seconds(value: float) -> str:
    """Format seconds: 12.3, 1,234."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _number(value: float | None, form: str = "d") -> Cell:
    return NOT_MEASURED if value is None else Cell(f"{value:{form}}", value)


def spread(values: Sequence[float | None], form: str) -> Cell:
    """Format the median over seeds and the range, of those that are numbers."""
    known = [value for value in values if value is not None]
    if not known:
        return NOT_MEASURED
    middle, low, high = median(known), min(known), max(known)
    return Cell(f"{middle:{form}}" + (f" ({low:{form}}–{high:{form}})" if len(known) > 1 else ""), middle)


ON_A_TERMINAL = (final_losses, speedups, targets, throughput, speed)
ALL: tuple[Callable[[Log], Table], ...] = (*ON_A_TERMINAL, quality, parity, agreement, runs)


def markdown(table: Table) -> str:
    """Return a GitHub table and its note, without the title; a sentence where there is no row."""
    if not table.rows:
        return "Not measured."
    rule = ["---:" if numeric else "---" for numeric in table.numeric()]
    lines = [table.head, rule, *([_marked(cell) for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{table.note}"


def _marked(cell: Cell) -> str:
    return escaped(" ".join(cell.text.split())) if cell.value is None else cell.text


def on_terminal(table: Table) -> RichTable:
    """Lay a table out for a terminal, its title above and its note below."""
    shown = RichTable(title=Text(table.title), caption=Text(table.note), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.show_edge = False  # with edges a note as wide as the terminal loses a letter
    shown.title_justify = shown.caption_justify = "left"
    for i, (head, numeric) in enumerate(zip(table.head, table.numeric(), strict=True)):
        longest = max(len(word) for text in (head, *(row[i].text for row in table.rows)) for word in text.split())
        shown.add_column(Text(head), justify="right" if numeric else "left", min_width=longest, overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(cell.text.replace("**", "")) for cell in row))
    return shown
