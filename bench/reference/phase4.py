"""Phase 4 in PyTorch: phase 3's model, whose attention is fused already, with grouped heads (n_kv_heads)."""

from bench.reference.phase2 import Decoder, Training, rules
from bench.reference.phase3 import Model, TiedModel

__all__ = ["BRANCHES", "Decoder", "Model", "Training", "rules"]

BRANCHES = {"tied": TiedModel}
