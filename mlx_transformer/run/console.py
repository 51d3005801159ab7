"""Output of a run: a progress bar on a terminal, plain lines elsewhere, the same lines in log.txt."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn

from mlx_transformer.train.events import Progress as Progressed
from mlx_transformer.train.trainer import Eval, Event, Limits, Prepared, Resumed, Saved, Step, Stopped
from mlx_transformer.utils.terminal import Terminal
from mlx_transformer.utils.text import clock, plural

_LINE_SECONDS = 10.0  # between two lines without a terminal
_SHORTEST_BAR = 6  # characters, with the space before it


class _Terminal(Terminal):
    """Standard output; after a broken pipe (`| head`) the run continues and only log.txt is written."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Console:
    """Printer of a run's events. Lines printed before `log_to` is called are written to the log then."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.terminal = _Terminal(soft_wrap=True)
        self._log: Path | None = None
        self._unwritten: list[str] = []
        self._bar: Progress | None = None
        self._last_line = time.monotonic()
        self._valid_loss: float | None = None
        self._compiled: tuple[float, float] | None = None  # when the step was, and the share done by then

    def say(self, text: str) -> None:
        """Print one line, unless quiet, and write it to the log."""
        self._write(text)
        if not self.quiet:
            self.terminal.say(text)

    def _write(self, text: str) -> None:
        self._unwritten.append(text)
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in self._unwritten)
            self._unwritten.clear()

    def log_to(self, path: Path) -> None:
        """Write the lines so far, and all further ones, to this file as well."""
        self._log = path
        if self._unwritten:
            self._write(self._unwritten.pop())

    def training(self, limits: Limits) -> "Console":
        """Return a context manager that shows a progress bar towards the limits."""
        self.limits = limits
        return self

    def __enter__(self) -> "Console":
        if self.terminal.is_terminal and not self.quiet:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                console=self.terminal,
                transient=True,
                expand=True,
            )
            self._bar.add_task("compiling ...", total=1.0)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def show(self, event: Event, memory: int = 0) -> None:
        """Print an event of the trainer; memory: peak, in bytes."""
        if isinstance(event, Step):
            self._step(event, memory)
        elif isinstance(event, Eval):
            self._valid_loss = event.valid_loss
            best = " (best so far)" if event.improved else ""
            scores = "".join(
                f", {name} {100 * value:.1f} %" for name, value in event.scores.items() if name == "accuracy"
            )
            self.say(
                f"step {event.step}: validation loss {event.valid_loss:.4f}{best}{scores} after {event.seconds:.1f} s"
            )
        elif isinstance(event, Resumed):
            for note in event.notes:
                self.say(note)
            self.say(f"resuming from step {event.step}")
        elif isinstance(event, Prepared):
            self.say(f"prepared from the training text in {event.seconds:.1f} s, a part of the training time")
        elif isinstance(event, Saved):
            self._write(f"step {event.step}: saved {event.path.name}")
        elif isinstance(event, Stopped):
            now = event.progress
            times = f"{now.train_seconds:.1f} s of training, {now.compile_seconds:.1f} s of compilation"
            self.say(f"stopped: {event.why} after {plural(now.step, 'step')}, {times}")
            if now.communication_share is not None:
                self.say(f"communication between ranks: {now.communication_share:.1%} of a step")
            if now.peak_memory_of_ranks:
                self.say(f"largest memory of a rank: {_memory_of_ranks(now)}")

    def _step(self, event: Step, memory: int) -> None:
        now, share = time.monotonic(), self._share(event)
        if self._compiled is None and event.seconds:
            self._compiled = now, share
        figures = [
            f"step {event.step}",
            self._left(now, share),
            f"loss {event.metrics['loss']:.3f}",
            "" if self._valid_loss is None else f"valid {self._valid_loss:.3f}",
            f"{event.tokens_per_second:,.0f} tokens/s" if event.tokens_per_second else "",
            f"{memory / 2**30:.1f} GiB",
        ]
        figures = [figure for figure in figures if figure]
        if self._bar is not None:
            fitting = fit(figures, self.terminal.width - _SHORTEST_BAR)
            self._bar.update(self._bar.task_ids[0], completed=share, description=fitting)
        elif now - self._last_line >= _LINE_SECONDS:
            self.say(", ".join(figures))
            self._last_line = now

    def _share(self, event: Step) -> float:
        """Return the used share of the nearest limit."""
        pairs = (
            (event.step, self.limits.max_steps),
            (event.tokens, self.limits.max_tokens),
            (event.epochs, self.limits.max_epochs),
            (event.seconds, self.limits.max_seconds),
        )
        return max((used / limit for used, limit in pairs if limit), default=0.0)

    def _left(self, now: float, share: float) -> str:
        """Say how long the rest takes, evaluations and saving included, at the pace since the step was compiled."""
        began, done = self._compiled or (now, share)
        return f"{clock((now - began) * (1 - share) / (share - done))} left" if done < share < 1 else ""


def _memory_of_ranks(now: Progressed) -> str:
    weights, optimizer, peak = (
        f"{max(sizes) / 2**20:,.1f} MiB"
        for sizes in (now.weights_of_ranks, now.optimizer_of_ranks, now.peak_memory_of_ranks)
    )
    return f"{weights} of weights, {optimizer} of optimizer state, {peak} at the peak"


def fit(figures: Sequence[str], width: int) -> str:
    """Join figures, the most important first, as far as they fit a width; the first one always does."""
    kept = list(figures)
    while len(kept) > 1 and len("  ".join(kept)) > width:
        kept.pop()
    return "  ".join(kept)
