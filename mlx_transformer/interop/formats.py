"""The architectures of Hugging Face that a phase can hold: a Format each, its numbers and weights as tables."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_transformer.interop.weights import Part, Row, Rows, Weights
from mlx_transformer.utils.errors import BadInput

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Number:
    """A field of our Config and a key of their config.json; some are only read, or only written."""

    ours: str
    theirs: str
    missing: Callable[[Numbers], Any] | None = None  # what an absent key means to them; None: it must be there
    read: bool = True
    written: bool = True

    def value(self, theirs: Numbers) -> float:
        """Ours, out of their config.json. Raises BadInput where it is no number that can be one of a model."""
        value = theirs.get(self.theirs)
        if value is None and self.missing is not None:
            value = self.missing(theirs)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadInput(f"{self.theirs} = {value!r}: expected a number")
        if not 0 <= value < 2**31:  # nan is not
            raise BadInput(f"{self.theirs} = {value!r}: expected a number from 0 to 2,147,483,647")
        return value


@dataclass(frozen=True, kw_only=True)
class Format:
    """One architecture of theirs, and the phase that holds it."""

    model_type: str
    architecture: str  # their class
    phase: int
    branches: Mapping[bool, str | None]  # of the phase, by whether the head is tied to the embedding
    ties: bool  # what an absent tie_word_embeddings means
    numbers: tuple[Number, ...]
    only: Mapping[str, tuple[Any, ...]]  # what our model computes; the first value is written, and what absence means
    training: Mapping[str, Any]  # keys written besides, which do not bear on the logits
    weights: Rows
    prefix: str = ""  # that their names may have in front, and which we leave out
    buffers: tuple[str, ...] = ()  # patterns of names that hold no weights
    takes: Callable[[Numbers], bool] = lambda theirs: False  # configs of another model_type that are the same model
    unpack: Callable[[Numbers], Numbers] = dict  # their config with what is nested in it under keys of its own
    pack: Callable[[Numbers], Numbers] = dict  # and back
    transformers: Callable[[Numbers], str] = lambda config: ""  # why transformers cannot hold such a model, or nothing
    mlx_lm: Callable[[Numbers], str] = lambda config: ""  # the same of mlx-lm

    def fits(self, theirs: Numbers) -> bool:
        """Whether this is the format of their config.json."""
        return theirs.get("model_type") == self.model_type or self.takes(theirs)

    def read(self, theirs: Numbers) -> tuple[str | None, Numbers]:
        """config.json -> branch and numbers of ours. Raises BadInput for what the phase cannot compute."""
        if theirs.get("quantization_config") is not None:
            raise BadInput("quantization_config is there: expected a model whose weights are not quantized")
        theirs = self.unpack(theirs)
        for key, values in self.only.items():
            value = theirs.get(key)
            if value is not None and value not in values:
                expected = " or ".join(map(repr, values))
                raise BadInput(f"{key} = {value!r} is nothing that phase {self.phase} computes: expected {expected}")
        tied = theirs.get("tie_word_embeddings", self.ties)
        if tied not in list(self.branches):
            raise BadInput(f"tie_word_embeddings = {tied!r}: expected {' or '.join(map(repr, self.branches))}")
        return self.branches[tied], {row.ours: row.value(theirs) for row in self.numbers if row.read}

    def write(self, branch: str | None, ours: Numbers) -> Numbers:
        """Branch and numbers of ours -> what their config.json says of the model."""
        tied = next(tied for tied, name in self.branches.items() if name == branch)
        return self.pack(
            {
                "architectures": [self.architecture],
                "model_type": self.model_type,
                **{row.theirs: ours[row.ours] for row in self.numbers if row.written},
                **{key: values[0] for key, values in self.only.items()},
                **self.training,
                "tie_word_embeddings": tied,
            }
        )

    def clean(self, theirs: Weights, branch: str | None) -> Weights:
        """Their arrays without prefix, buffers and the second copy of a tied matrix.

        Raises BadInput if that copy is another matrix.
        """
        named = {name.removeprefix(self.prefix): value for name, value in theirs.items()}
        if len(named) < len(theirs):
            raise BadInput(f"some weights are there twice, with {self.prefix!r} in front and without")
        named = {name: value for name, value in named.items() if not any(re.fullmatch(b, name) for b in self.buffers)}
        names = {row.ours: f"{row.theirs}.weight" for row in self.weights}
        head, embedding = names["head"], names["embedding"]
        if branch == self.branches.get(True) and head in named:
            copy = named.pop(head)
            if not mx.array_equal(copy, named.get(embedding, mx.array(0))).item():
                raise BadInput(f"{head} is not {embedding}, and yet tie_word_embeddings is true")
        return named


_CONV1D = Part(transposed=True)


def _third(nth: int) -> Part:
    """Of the matrix that GPT-2 projects queries, keys and values with."""
    return Part(nth, 3, transposed=True)


def _gpt2_in_mlx_lm(theirs: Numbers) -> str:
    if not theirs["tie_word_embeddings"]:
        return "its GPT-2 has no head of its own"
    return "" if theirs["n_inner"] == 4 * theirs["n_embd"] else "its GPT-2 has a d_ff of 4 d_model"


GPT2 = Format(  # Radford et al. 2019; names and defaults: transformers/models/gpt2
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    phase=3,
    branches={True: "tied", False: None},
    ties=True,
    numbers=(
        Number("vocab_size", "vocab_size", missing=lambda theirs: 50257),
        Number("d_model", "n_embd", missing=lambda theirs: 768),
        Number("n_layers", "n_layer", missing=lambda theirs: 12),
        Number("n_heads", "n_head", missing=lambda theirs: 12),
        Number("d_ff", "n_inner", missing=lambda theirs: 4 * (theirs.get("n_embd") or 768)),
        Number("max_len", "n_positions", missing=lambda theirs: 1024),
        Number("max_len", "n_ctx", read=False),  # mlx-lm wants it
        Number("seq_len", "n_positions", missing=lambda theirs: 1024, written=False),
        Number("norm_eps", "layer_norm_epsilon", missing=lambda theirs: 1e-5),
        Number("dropout", "resid_pdrop", missing=lambda theirs: 0.1),
        Number("dropout", "embd_pdrop", read=False),
    ),
    only={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False, True),  # a matter of rounding
        "add_cross_attention": (False,),
    },
    training={"attn_pdrop": 0.0},
    weights=(
        Row("embedding", "wte"),
        Row("position", "wpe"),
        Row("blocks.{i}.norms.0", "h.{i}.ln_1"),
        Row("blocks.{i}.mixer.q_proj", "h.{i}.attn.c_attn", _third(0)),
        Row("blocks.{i}.mixer.k_proj", "h.{i}.attn.c_attn", _third(1)),
        Row("blocks.{i}.mixer.v_proj", "h.{i}.attn.c_attn", _third(2)),
        Row("blocks.{i}.mixer.o_proj", "h.{i}.attn.c_proj", _CONV1D),
        Row("blocks.{i}.norms.1", "h.{i}.ln_2"),
        Row("blocks.{i}.ffn.up_proj", "h.{i}.mlp.c_fc", _CONV1D),
        Row("blocks.{i}.ffn.down_proj", "h.{i}.mlp.c_proj", _CONV1D),
        Row("final_norm", "ln_f"),
        Row("head", "lm_head"),
    ),
    prefix="transformer.",
    buffers=(r"h\.\d+\.attn\.(bias|masked_bias)",),  # the causal mask, which files of before 2023 hold
    mlx_lm=_gpt2_in_mlx_lm,
)

_ROPE = {  # Llama 3's scaling: their keys, and what our Config has where there is none
    "factor": 1.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _unpack_rope(theirs: Numbers) -> Numbers:
    """rope_parameters, or rope_scaling and rope_theta of before transformers 5. Raises BadInput for another scaling."""
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise BadInput(f"rope_parameters = {rope!r}: expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    turned = rope.get("partial_rotary_factor")
    turned = theirs.get("partial_rotary_factor") if turned is None else turned
    if kind not in ("default", "llama3") or turned not in (None, 1):
        raise BadInput(
            f"rope_type = {kind!r}, partial_rotary_factor = {turned!r} is nothing that phase 5 computes: expected "
            "'default' or 'llama3', and 1"
        )
    # an absent factor of a scaling is no number, so that it is refused
    scaling = {key: rope.get(key, "absent") for key in _ROPE} if kind == "llama3" else _ROPE
    theta = rope.get("rope_theta", theirs.get("rope_theta"))
    return {**theirs, **scaling, "rope_theta": 10_000.0 if theta is None else theta}


def _pack_rope(flat: Numbers) -> Numbers:
    """Under today's name, and under those that transformers 4 and mlx-lm read."""
    scaling = {"rope_type": "llama3", **{key: flat[key] for key in _ROPE}}
    rope = scaling if flat["factor"] != 1 else {"rope_type": "default"}
    return {
        **{key: value for key, value in flat.items() if key not in _ROPE},
        "rope_parameters": {**rope, "rope_theta": flat["rope_theta"]},
        "rope_scaling": scaling if rope is scaling else None,
    }


