"""The parts of a model, each a class to choose or to subclass.

A new part is a class of your own file: fill a slot (`FeedForward.activation`), override a hook (`Position.bias`) or a
step (`Attention.condition`), or write a module with the same call. Choose it by a slot of `Model`, for instance with
`leaf(Model, FFN=MyFeedForward)`. Its parameters start as `init_rules` of its class says, else as it sets them.

`Module`, `Embedding` and `Identity` are those of mlx.nn; `Linear`, `LayerNorm`, `RMSNorm` and `Dropout` are not.
"""

from mlx.nn import Embedding, Identity, Module

from mlx_transformer.nn import init
from mlx_transformer.nn.attention import Attention, FusedAttention, GroupedAttention, QKNorm, ValueEmbedding
from mlx_transformer.nn.block import Block, MixedInputBlock, PostNormBlock, PreNormBlock
from mlx_transformer.nn.cache import Cache, KVCache, LayerCache, State, SummaryCache, WindowCache
from mlx_transformer.nn.config import Config, Hyperparameters
from mlx_transformer.nn.context import Ctx
from mlx_transformer.nn.depth import MixtureOfDepths
from mlx_transformer.nn.dropout import Dropout
from mlx_transformer.nn.feedforward import (
    GEGLU,
    GLU,
    FeedForward,
    GatedFeedForward,
    GELUFeedForward,
    HalfWidth,
    ReGLU,
    ReLUSquaredFeedForward,
    SiLUFeedForward,
    SwiGLU,
)
from mlx_transformer.nn.head import CappedHead, Head, TiedHead
from mlx_transformer.nn.latent import LatentAttention
from mlx_transformer.nn.linear import BiasedLinear, Linear
from mlx_transformer.nn.maps import AttentionMap, attention_maps
from mlx_transformer.nn.mixers import (
    MLSTM,
    S4D,
    GatedDeltaNet,
    LinearAttention,
    Mamba,
    Mamba2,
    RecurrentMixer,
    Retention,
    ShortConvolution,
    SquaredReLUAttention,
)
from mlx_transformer.nn.model import Model, Slot, leaf
from mlx_transformer.nn.moe import (
    Dispatch,
    Experts,
    GatedExperts,
    MixtureOfExperts,
    ReLUSquaredExperts,
    ReLUSquaredMixture,
    StackedLinear,
    SwiGLUExperts,
    SwiGLUMixture,
    Switch,
)
from mlx_transformer.nn.multitoken import ChainedFurtherToken, FurtherToken, MultiToken, ParallelMultiToken
from mlx_transformer.nn.ngrams import CachedNGramExpert, CountedLevel, NGramExpert, NGramTable
from mlx_transformer.nn.norm import LayerNorm, RMSNorm, ScaleNorm
from mlx_transformer.nn.patches import Patched, PatchNumbers, with_patches
from mlx_transformer.nn.position import (
    ALiBi,
    LearnedPosition,
    Position,
    RotaryPosition,
    ScaledRotaryPosition,
    SinusoidalPosition,
    T5Position,
)
from mlx_transformer.nn.relative import ShawAttention, TransformerXLAttention
from mlx_transformer.nn.sampled import SampledSoftmax, SampledSoftmaxConfig
from mlx_transformer.nn.shift import TokenShift, TokenShiftConfig
from mlx_transformer.nn.sparse import LongformerAttention, SparseAttention, WindowAttention
from mlx_transformer.nn.translator import (
    PAD,
    CrossBlock,
    CrossCache,
    CrossPostNormBlock,
    CrossPreNormBlock,
    Encoder,
    SeparateEncoder,
    Translator,
)
from mlx_transformer.nn.universal import Halting, StepPosition

__all__ = [  # noqa: RUF022 - grouped by concept
    # model
    "Model",
    "Config",
    "Hyperparameters",
    "Slot",
    "leaf",
    "SampledSoftmax",
    "SampledSoftmaxConfig",
    "TokenShift",
    "TokenShiftConfig",
    "MultiToken",
    "ParallelMultiToken",
    "with_patches",
    "init",
    "Ctx",
    # blocks
    "Block",
    "PostNormBlock",
    "PreNormBlock",
    "MixedInputBlock",
    "MixtureOfDepths",
    # encoder-decoder
    "Translator",
    "Encoder",
    "SeparateEncoder",
    "CrossBlock",
    "CrossPostNormBlock",
    "CrossPreNormBlock",
    "PAD",
    # attention
    "Attention",
    "GroupedAttention",
    "FusedAttention",
    "QKNorm",
    "ValueEmbedding",
    "ShawAttention",
    "TransformerXLAttention",
    "WindowAttention",
    "LongformerAttention",
    "SparseAttention",
    "LatentAttention",
    "attention_maps",
    "AttentionMap",
    # mixers that are not attention
    "RecurrentMixer",
    "LinearAttention",
    "SquaredReLUAttention",
    "Retention",
    "GatedDeltaNet",
    "MLSTM",
    "ShortConvolution",
    "Mamba",
    "Mamba2",
    "S4D",
    # positions
    "Position",
    "SinusoidalPosition",
    "LearnedPosition",
    "RotaryPosition",
    "ScaledRotaryPosition",
    "ALiBi",
    "T5Position",
    "StepPosition",
    # feed-forward
    "FeedForward",
    "GELUFeedForward",
    "HalfWidth",
    "SiLUFeedForward",
    "ReLUSquaredFeedForward",
    "GatedFeedForward",
    "GLU",
    "ReGLU",
    "GEGLU",
    "SwiGLU",
    "MixtureOfExperts",
    "SwiGLUMixture",
    "ReLUSquaredMixture",
    "Switch",
    "Experts",
    "GatedExperts",
    "ChainedFurtherToken",
    "CountedLevel",
    "FurtherToken",
    "PatchNumbers",
    "Patched",
    "ReLUSquaredExperts",
    "SwiGLUExperts",
    "StackedLinear",
    "Dispatch",
    # n-grams
    "NGramTable",
    "NGramExpert",
    "CachedNGramExpert",
    # norms, linear maps, heads, dropout
    "LayerNorm",
    "RMSNorm",
    "ScaleNorm",
    "Linear",
    "BiasedLinear",
    "Head",
    "TiedHead",
    "CappedHead",
    "Dropout",
    "Halting",
    # caches for decoding
    "Cache",
    "LayerCache",
    "KVCache",
    "CrossCache",
    "WindowCache",
    "SummaryCache",
    "State",
    # from mlx.nn
    "Module",
    "Embedding",
    "Identity",
]
