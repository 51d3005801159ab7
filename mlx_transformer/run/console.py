"""Output of a run: a progress bar on a terminal, plain lines elsewhere, the same lines in log.txt."""

import os
import sys
import time
from pathlib import Path
from types import TracebackType

import rich.console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mlx_transformer.train.trainer import Eval, Event, Limits, Resumed, Saved, Step, Stopped
from mlx_transformer.utils.text import plural

_LINE_SECONDS = 10.0  # between two lines without a terminal


class _Terminal(rich.console.Console):
    """Standard output; after a broken pipe (`| head`) the run continues and only log.txt is written."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Console:
    """Printer of a run's events. Lines printed before `log_to` is called are written to the log then."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.terminal = _Terminal(highlight=False, soft_wrap=True)
        self._log: Path | None = None
        self._unwritten: list[str] = []
        self._bar: Progress | None = None
        self._last_line = time.monotonic()
        self._valid_loss: float | None = None

    def say(self, text: str) -> None:
        """Print one line, unless quiet, and write it to the log."""
        self._write(text)
        if not self.quiet:
            self.terminal.print(text, markup=False)

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
                TextColumn("step {task.fields[step]}"),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.terminal,
                transient=True,
            )
            self._bar.add_task("training", total=1.0, step=0, figures="compiling ...")
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
            self.say(f"step {event.step}: validation loss {event.valid_loss:.4f}{best} after {event.seconds:.1f} s")
        elif isinstance(event, Resumed):
            for note in event.notes:
                self.say(note)
            self.say(f"resuming from step {event.step}")
        elif isinstance(event, Saved):
            self._write(f"step {event.step}: saved {event.path.name}")
        elif isinstance(event, Stopped):
            now = event.progress
            times = f"{now.train_seconds:.1f} s of training, {now.compile_seconds:.1f} s of compilation"
            self.say(f"stopped: {event.why} after {plural(now.step, 'step')}, {times}")

    def _step(self, event: Step, memory: int) -> None:
        figures = [f"loss {event.metrics['loss']:.3f}"]
        if self._valid_loss is not None:
            figures.append(f"valid {self._valid_loss:.3f}")
        if event.tokens_per_second:
            figures.append(f"{event.tokens_per_second:,.0f} tokens/s")
        figures.append(f"{memory / 2**30:.1f} GiB")
        if self._bar is not None:
            share = self._share(event)
            self._bar.update(self._bar.task_ids[0], completed=share, step=event.step, figures="  ".join(figures))
        elif time.monotonic() - self._last_line >= _LINE_SECONDS:
            left = self._left(event)
            self.say(f"step {event.step}: {', '.join(figures)}{left}")
            self._last_line = time.monotonic()

    def _share(self, event: Step) -> float:
        """Return the used share of the nearest limit."""
        pairs = (
            (event.step, self.limits.max_steps),
            (event.tokens, self.limits.max_tokens),
            (event.epochs, self.limits.max_epochs),
            (event.seconds, self.limits.max_seconds),
        )
        return max((used / limit for used, limit in pairs if limit), default=0.0)

    def _left(self, event: Step) -> str:
        share = self._share(event)
        return f", {event.seconds * (1 / share - 1):.0f} s left" if 0 < share < 1 else ""
