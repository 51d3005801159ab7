"""curve.jsonl: the losses of a run over its steps."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_transformer.train.trainer import Eval, Event, Resumed, Step
from mlx_transformer.utils.files import atomic_write


class Curve:
    """Writer of curve.jsonl: a line for each evaluation, and for every log_every-th step."""

    def __init__(self, path: Path, bits_per_byte: Callable[[float | None], float | None], log_every: int) -> None:
        self.path, self.bits_per_byte, self.log_every = path, bits_per_byte, log_every
        self.lines: list[dict[str, Any]] | None = None  # None until the first event, which may be Resumed

    def write(self, event: Event) -> None:
        """Append the line of an Eval or a logged Step; a resumed run first drops the lines that it will write again."""
        if self.lines is None:
            resumed = event if isinstance(event, Resumed) else Resumed(step=0)
            self._begin({"log": resumed.step, "eval": resumed.evaluated_step})
        if isinstance(event, Eval):
            self._add(
                "eval",
                event,
                valid_loss=event.valid_loss,
                valid_bpb=self.bits_per_byte(event.valid_loss),
                **event.scores,
            )
        elif isinstance(event, Step) and event.step % self.log_every == 0:
            self._add(
                "log",
                event,
                **event.metrics,
                learning_rate=event.learning_rate,
                grad_norm=event.gradient_norm,
                tokens_per_second=event.tokens_per_second,
                data_wait_share=event.data_wait_share,
            )

    def _begin(self, last: dict[str, int]) -> None:
        """Keep the lines up to the last step of their kind."""
        self.lines = [line for line in _read_lines(self.path) if line["step"] <= last[line["kind"]]]
        atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def _add(self, kind: str, event: Step | Eval, **values: Any) -> None:
        values = {name: _finite(value) for name, value in values.items()}
        line = {"kind": kind, "step": event.step, "tokens": event.tokens, "seconds": event.seconds, **values}
        assert self.lines is not None
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _finite(value: float | None) -> float | None:
    """Replace NaN and infinity, which JSON lacks, by None."""
    return value if value is not None and math.isfinite(value) else None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a curve; a killed run may leave part of one at the end."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
