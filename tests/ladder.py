"""All phases, branches and ideas (ideas.py), and small models of them: what the shared tests run over."""

import importlib
import importlib.util

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from tests.ideas import IDEAS

PHASES = [n for n in range(1, 7) if importlib.util.find_spec(f"phases.phase{n}")]
V = 67
TEXT = np.minimum(np.random.default_rng(1).geometric(0.15, 600) - 1, V - 1)  # tokens, many of them repeated
TEXT[0] = 0
TINY = {"vocab_size": V, "d_model": 32, "n_layers": 4, "n_heads": 4, "d_ff": 48, "seq_len": 17, "dropout": 0.0}


def modules():
    return {n: importlib.import_module(f"phases.phase{n}") for n in PHASES}


def kinds():
    """Return all Model classes by name: "1", "3-rope", "idea-shared"."""
    found = {}
    for n, module in modules().items():
        found[str(n)] = module.Model
        found |= {f"{n}-{name}": kind for name, kind in module.BRANCHES.items()}
    found = {name: with_sources(kind) if kind.parallel else kind for name, kind in found.items()}
    return found | {f"idea-{name}": kind for name, kind in IDEAS.items()}


def with_sources(kind):
    """Return a translator that takes the rows of the shared tests as targets and has a source for each.

    The source is the row's own first five tokens, a padding between them where the second one is even: it goes with its
    row wherever a test puts it, and a cached prefix of five tokens has it.
    """

    def source(rows):
        first = rows[:, :5]
        return mx.where((mx.arange(5) == 2) & (first[:, 1:2] % 2 == 0), -1, first)

    class Sourced(kind):
        def context(self, tokens, cache=None):
            if cache is None:
                return self._beside(self.encode(source(tokens)), tokens)
            if not cache.layers[0].memory.arrays:
                self.read(source(tokens), cache)
            return super().context(tokens, cache)

        def inputs(self, batch):
            n = batch.shape[1]
            first = mx.pad(source(batch), [(0, 0), (0, n - 5)], constant_values=mx.array(-1))
            return super().inputs(mx.stack([first, batch], axis=1))

    return Sourced


def tiny(kind, **numbers):
    """Return a small model in evaluation mode, with noise added to its weights so that no parameter is 0."""
    model = kind(kind.Config(**{**TINY, **numbers}))
    mx.random.seed(5)
    model.update(tree_map(lambda w: w + 0.1 * mx.random.normal(w.shape), model.parameters()))
    model.prepare(TEXT % model.config.vocab_size, 0)
    model.eval()
    return model


def tokens(batch=2, length=17, seed=3):
    return mx.random.randint(0, V, (batch, length), key=mx.random.key(seed))


def in_parts(net, x, lengths):
    """Return the logits of x (B, L), read through the cache in parts of these lengths."""
    cache, start, out = net.make_cache(len(x)), 0, []
    for length in lengths:
        out.append(net(x[:, start : start + length], cache))
        start += length
    return mx.concatenate(out, axis=1)
