"""Train tiny models of several phases as one rank, and write what came of it: `python worker.py OUT RUN...` (JSON)."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

import mlx_transformer as mt
from mlx_transformer.data.tokens import Tokens
from mlx_transformer.run.ladder import find_branch, find_phase
from mlx_transformer.train import Eval, Limits, RunOptions, Step, optim
from mlx_transformer.train.parallel import join
from mlx_transformer.utils.trees import by_path

SIZE = {"vocab_size": 67, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 64, "seq_len": 16, "dropout": 0.0}
BATCH = 8


class Adafactor(optim.UpdateRule):
    """A rule whose state has other shapes than its parameter."""

    def make(self):
        from mlx import optimizers  # after mlx_transformer, which prepares MLX

        return optimizers.Adafactor(0.0, relative_step=False, scale_parameter=False)


MIXED = (
    optim.Group(name="embedding", select=optim.Paths(r"embedding\.weight"), optimizer=optim.Sophia()),
    optim.Group(name="head", select=optim.Paths(r"head\.weight"), optimizer=optim.Lion(), lr_multiplier=0.1),
    optim.Group(name="ffn", select=optim.Paths(r".*ffn.*weight"), optimizer=optim.RigL(rule=optim.Muon(), every=4)),
    optim.Group(name="mixer", select=optim.Paths(r".*mixer.*weight"), optimizer=Adafactor(), lr_multiplier=0.1),
    optim.Group(name="vectors", select=optim.Vectors(), optimizer=optim.AdamW()),
)


def text() -> Tokens:
    steps = np.random.default_rng(0).integers(-3, 4, 4000)
    train = (np.abs(np.cumsum(steps)) % 67).astype(np.uint16)
    facts = {"valid_bytes": 500, "valid_documents": 1, "floor_bits": None, "unknown_rate": 0.0, "lossless": True}
    return Tokens(train, train[:500], 0, **facts)


def run(
    ranks,
    phase: int,
    branch: str | None = None,
    accumulate: int = 1,
    steps: int = 24,
    shard: str = "none",
    mixed: bool = False,
    folder: str | None = None,
) -> dict:
    module = find_phase(phase)
    kind = find_branch(module, branch)
    recipe = module.RECIPE.at("nano")
    if mixed:
        recipe = replace(recipe, groups=MIXED, average=optim.EMA(horizon_tokens=1000), clip=optim.AGC(ratio=0.1))
    recipe = replace(recipe, batch_tokens=BATCH * SIZE["seq_len"], accumulate=accumulate)
    model = kind(kind.Config(**SIZE), 0)
    checkpoints = None if folder is None else Path(folder)
    options = RunOptions(eval_every=12, ranks=ranks, shard=shard, checkpoints=checkpoints)
    events = list(mt.fit(model, recipe, text(), limits=Limits(max_steps=steps), options=options))
    weights = by_path(model.parameters())
    return {
        "metrics": [event.metrics for event in events if isinstance(event, Step)],
        "valid": [event.valid_loss for event in events if isinstance(event, Eval)],
        # The gradient of a key's bias is 0, since softmax is invariant to it: Adam makes steps of its rounding errors.
        "weights": {
            path: float(np.linalg.norm(np.array(w))) for path, w in weights.items() if "k_proj.bias" not in path
        },
        "bits": {path: int(np.array(w).view(np.uint32).sum(dtype=np.uint64)) for path, w in weights.items()},
        "share": events[-1].progress.communication_share,
        "held": events[-1].progress.optimizer_of_ranks,
        "memory": events[-1].progress.peak_memory_of_ranks,
    }


def main() -> None:
    ranks = join()
    with ranks.running():
        results = [run(ranks, **json.loads(one)) for one in sys.argv[2:]]
    Path(f"{sys.argv[1]}.{ranks.rank}").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
