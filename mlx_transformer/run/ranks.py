"""Training commands over several ranks: what all must have in common, and what only rank 0 does."""

import hashlib
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_transformer.backend import versions
from mlx_transformer.data.shards import check_count
from mlx_transformer.data.tokens import StreamedTokens, Tokens
from mlx_transformer.nn.model import Model
from mlx_transformer.run.flags import read_json
from mlx_transformer.run.ladder import Experiment
from mlx_transformer.run.own_code import ROOT, record
from mlx_transformer.run.plan import Plan
from mlx_transformer.run.settings import Settings, resume_settings, settings_type
from mlx_transformer.train.parallel import Ranks
from mlx_transformer.train.parts import PARTS, PIPELINE, TENSOR, count_shares
from mlx_transformer.train.sharding import OPTIMIZER
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.trees import by_path

_OWN = ("out", "resume", "quiet", "prompt", "log", "device")  # settings that ranks may differ in
_CONTENT = ("data", "valid", "tokenizer", "init_from", "recipe")  # compared by content: their paths may differ


def share_settings(experiment: Experiment, settings: Settings, ranks: Ranks) -> Settings:
    """Return the settings of a resumed run, whose folder only rank 0 has to have."""
    if ranks.size == 1 or settings.resume is None:
        return settings
    resumed = ranks.in_turn(lambda: resume_settings(experiment, settings) if ranks.rank == 0 else settings)
    flags = {name: value for name, value in resumed.to_dict().items() if name != "resume"}
    flags = ranks.gather(flags)[0]
    return settings if ranks.rank == 0 else read_json(settings_type(experiment), flags, "the settings of rank 0")


def check_text(plan: Plan, ranks: Ranks) -> None:
    """Raise BadInput for what ranks cannot divide: pairs, whose batches differ in size, and fewer files than ranks."""
    if isinstance(plan.tokens, StreamedTokens) and plan.corpus.shards is not None:
        check_count(plan.corpus.shards, count_shares(plan.settings.shard, ranks))
    if ranks.size > 1 and not isinstance(plan.tokens, Tokens):
        raise BadInput("a translator trains in one process: start it without mlx.launch")


def check_alike(plan: Plan, model: Model, ranks: Ranks) -> None:
    """Raise BadInput where a rank differs from rank 0 in code, versions, text, settings or initial weights."""
    if ranks.size == 1:
        return
    settings = {name: v for name, v in plan.settings.to_dict().items() if name not in (*_OWN, *_CONTENT)}
    own_parts = plan.settings.shard in PARTS  # whose initial weights are compared once the model is split
    facts: dict[str, Any] = {
        "version of Python, MLX or this project": versions(),
        "code": [hash_of_project(), record(plan.experiment.code), record(plan.recipe_code)],
        "text": plan.corpus.sha256,
        "tokenizer": plan.tokenizer.sha256,
        "set of settings": [plan.experiment.phase, settings, plan.config.to_dict(), plan.recipe.to_dict()],
        "set of initial weights": None if own_parts else _hash_of_weights(model),
    }
    ranks.check_equal(facts)


def hash_of_project() -> str:
    """Hash the code that trains and decodes."""
    digest = hashlib.sha256()
    for folder in ("mlx_transformer", "phases"):
        for file in sorted(path for kind in ("*.py", "*.cpp") for path in (ROOT / folder).rglob(kind)):
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _hash_of_weights(model: Model) -> str:
    digest = hashlib.sha256()
    for path, value in by_path(model.parameters()).items():
        digest.update(path.encode() + np.array(value.astype(mx.float32)).tobytes())
    return digest.hexdigest()


def describe(ranks: Ranks, batch: int, shard: str | None) -> str:
    """Say how many ranks there are, and what each of them computes and keeps."""
    parts = {TENSOR: f"1/{ranks.size} of the heads and hidden units", PIPELINE: f"1/{ranks.size} of the layers"}
    share = parts.get(shard or "", f"{batch // ranks.size} sequences of a batch")
    state = f" and 1/{ranks.size} of the optimizer's state" if shard == OPTIMIZER else ""
    return f"{ranks.size} ranks over {ranks.backend}, each with {share}{state}"