def _unpack_mistral(theirs: Numbers) -> Numbers:
    if theirs.get("sliding_window") == 0:
        raise BadInput("sliding_window = 0: expected at least 1, or null for none")
    return _unpack_rope(theirs)


def _unpack_qwen3(theirs: Numbers) -> Numbers:
    kinds = theirs.get("layer_types") or []
    if kinds := {*map(str, kinds if isinstance(kinds, list) else [kinds])} - {"full_attention"}:
        raise BadInput(f"layer_types has {', '.join(sorted(kinds))}: phase 5's qwen3 has full_attention in every layer")
    return _unpack_rope(theirs)


def _llama_in_transformers(theirs: Numbers) -> str:
    whole = theirs["hidden_size"] % theirs["num_attention_heads"] == 0
    return "" if whole else "its Llama has a d_model that is a multiple of n_heads"


def _mistral_in_mlx_lm(theirs: Numbers) -> str:
    window, longest = theirs["sliding_window"], theirs["max_position_embeddings"]
    return "" if window >= longest else f"its Mistral has no window, which is another model after {window} tokens"


_LLAMA_NUMBERS = (
    Number("vocab_size", "vocab_size"),
    Number("d_model", "hidden_size"),
    Number("n_layers", "num_hidden_layers"),
    Number("n_heads", "num_attention_heads"),
    Number("n_kv_heads", "num_key_value_heads", missing=lambda theirs: theirs.get("num_attention_heads")),
    Number("head_dim", "head_dim", missing=lambda theirs: 0),
    Number("d_ff", "intermediate_size"),
    Number("max_len", "max_position_embeddings"),
    Number("seq_len", "max_position_embeddings", written=False),
    Number("norm_eps", "rms_norm_eps", missing=lambda theirs: 1e-6),
    Number("rope_theta", "rope_theta"),
    Number("rope_factor", "factor"),
    Number("rope_low_freq_factor", "low_freq_factor"),
    Number("rope_high_freq_factor", "high_freq_factor"),
    Number("rope_original_len", "original_max_position_embeddings"),
)


