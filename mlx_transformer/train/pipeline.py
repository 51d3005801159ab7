"""Pipeline parallel: each rank has some of a model's blocks, in order; the first has the embedding, the last the head.

GPipe (Huang et al. 2019, arXiv 1811.06965): a batch is divided into microbatches, of which a rank computes one while
the next rank computes the one before. A rank computes all forward passes, then all backward passes, for which it keeps
the inputs of its blocks alone and computes the rest again (sec. 2.3); the last rank computes both at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_map

from mlx_transformer import ops
from mlx_transformer.backend import in_parts
from mlx_transformer.nn.block import MixedInputBlock
from mlx_transformer.nn.cache import Cache, LayerCache, State
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.depth import MixtureOfDepths
from mlx_transformer.nn.dropout import Dropout
from mlx_transformer.nn.head import TiedHead
from mlx_transformer.nn.model import Model
from mlx_transformer.nn.moe import MixtureOfExperts
from mlx_transformer.nn.sampled import SampledSoftmax
from mlx_transformer.train.optim.groups import Arrays, Group, UpdateRule
from mlx_transformer.train.parallel import Ranks, Signals
from mlx_transformer.train.recipe import Recipe
from mlx_transformer.train.split import Split
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.trees import Tree, by_path

MICROBATCHES = 4  # for each rank, as far as there are sequences: at most 1 / 5 of a step is then spent in waiting
# Steps of a model that a rank with some of the blocks computes as the classes below do, and no other way.
_STEPS = (
    *("hidden", "run_blocks", "run_block", "stack", "objective", "training_losses"),
    *("loss", "predict", "token_loss", "last_logits"),
)
_NEEDS_OTHERS = (MixtureOfExperts, MixtureOfDepths, MixedInputBlock)  # losses of all blocks, or the embeddings in each
_CHILDREN = {"embedding", "position", "shifts", "blocks", "final_norm", "head", "dropout"}


class Absent(nn.Module):
    """A part that another rank has: x -> x, without parameters."""

    def make_cache(self, batch: int) -> LayerCache:
        """Return a cache of nothing."""
        return State()

    def __call__(self, x: mx.array, ctx: Ctx | None = None) -> mx.array:
        return x


class PipelineSplit(Split):
    """A model of which each rank has a range of blocks. Raises BadInput as `check_pipeline` does.

    Positions, the token shift's factors, and an embedding that is the head as well, are on every rank.
    """

    def __init__(self, model: Model, ranks: Ranks) -> None:
        super().__init__(model, ranks)
        check_pipeline(model, ranks.size)
        rank, size, n = ranks.rank, ranks.size, len(model.blocks)
        self.is_first, self.is_last, tied = rank == 0, rank == size - 1, isinstance(model.head, TiedHead)
        self._before: list[tuple[Any, Any, nn.Module]] = []  # what `join` restores: where, under which key, the part
        own = range(n * rank // size, n * (rank + 1) // size)
        everything = by_path(model.parameters()).keys()
        self._leave_out(model.blocks, [i for i in range(n) if i not in own])
        self._leave_out(model, [] if self.is_first or tied else ["embedding"])
        self._leave_out(model, [] if self.is_last else ["final_norm"] if tied else ["final_norm", "head"])
        self.absent = frozenset(everything - by_path(model.parameters()).keys())
        shared = ("position", "shifts", "embedding") if tied else ("position", "shifts")
        self.partial = frozenset(path for path in everything if path.partition(".")[0] in shared)
        self._class = type(model)
        model.__class__ = type(self._class.__name__, (_OfStages, self._class), {})
        model.in_parts, model._split = True, self
        self._streams = [mx.new_stream(mx.cpu) for _ in range(2)]  # what is sent does not wait for what is to come
        self._functions: tuple[Callable, Callable] | None = None

    def _leave_out(self, holder: Any, keys: list) -> None:
        for key in keys:
            part, holder[key] = holder[key], Absent()
            part.update(tree_map(lambda _: mx.zeros(()), part.parameters()))  # so that nothing holds its weights
            self._before.append((holder, key, part))

    def restore_parts(self) -> None:
        for holder, key, part in self._before:
            holder[key] = part
        self.model.__class__, self.model.in_parts = self._class, False

    def groups(self, recipe: Recipe) -> Sequence[Group]:
        check_pipeline_recipe(self.model, recipe, self.ranks)
        return [replace(group, optional=True) for group in recipe.groups]  # of embeddings, of the head

    def _is_first(self, path: str) -> bool:
        return path not in self.partial or self.ranks.rank == 0

    def _is_shared(self, path: str) -> bool:
        return path in self.partial

    def combine(
        self, metrics: Arrays, gradients: list[Arrays], signals: Signals
    ) -> tuple[Arrays, list[Arrays], list[mx.array], mx.array]:
        return super().combine(self.ranks.sum_all(metrics), gradients, signals)

    def gradients(self, step: Any, batch: mx.array) -> tuple[Arrays, Arrays]:
        """Compute this rank's share of the metrics of a batch (B, L + 1), and its gradients by path, for a step."""
        if self._functions is None:
            forward, backward = _forward(self, step), _backward(self, step)
            state = [mx.random.state]  # the last rank draws samples of the vocabulary
            compiled = [mx.compile(one, inputs=state, outputs=state) for one in (forward, backward)]
            self._functions = (compiled[0], compiled[1]) if step.compiled else (forward, backward)
        forward, backward = self._functions
        weights, scaling = self.model.trainable_parameters(), step.memory["scaling"]
        scale = scaling["scale"] if scaling else mx.array(1.0)
        parts = in_parts(batch, max(MICROBATCHES * self.ranks.size, step.recipe.accumulate))
        width = (batch.shape[1] - 1, self.model.config.d_model)
        inputs: list[mx.array] = []
        sent: list[mx.array] = []
        total: Arrays = {}
        loss = mx.zeros(())
        for sequences, _ in [] if self.is_last else parts:
            inputs.append(self._receive((len(sequences), *width), step.dtype, -1))
            sent.append(self._send(forward(weights, inputs[-1], sequences), 1))
        for i, (sequences, portion) in enumerate(parts):
            shape = (len(sequences), *width)
            x = self._receive(shape, step.dtype, -1) if self.is_last else inputs[i]
            dy = mx.zeros(()) if self.is_last else self._receive(shape, step.dtype, 1)
            value, own, dx = backward(weights, x, sequences, dy, scale)
            for path, gradient in by_path(own).items():
                scaled = gradient * (portion / scale)
                total[path] = total[path] + scaled if path in total else scaled
            loss = loss + portion * value if self.is_last else loss
            mx.eval(total, dx, loss)
            sent += [] if self.is_first else [self._send(dx, -1)]
        mx.eval(sent)
        self.model.update(weights)  # the functions have set what they were traced with
        return {"loss": loss}, total

    def _send(self, x: mx.array, step: int) -> mx.array:
        """Send x to the next rank (step 1) or to the one before (-1), and return what is computed once it is sent."""
        mx.eval(x)
        place, stream = self.ranks.rank + step, self._streams[0]
        sent = mx.distributed.send(x, place, group=self.ranks.group, stream=stream)
        mx.async_eval(sent)
        return sent

    def _receive(self, shape: tuple[int, ...], dtype: mx.Dtype, step: int) -> mx.array:
        """Wait for what the next rank (step 1) or the one before (-1) sends; the first rank has nobody before it."""
        place, stream = self.ranks.rank + step, self._streams[1]
        if place < 0:
            return mx.zeros((), dtype)
        x = mx.distributed.recv(shape, dtype, place, group=self.ranks.group, stream=stream)
        mx.eval(x)
        return x


