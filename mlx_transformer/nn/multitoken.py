"""Multi-token prediction: parts that predict further tokens, used by the training loss alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.linear import Linear
from mlx_transformer.nn.model import Model
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.trees import by_path


class FurtherToken(nn.Module):
    """A block and a norm of its own for one further token (Gloeckle et al. 2024, arXiv 2404.19737, sec. 2).

    Each has the hidden states h (B, L, D) of the model as its input, and shares the model's head. Differs from the
    paper: h is normalized already, which a pre-norm block does anyway, and the output is normalized by `out_norm`.
    """

    is_chained = False  # whether its input is the output of the one before

    def __init__(self, config: Any, block: nn.Module, make_norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.block, self.out_norm = block, make_norm()

    def merge(self, h: mx.array, embedded: mx.array) -> mx.array:
        """Return the input of the block, of hidden states and the embeddings of the token after each (B, L, D)."""
        return h


class ChainedFurtherToken(FurtherToken):
    """FurtherToken that reads the tokens between: W [norm(h); norm(embedding of the next token)], h of the one before.

    DeepSeek-V3 (2024, arXiv 2412.19437, sec. 2.2, eq. 21-23), which shares embedding and head as here. W (D, 2 D).
    """

    is_chained = True

    def __init__(self, config: Any, block: nn.Module, make_norm: Callable[[], nn.Module]) -> None:
        super().__init__(config, block, make_norm)
        self.hidden_norm, self.token_norm = make_norm(), make_norm()
        self.merge_proj = Linear(2 * config.d_model, config.d_model)

    def merge(self, h: mx.array, embedded: mx.array) -> mx.array:
        return self.merge_proj(mx.concatenate([self.hidden_norm(h), self.token_norm(embedded)], axis=-1))


class MultiToken(Model):
    """Model whose training loss is also that of the n_predict - 1 tokens after the next, by a FurtherToken each.

    loss + further_weight / (n_predict - 1) * (the sum of their losses) (2412.19437, eq. 24-25); each is logged, as
    `loss_token_2`, `loss_token_3`, ... Evaluation and decoding use none of it: they are those of the model without.
    To be combined with a phase's Model, as its first base class. Raises BadInput unless n_predict <= seq_len.
    """

    def build(self, config: Any) -> None:
        super().build(config)
        self.further = further_tokens(self, ChainedFurtherToken)

    def count_parameters(self) -> dict[str, int]:
        counts = super().count_parameters()
        unused = sum(weight.size for part in self.further for weight in by_path(part.parameters()).values())
        return counts | {"active": counts["active"] - unused}

    def objective(self, h: mx.array, targets: mx.array, ctx: Ctx) -> mx.array:
        config: Any = self.config
        state = h
        for i, part in enumerate(self.further):
            state, following = state[:, :-1], ctx.after(1 + i)  # L - 1 - i states, and the tokens that follow them
            x = part.merge(state, self.embed(following))
            own = replace(following, positions=ctx.positions[..., : x.shape[1]], layer=config.n_layers + i, x0=x)
            output = part.out_norm(self.run_block(part.block, x, own))
            loss = super().objective(output, targets[:, i + 1 :], following)
            ctx.record(f"loss_token_{i + 2}", loss, config.further_weight / len(self.further))
            state = output if part.is_chained else state
        return super().objective(h, targets, ctx)


class ParallelMultiToken(MultiToken):
    """MultiToken whose parts all read the model's own hidden states (Gloeckle et al. 2024, sec. 2)."""

    def build(self, config: Any) -> None:
        super().build(config)
        self.further = further_tokens(self, FurtherToken)


def further_tokens(model: Model, kind: type[FurtherToken]) -> list[FurtherToken]:
    """Return the parts of a model for its further tokens, with blocks as those after its last."""
    config: Any = model.config
    if config.n_predict > config.seq_len:
        raise BadInput(f"n_predict = {config.n_predict} exceeds seq_len = {config.seq_len}: predict fewer tokens")
    depths = range(config.n_layers, config.n_layers + config.n_predict - 1)
    return [kind(config, model.make_block(i), model.make_norm) for i in depths]
