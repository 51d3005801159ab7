"""Decoding over the ranks that `mlx.launch` starts: each has a part of the model, and rank 0 alone prints."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path

import mlx.core as mx

from mlx_transformer.backend import versions
from mlx_transformer.data.tokenizers import Tokenizer
from mlx_transformer.generate.sampling import Sampling
from mlx_transformer.nn.model import Model
from mlx_transformer.run.commands.model import load_model
from mlx_transformer.run.ranks import hash_of_project
from mlx_transformer.train.parallel import Ranks
from mlx_transformer.train.parts import split_model
from mlx_transformer.train.split import Split
from mlx_transformer.utils.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class WatchedSampling(Sampling):
    """Sampling that tells the other ranks, at each token, that this one advances."""

    ranks: Ranks

    def __call__(self, logits: mx.array, key: mx.array) -> mx.array:
        self.ranks.advance("decoding")
        return super().__call__(logits, key)


def watched(sampling: Sampling, ranks: Ranks) -> Sampling:
    """Return the same distribution, under the eyes of the other ranks."""
    return WatchedSampling(ranks=ranks, **{field.name: getattr(sampling, field.name) for field in fields(Sampling)})


@contextmanager
def first_complains(ranks: Ranks) -> Iterator[None]:
    """Let rank 0 alone say what is wrong with input that all have in common."""
    try:
        yield
    except BadInput:
        if ranks.rank:
            ranks.leave(2)
        raise


@contextmanager
def first_prints(ranks: Ranks, *, at_once: bool) -> Iterator[None]:
    """Let rank 0 alone print, at once or at the end, when it is known that no rank was lost meanwhile.

    Where one is lost, the logits are whatever was in memory.
    """
    printed = io.StringIO()
    with nullcontext() if at_once and ranks.rank == 0 else redirect_stdout(printed):
        yield
    ranks.gather(None)
    if ranks.rank == 0:
        print(printed.getvalue(), end="")


def load_part(run: Path, code: str | None, shard: str, command: str, ranks: Ranks) -> tuple[Model, Tokenizer]:
    """Load this rank's part of a model, and the tokenizer; command: what all ranks are to have in common.

    Raises BadInput, the same on every rank, for a model that cannot be loaded or split, and where the ranks differ.
    """
    splits: list[Split | None] = []
    if ranks.watch is not None:
        ranks.watch.ends = "; all ranks end"

    def divide(model: Model) -> None:
        if model.parallel:
            raise BadInput(f"--shard {shard}: a translator decodes in one process; leave it out")
        splits.append(split_model(model, shard, ranks))

    def read() -> tuple[Model, Tokenizer]:
        with redirect_stderr(io.StringIO()) if ranks.rank else nullcontext():
            return load_model(run, code, divide)

    model, tokenizer = ranks.in_turn(read)
    ranks.check_equal(
        {"command line": command, "version of Python, MLX or this project": versions(), "code": hash_of_project()}
    )
    assert splits[0] is not None, "several ranks, as the caller has checked"
    splits[0].check_alike()
    return model, tokenizer