def _forward(split: PipelineSplit, step: Any) -> Callable[[Tree, mx.array, mx.array], mx.array]:
    """Return the blocks of a rank as a function of their weights, their input and the sequences (B, L + 1).

    Its value is the output (B, L, D), or on the last rank the loss.
    """
    model, cast = split.model, step.dtype != mx.float32 or step.deterministic

    def compute(weights: Tree, x: mx.array, sequences: mx.array) -> mx.array:
        model.update(tree_map(lambda w: ops.CastWeight(w, step.dtype), weights) if cast else weights)
        ctx, targets = model.inputs(sequences)
        x = model.run_blocks(model.embed(ctx) if split.is_first else x, ctx)
        if ctx.auxiliary:
            raise BadInput(
                f"--shard pipeline: a block records '{ctx.auxiliary[0][0]}', which the other ranks do not see"
            )
        return model.objective(model.final_norm(x), targets, ctx) if split.is_last else x

    return compute


def _backward(split: PipelineSplit, step: Any) -> Callable[..., tuple[mx.array, Tree, mx.array]]:
    """Return the function of the same arguments, the gradient of the output, and the scale of the loss, that gives the
    loss (0 on all ranks but the last), and the gradients of weights and input, times the scale.
    """
    compute = _forward(split, step)

    def backward(
        weights: Tree, x: mx.array, sequences: mx.array, dy: mx.array, scale: mx.array
    ) -> tuple[mx.array, Tree, mx.array]:
        def scalar(weights: Tree, x: mx.array) -> tuple[mx.array, mx.array]:
            y = compute(weights, x, sequences)
            return (y * scale, y) if split.is_last else ((y.astype(mx.float32) * dy).sum(), mx.zeros(()))

        with ops.fixed_order(step.deterministic):
            (_, loss), (own, dx) = mx.value_and_grad(scalar, argnums=(0, 1))(weights, x)
        return loss, own, dx

    return backward