def _with_defaults(**absent: int) -> tuple[Number, ...]:
    """Llama's numbers, of which these are meant where the key is absent; null means what it means in a Llama."""

    def other(number: Number) -> Number:
        default, null = absent.get(number.theirs), number.missing
        if default is None or null is None:
            return number
        return replace(number, missing=lambda theirs: null(theirs) if number.theirs in theirs else default)

    return tuple(map(other, _LLAMA_NUMBERS))


LLAMA = Format(  # Touvron et al. 2023; names and defaults: transformers/models/llama
    model_type="llama",
    architecture="LlamaForCausalLM",
    phase=5,
    branches={True: "tied", False: None},
    ties=False,
    numbers=_LLAMA_NUMBERS,
    only={"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)},
    training={"attention_dropout": 0.0},
    weights=(
        Row("embedding", "model.embed_tokens"),
        Row("blocks.{i}.norms.0", "model.layers.{i}.input_layernorm"),
        *(Row(f"blocks.{{i}}.mixer.{x}_proj", f"model.layers.{{i}}.self_attn.{x}_proj") for x in "qkvo"),
        Row("blocks.{i}.norms.1", "model.layers.{i}.post_attention_layernorm"),
        *(Row(f"blocks.{{i}}.ffn.{x}_proj", f"model.layers.{{i}}.mlp.{x}_proj") for x in ("gate", "up", "down")),
        Row("final_norm", "model.norm"),
        Row("head", "lm_head"),
    ),
    buffers=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),  # which files of before 2024 hold
    takes=lambda theirs: theirs.get("model_type") == "mistral" and theirs.get("sliding_window", 0) is None,
    unpack=_unpack_rope,
    pack=_pack_rope,
    transformers=_llama_in_transformers,
)

MISTRAL = replace(  # Jiang et al. 2023; without a window it is a Llama
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    branches={True: "mistral_tied", False: "mistral"},
    numbers=(*_with_defaults(num_key_value_heads=8), Number("window", "sliding_window", missing=lambda theirs: 4096)),
    only={"hidden_act": ("silu", "swish")},
    takes=lambda theirs: False,
    unpack=_unpack_mistral,
    transformers=lambda config: "",
    mlx_lm=_mistral_in_mlx_lm,
)

QWEN3 = replace(  # Yang et al. 2025
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    branches={True: "qwen3_tied", False: "qwen3"},
    numbers=_with_defaults(num_key_value_heads=32, head_dim=128),
    only={"hidden_act": ("silu", "swish"), "attention_bias": (False,), "use_sliding_window": (False,)},
    weights=(
        *LLAMA.weights,
        *(Row(f"blocks.{{i}}.mixer.{x}_norm", f"model.layers.{{i}}.self_attn.{x}_norm") for x in "qk"),
    ),
    takes=lambda theirs: False,
    unpack=_unpack_qwen3,
    transformers=lambda config: "",
)

FORMATS = (GPT2, LLAMA, MISTRAL, QWEN3)
