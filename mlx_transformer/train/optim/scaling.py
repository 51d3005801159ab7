"""Loss scaling, which float16 needs: gradients under 6e-8 would be lost in it."""

from dataclasses import dataclass

import mlx.core as mx

Memory = dict[str, mx.array]


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, "Mixed Precision Training", sec. 3.2).

    The loss is multiplied by the scale and its gradients are divided by it again, in float32. A step whose gradients
    overflowed is left out and the scale halved; after growth_steps without one it is doubled. The scale is a power of
    two, so that it rounds nothing. The numbers are those of PyTorch's GradScaler; never below 1, where an overflow is
    no matter of scale and counts as divergence.
    """

    initial: float = 2.0**16
    growth_steps: int = 2000

    def start(self) -> Memory:
        """The scale, the steps since it was changed, and how many steps were left out: scalars."""
        return {"scale": mx.array(self.initial), "calm_steps": mx.array(0), "skipped_steps": mx.array(0)}

    def after(self, memory: Memory, finite: mx.array) -> Memory:
        """What a step leaves behind; finite: bool scalar, whether all its gradients were numbers."""
        calm = mx.where(finite, memory["calm_steps"] + 1, 0)
        grows = calm >= self.growth_steps
        factor = mx.where(finite, mx.where(grows, 2.0, 1.0), 0.5)
        return {
            "scale": mx.maximum(memory["scale"] * factor, 1.0),
            "calm_steps": mx.where(grows, 0, calm),
            "skipped_steps": memory["skipped_steps"] + mx.where(finite, 0, 1),
        }
