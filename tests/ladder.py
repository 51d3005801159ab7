"""All phases, branches and ideas (ideas.py), and small models of them: what the shared tests run over."""

import importlib
import importlib.util

import mlx.core as mx
from mlx.utils import tree_map

from tests.ideas import IDEAS

PHASES = [n for n in range(1, 7) if importlib.util.find_spec(f"phases.phase{n}")]
V = 67
TINY = {"vocab_size": V, "d_model": 32, "n_layers": 4, "n_heads": 4, "d_ff": 48, "seq_len": 17, "dropout": 0.0}


def modules():
    return {n: importlib.import_module(f"phases.phase{n}") for n in PHASES}


def kinds():
    """Return all Model classes by name: "1", "3-rope", "idea-shared"."""
    found = {}
    for n, module in modules().items():
        found[str(n)] = module.Model
        found |= {f"{n}-{name}": kind for name, kind in module.BRANCHES.items()}
    return found | {f"idea-{name}": kind for name, kind in IDEAS.items()}


def tiny(kind, **numbers):
    """Return a small model in evaluation mode, with noise added to its weights so that no parameter is 0."""
    model = kind(kind.Config(**{**TINY, **numbers}))
    mx.random.seed(5)
    model.update(tree_map(lambda w: w + 0.1 * mx.random.normal(w.shape), model.parameters()))
    model.eval()
    return model


def tokens(batch=2, length=17, seed=3):
    return mx.random.randint(0, V, (batch, length), key=mx.random.key(seed))
