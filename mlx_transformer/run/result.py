"""result.json: what a run was, and what it measured."""

from typing import Any

from mlx_transformer.backend import device_info, versions
from mlx_transformer.nn.model import Model
from mlx_transformer.run.ladder import split_recipe
from mlx_transformer.run.own_code import record
from mlx_transformer.run.plan import Plan
from mlx_transformer.train.parallel import ALONE, Ranks
from mlx_transformer.train.trainer import Progress, Stopped

_SCHEMA_VERSION = 2


def make_result(
    plan: Plan, model: Model, stopped: Stopped, quality: dict[str, Any], ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Return the content of result.json, as result.schema.json describes it."""
    return {
        **known_before(plan, model),
        **_measured(stopped.progress, plan),
        "ranks": None if ranks.size == 1 else _ranks(ranks, stopped.progress, plan.settings.shard),
        "stopped": stopped.why,
        "quality": quality,
    }


def known_before(plan: Plan, model: Model) -> dict[str, Any]:
    """Return the part of result.json that is known before training."""
    tokens, device, shards = plan.tokens, device_info(), plan.corpus.shards
    floor = tokens.floor_bits
    streamed = shards and {"files": len(shards), "bytes": shards.size, "sample_bytes": plan.corpus.train_bytes}
    return {
        "schema_version": _SCHEMA_VERSION,
        "phase": plan.experiment.phase,
        "code": record(plan.experiment.code),
        "branch": plan.settings.branch,
        "recipe_name": _recipe_name(plan.settings.recipe),
        "seed": plan.seed,
        "size": plan.size,
        "device": {name: getattr(device, name) for name in ("name", "backend", "memory_bytes", "tf32")},
        "versions": versions(),
        "corpus": {
            "name": plan.corpus.name,
            "text_column": plan.corpus.text_column,
            "sha256": plan.corpus.sha256,
            "train_tokens": tokens.epoch_tokens,
            "valid_tokens": tokens.valid_tokens,
            "train_bytes": plan.corpus.train_bytes if streamed is None else tokens.text_bytes,
            "valid_bytes": tokens.valid_bytes,
            "floor_bpb": None if floor is None else floor / tokens.valid_bytes,
            "duplicates_removed": plan.corpus.duplicates_removed,
            "streamed": streamed,
        },
        "tokenizer": {
            "kind": plan.tokenizer.kind,
            "vocab_size": plan.tokenizer.vocab_size,
            "unknown_rate": tokens.unknown_rate,
        },
        "config": plan.config.to_dict(),
        "recipe": plan.recipe.to_dict(),
        "parameters": model.count_parameters(),
    }


def _ranks(ranks: Ranks, now: Progress, shard: str | None) -> dict[str, Any]:
    return {
        "count": ranks.size,
        "backend": ranks.backend,
        "communication_share": now.communication_share,
        "peak_memory_bytes": now.peak_memory_of_ranks,
        "weights_bytes": now.weights_of_ranks,
        "optimizer_bytes": now.optimizer_of_ranks,
        "shard": shard or "none",
    }


def _recipe_name(name: str | None) -> str | None:
    """Shorten "/home/me/my_idea.py:FAST" to "my_idea.py:FAST"."""
    named = split_recipe(name or "")
    return name if named is None else f"{named[0].name}:{named[1]}"


def _measured(now: Progress, plan: Plan) -> dict[str, Any]:
    return {
        "steps": now.step,
        "tokens": now.tokens,
        "epochs": now.epochs,
        "train_seconds": now.train_seconds,
        "preparation_seconds": now.preparation_seconds,
        "compile_seconds": now.compile_seconds,
        "eval_seconds": now.eval_seconds,
        "tokens_per_second": now.tokens_per_second,
        "best_valid_loss": now.best_valid_loss,
        "best_valid_bpb": plan.bits_per_byte(now.best_valid_loss),
        "final_valid_loss": now.final_valid_loss,
        "target_loss": plan.limits.target_loss,
        "seconds_to_target": now.seconds_to_target,
        "tokens_to_target": now.tokens_to_target,
        "peak_memory_bytes": now.peak_memory_bytes,
    }
