"""Loss scaling for float16, in which gradients under 6e-8 underflow."""

from dataclasses import dataclass

import mlx.core as mx

Memory = dict[str, mx.array]


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, "Mixed Precision Training", sec. 3.2).

    The loss is multiplied by the scale, and its gradients are divided by it in float32. A step whose gradients overflow
    is skipped and the scale halved; after growth_steps steps without an overflow it is doubled. The scale is a power of
    two, so that it causes no rounding. The defaults are those of PyTorch's GradScaler. The scale is at least 1, where
    an overflow counts as divergence.
    """

    initial: float = 2.0**16
    growth_steps: int = 2000

    def start(self) -> Memory:
        """Return the scale, the steps since it last changed, and the number of skipped steps: scalars."""
        return {"scale": mx.array(self.initial), "steps_since_change": mx.array(0), "skipped_steps": mx.array(0)}

    def after(self, memory: Memory, finite: mx.array) -> Memory:
        """Return the state after a step; finite: bool scalar, whether all its gradients were finite."""
        steps = mx.where(finite, memory["steps_since_change"] + 1, 0)
        grows = steps >= self.growth_steps
        factor = mx.where(finite, mx.where(grows, 2.0, 1.0), 0.5)
        return {
            "scale": mx.maximum(memory["scale"] * factor, 1.0),
            "steps_since_change": mx.where(grows, 0, steps),
            "skipped_steps": memory["skipped_steps"] + mx.where(finite, 0, 1),
        }
