"""Compare early-stopping rules on finished runs: when each would have stopped, and the loss given up by it.

`python -m bench stopping RUN ...` reads curve.jsonl. A rule changes nothing before it stops, so one long curve is
enough for all; a run that an early-stopping rule ended says nothing about more patient ones.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from mlx_transformer.run.flags import parse
from mlx_transformer.train.optim.stopping import GeneralizationLoss, NoStop, Plateau, StopRule, SuccessiveRises
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.terminal import Terminal

RULES: tuple[StopRule, ...] = (
    NoStop(),
    Plateau(patience=3, min_improvement=0.001),
    Plateau(patience=5, min_improvement=0.001),
    Plateau(patience=5, min_improvement=0.01),
    GeneralizationLoss(percent=0.5),
    GeneralizationLoss(percent=2.0),
    SuccessiveRises(times=2),
    SuccessiveRises(times=3),
)


@dataclass
class Flags:
    """Compare early-stopping rules on finished runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run folders"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of one rule on one curve."""

    rule: StopRule
    tokens: int  # when it stops, or at the end of the curve
    stopped: bool
    best: float  # validation loss until then, nats per token
    given_up: float  # further decrease of the loss after that


def judge(rule: StopRule, tokens: Sequence[int], losses: Sequence[float]) -> Outcome:
    """Apply a rule to a curve of at least one evaluation."""
    ends = [n for n in range(1, len(losses) + 1) if rule(losses[:n])]
    end = ends[0] if ends else len(losses)
    best = min(losses[:end])
    return Outcome(rule=rule, tokens=tokens[end - 1], stopped=bool(ends), best=best, given_up=best - min(losses))


def read(run: Path) -> tuple[list[int], list[float]]:
    """Read tokens and validation losses of a run's evaluations. Raises BadInput if there is none."""
    path = run / "curve.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        evaluations = [line for line in lines if line["kind"] == "eval" and line["valid_loss"] is not None]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"'{path}' cannot be read ({error}): expected the curve of a run") from error
    if not evaluations:
        raise BadInput(f"'{path}' has no evaluation: nothing to compare")
    return [line["tokens"] for line in evaluations], [line["valid_loss"] for line in evaluations]


def show(run: Path, outcomes: Sequence[Outcome]) -> Table:
    """Return a table for people."""
    table = Table("rule", "tokens", "best loss", "given up", title=str(run))
    for one in outcomes:
        tokens = f"{one.tokens:,}" if one.stopped else f"> {one.tokens:,}"
        table.add_row(repr(one.rule), tokens, f"{one.best:.4f}", f"{one.given_up:.4f}")
    return table


def main(prog: str = "python -m bench stopping", args: list[str] | None = None) -> None:
    """Run the command line."""
    flags = parse(Flags, prog, args=args)
    if not flags.runs:
        raise BadInput("expected: python -m bench stopping RUN ...")
    for run in flags.runs:
        curve = read(run)
        Terminal(width=120).print(show(run, [judge(rule, *curve) for rule in RULES]))