class _OfStages(Model):
    """The first base class of a model of which each rank has some blocks: decoding and evaluation, on all ranks alike.

    Each rank computes its blocks once the ranks before have; what the last one computes is sent to all.
    """

    _split: PipelineSplit

    def hidden(self, ctx: Ctx) -> mx.array:
        """Return the last hidden states (B, L, D) on the last rank, something of that shape on the others."""
        ranks = self._split.ranks
        dtype = next(iter(by_path(self.parameters()["blocks"]).values())).dtype
        x = _after(mx.zeros((*ctx.tokens.shape, self.config.d_model), dtype), ctx.tokens)
        for rank in range(ranks.size):
            own = rank == ranks.rank
            if own:
                x = self.final_norm(self.run_blocks(self.embed(ctx) if rank == 0 else x, ctx))
            if rank < ranks.size - 1:
                x = ranks.sum(x if own else _after(mx.zeros(x.shape, x.dtype), x))
        return x

    def predict(self, h: mx.array, ctx: Ctx) -> mx.array:
        return self._of_last(lambda: super(_OfStages, self).predict(h, ctx), h, (*h.shape[:-1], self.config.vocab_size))

    def token_loss(self, h: mx.array, targets: mx.array) -> mx.array:
        return self._of_last(lambda: super(_OfStages, self).token_loss(h, targets), h, targets.shape)

    def last_logits(self, tokens: mx.array, cache: Cache | None = None) -> mx.array:
        layers = [] if cache is None else [layer for layer in cache.layers if type(layer) is not State]
        is_prompt = tokens.shape[1] > 1 or not all(layer.arrays for layer in layers)
        logits = super().last_logits(tokens, cache)
        if is_prompt:  # which is not compiled: further ones follow in the same order on every rank
            mx.eval(logits, [] if cache is None else cache.state)
        return logits

    def _of_last(self, compute: Callable[[], mx.array], h: mx.array, shape: tuple[int, ...]) -> mx.array:
        """Return what the last rank computes on every rank."""
        return self._split.ranks.sum(compute() if self._split.is_last else _after(mx.zeros(shape, h.dtype), h))


def _after(x: mx.array, other: mx.array) -> mx.array:
    """Return x, once another array is computed: messages keep one order on all ranks."""
    return mx.depends([x], [other])[0]


def check_pipeline(model: Model, size: int) -> None:
    """Raise BadInput for a model that cannot be split by blocks over so many ranks."""
    kind = type(model)
    known = (Model, SampledSoftmax)  # the last rank has all that a sample of the vocabulary takes
    if changed := [name for name in _STEPS if all(getattr(kind, name) is not getattr(one, name) for one in known)]:
        owner = next(one for one in kind.__mro__ if changed[0] in vars(one))
        raise BadInput(f"--shard pipeline: {owner.__name__} does more than its blocks in order ({changed[0]})")
    others = [type(part).__name__ for part in model.modules() if isinstance(part, _NEEDS_OTHERS)]
    others += sorted({path.partition(".")[0] for path in by_path(model.parameters())} - _CHILDREN)
    if others:
        raise BadInput(f"--shard pipeline: {others[0]} needs more than the blocks of one rank: train data parallel")
    if len(model.blocks) < size:
        raise BadInput(f"--shard pipeline: {len(model.blocks)} blocks cannot be divided among {size} ranks")


def check_pipeline_recipe(model: Model, recipe: Recipe, ranks: Ranks) -> None:
    """Raise BadInput for a recipe or a backend that cannot train a pipeline."""
    if ranks.backend == "nccl":  # whose messages wait for each other on one stream
        raise BadInput("--shard pipeline: NCCL cannot train it, the other backends do; take --shard tensor")
    dropout = max((part.p for part in model.modules() if isinstance(part, Dropout)), default=0.0)
    if (dropout if recipe.dropout is None else recipe.dropout) > 0:
        raise BadInput("--shard pipeline: the recomputed pass would drop other values than the first; give --dropout 0")
    for group in recipe.groups:
        if type(group.optimizer).wants_curvature is not UpdateRule.wants_curvature:
            raise BadInput(
                f"--shard pipeline: {type(group.optimizer).__name__} samples from the model; take another recipe"
            )
