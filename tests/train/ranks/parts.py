"""Train and decode tiny models of which each rank has a part: `python parts.py OUT JOB...` (JSON)."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

import mlx_transformer as mt
from mlx_transformer.generate.decoding import decode
from mlx_transformer.run.ladder import find_branch, find_phase
from mlx_transformer.train import Eval, Limits, RunOptions, Step
from mlx_transformer.train.parallel import join
from mlx_transformer.train.parts import split_model
from mlx_transformer.utils.trees import by_path
from tests.train.ranks.worker import BATCH, SIZE, text

PROMPTS = [[5, 9, 2, 60], [3, 8]]


def make(phase: int, branch: str | None, **numbers):
    module = find_phase(phase)
    kind = find_branch(module, branch)
    return module, kind(kind.Config(**SIZE | numbers), 0)


def train(ranks, phase: int, branch: str | None = None, shard: str = "none", steps: int = 10, folder: str = "") -> dict:
    """Train, or resume from the checkpoints in a folder; return what rank 0 has of it."""
    module, model = make(phase, branch)
    recipe = replace(module.RECIPE.at("nano"), batch_tokens=BATCH * SIZE["seq_len"])
    options = RunOptions(eval_every=5, ranks=ranks, shard=shard, checkpoints=Path(folder) if folder else None)
    events = list(mt.fit(model, recipe, text(), limits=Limits(max_steps=steps), options=options))
    losses = {e.step: [e.metrics["loss"], e.gradient_norm] for e in events if isinstance(e, Step)}
    valid = {e.step: e.valid_loss for e in events if isinstance(e, Eval)}
    weights = {path: float(np.linalg.norm(np.array(w))) for path, w in by_path(model.parameters()).items()}
    # The gradient of a key's bias is 0, since softmax is invariant to it: Adam makes steps of its rounding errors.
    return {"losses": losses, "valid": valid, "weights": {p: w for p, w in weights.items() if "k_proj.bias" not in p}}


def generate(ranks, phase: int, branch: str | None = None, shard: str = "none") -> dict:
    """Return logits, the greedy tokens after two prompts, and the share of the weights that this rank has."""
    _, model = make(phase, branch)
    key = mx.random.key(1)
    model.update(tree_map(lambda w: w + 0.2 * mx.random.normal(w.shape, key=key), model.parameters()))
    size = model.count_parameters()["total"]
    split_model(model, shard, ranks)
    model.eval()
    logits = model(mx.array([PROMPTS[0] * 3]))
    own = sum(value.size for value in by_path(model.parameters()).values())
    return {"logits": logits.tolist(), "tokens": list(decode(model, PROMPTS, 20)), "share": own / size}


JOBS = {"train": train, "generate": generate}


def main() -> None:
    ranks = join()
    with ranks.running():
        results = [JOBS[job.pop("job")](ranks, **job) for job in map(json.loads, sys.argv[2:])]
    Path(f"{sys.argv[1]}.{ranks.rank}").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
