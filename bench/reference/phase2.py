"""Phase 2 in PyTorch: phase 1's model with the training techniques of 2016-2019.

Other schedules (Loshchilov & Hutter 2017, eq. 5), label smoothing (Szegedy et al. 2016, sec. 7), gradient accumulation,
a learning rate for each kind of layer (Howard & Ruder 2018, sec. 3.2).
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.reference import phase1
from bench.reference.phase1 import Decoder, Model, Owns, compile_for

__all__ = ["Decoder", "Model", "Training", "rules"]


def _inverse_sqrt(tokens: float, warmup: float) -> float:
    return math.sqrt(warmup / tokens)


def _linear(tokens: float, warmup: float, total_tokens: float, final: float) -> float:
    return 1 - (1 - final) * min(1, (tokens - warmup) / (total_tokens - warmup))


def _cosine(tokens: float, warmup: float, total_tokens: float, final: float) -> float:
    angle = math.pi * min(1, (tokens - warmup) / (total_tokens - warmup))
    return final + (1 - final) * (1 + math.cos(angle)) / 2


def _wsd(tokens: float, warmup: float, total_tokens: float, final: float, decay_tokens: float) -> float:
    left = min(max((total_tokens - tokens) / decay_tokens, 0), 1)
    return final + (1 - final) * left


# After the warm-up: (tokens, warm-up tokens, the schedule's parameters) -> share of the peak learning rate.
SCHEDULES: dict[str, Callable[..., float]] = {
    "Constant": lambda tokens, warmup: 1.0,
    "InverseSqrt": _inverse_sqrt,
    "Linear": _linear,
    "Cosine": _cosine,
    "WSD": _wsd,  # phase 5's
}
BUILT = ("accumulate", "label_smoothing")
NEUTRAL = {name: value for name, value in phase1.NEUTRAL.items() if name not in BUILT}


def rules(
    recipe: Mapping[str, Any], owns: Owns = phase1.OWNS, optimizers: Collection[str] = ("AdamW",)
) -> dict[str, Any]:
    """Return the arguments of Training for a recipe as result.json records it. Raises ValueError for a missing rule."""
    phase1.check(recipe, SCHEDULES, NEUTRAL, owns, optimizers)
    schedule = dict(recipe["schedule"])
    return {
        **phase1.numbers(recipe, owns),
        "schedule": SCHEDULES[schedule.pop("kind")],
        "warmup_tokens": schedule.pop("warmup_tokens"),
        "shape": schedule,
        "label_smoothing": recipe["label_smoothing"],
        "accumulate": recipe["accumulate"],
    }


class Training(phase1.Training):
    """Phase 1's training with a schedule, label smoothing and gradient accumulation."""

    def __init__(
        self,
        model: Model,
        *,
        schedule: Callable[..., float],
        shape: Mapping[str, float],  # the schedule's parameters
        label_smoothing: float,
        accumulate: int,
        compiled: bool = False,
        **numbers: Any,
    ) -> None:
        super().__init__(model, **numbers)
        self.schedule, self.shape = schedule, shape
        self.label_smoothing, self.accumulate = label_smoothing, accumulate
        self.loss = compile_for(self.device, self._smoothed) if compiled else self._smoothed

    def _smoothed(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(tokens).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), label_smoothing=self.label_smoothing)

    def factor(self) -> float:
        if self.tokens < self.warmup_tokens:
            return self.tokens / self.warmup_tokens
        return self.schedule(self.tokens, self.warmup_tokens, **self.shape)

    def backward(self, sequences: Tensor) -> Tensor:
        total = torch.zeros((), device=self.device)
        for part in sequences.tensor_split(min(self.accumulate, len(sequences))):
            loss = self.loss(part[:, :-1], part[:, 1:]) * (len(part) / len(sequences))
            loss.backward()
            total += loss.detach()
        return total
