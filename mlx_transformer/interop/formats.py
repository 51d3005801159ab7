"""Hugging Face architectures that a phase can hold: one Format each, with tables of config keys and of weights."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_transformer.interop.weights import Part, Row, Rows, Weights
from mlx_transformer.utils.errors import BadInput

ConfigDict = dict[str, Any]


@dataclass(frozen=True)
class ConfigKey:
    """A field of our Config and its key in config.json; some are only read, or only written."""

    ours: str
    hf: str
    missing: Callable[[ConfigDict], Any] | None = None  # their default for an absent key; None: required
    read: bool = True
    written: bool = True

    def value(self, hf: ConfigDict) -> float:
        """Read the value from their config.json. Raises BadInput unless it is a number in range."""
        value = hf.get(self.hf)
        if value is None and self.missing is not None:
            value = self.missing(hf)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadInput(f"{self.hf} = {value!r}: expected a number")
        if not 0 <= value < 2**31:  # nan is not
            raise BadInput(f"{self.hf} = {value!r}: expected a number from 0 to 2,147,483,647")
        return value


@dataclass(frozen=True, kw_only=True)
class Format:
    """A Hugging Face architecture, and the phase that holds it."""

    model_type: str
    architecture: str  # transformers' class
    phase: int
    branches: Mapping[bool, str | None]  # of the phase: {head tied to the embedding: branch}
    ties: bool  # their default of tie_word_embeddings
    config_keys: tuple[ConfigKey, ...]
    only: Mapping[str, tuple[Any, ...]]  # values that our model computes; the first is the default, and written
    training: Mapping[str, Any]  # further keys to write, which do not affect the logits
    weights: Rows
    prefix: str = ""  # that weight names may begin with
    buffers: tuple[str, ...] = ()  # patterns of names that are no weights
    takes: Callable[[ConfigDict], bool] = lambda hf: False  # other configs that describe such a model
    unpack: Callable[[ConfigDict], ConfigDict] = dict  # flattens their config
    pack: Callable[[ConfigDict], ConfigDict] = dict  # the inverse of unpack
    transformers: Callable[[ConfigDict], str] = lambda config: ""  # why transformers cannot load it, or ""
    mlx_lm: Callable[[ConfigDict], str] = lambda config: ""  # the same for mlx-lm

    def fits(self, hf: ConfigDict) -> bool:
        """Whether their config.json describes this architecture."""
        return hf.get("model_type") == self.model_type or self.takes(hf)

    def read(self, hf: ConfigDict) -> tuple[str | None, ConfigDict]:
        """Convert config.json to a branch and our configuration. Raises BadInput for what the phase cannot compute."""
        if hf.get("quantization_config") is not None:
            raise BadInput("quantization_config is there: expected a model whose weights are not quantized")
        hf = self.unpack(hf)
        for key, values in self.only.items():
            value = hf.get(key)
            if value is not None and value not in values:
                expected = " or ".join(map(repr, values))
                raise BadInput(f"{key} = {value!r}: phase {self.phase} computes {expected} only")
        tied = hf.get("tie_word_embeddings", self.ties)
        if tied not in list(self.branches):
            raise BadInput(f"tie_word_embeddings = {tied!r}: expected {' or '.join(map(repr, self.branches))}")
        return self.branches[tied], {key.ours: key.value(hf) for key in self.config_keys if key.read}

    def write(self, branch: str | None, ours: ConfigDict) -> ConfigDict:
        """Convert a branch and our configuration to their config.json."""
        tied = next(tied for tied, name in self.branches.items() if name == branch)
        return self.pack(
            {
                "architectures": [self.architecture],
                "model_type": self.model_type,
                **{key.hf: ours[key.ours] for key in self.config_keys if key.written},
                **{key: values[0] for key, values in self.only.items()},
                **self.training,
                "tie_word_embeddings": tied,
            }
        )

    def clean(self, hf: Weights, branch: str | None) -> Weights:
        """Drop the prefix, buffers and the second copy of a tied matrix from their weights.

        Raises BadInput if that copy differs.
        """
        named = {name.removeprefix(self.prefix): value for name, value in hf.items()}
        if len(named) < len(hf):
            raise BadInput(f"some weights are there twice, with {self.prefix!r} in front and without")
        named = {name: value for name, value in named.items() if not any(re.fullmatch(b, name) for b in self.buffers)}
        names = {row.ours: f"{row.hf}.weight" for row in self.weights}
        head, embedding = names["head"], names["embedding"]
        if branch == self.branches.get(True) and head in named:
            copy = named.pop(head)
            if not mx.array_equal(copy, named.get(embedding, mx.array(0))).item():
                raise BadInput(f"{head} is not {embedding}, and yet tie_word_embeddings is true")
        return named


_CONV1D = Part(transposed=True)


def _third(nth: int) -> Part:
    """A third of GPT-2's matrix for queries, keys and values."""
    return Part(nth, 3, transposed=True)


def _gpt2_in_mlx_lm(hf: ConfigDict) -> str:
    if not hf["tie_word_embeddings"]:
        return "its GPT-2 has no head of its own"
    return "" if hf["n_inner"] == 4 * hf["n_embd"] else "its GPT-2 has a d_ff of 4 d_model"


GPT2 = Format(  # Radford et al. 2019; names and defaults: transformers/models/gpt2
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    phase=3,
    branches={True: "tied", False: None},
    ties=True,
    config_keys=(
        ConfigKey("vocab_size", "vocab_size", missing=lambda hf: 50257),
        ConfigKey("d_model", "n_embd", missing=lambda hf: 768),
        ConfigKey("n_layers", "n_layer", missing=lambda hf: 12),
        ConfigKey("n_heads", "n_head", missing=lambda hf: 12),
        ConfigKey("d_ff", "n_inner", missing=lambda hf: 4 * (hf.get("n_embd") or 768)),
        ConfigKey("max_len", "n_positions", missing=lambda hf: 1024),
        ConfigKey("max_len", "n_ctx", read=False),  # required by mlx-lm
        ConfigKey("seq_len", "n_positions", missing=lambda hf: 1024, written=False),
        ConfigKey("norm_eps", "layer_norm_epsilon", missing=lambda hf: 1e-5),
        ConfigKey("dropout", "resid_pdrop", missing=lambda hf: 0.1),
        ConfigKey("dropout", "embd_pdrop", read=False),
    ),
    only={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False, True),  # differs in rounding alone
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
    buffers=(r"h\.\d+\.attn\.(bias|masked_bias)",),  # the causal mask, in files from before 2023
    mlx_lm=_gpt2_in_mlx_lm,
)

_ROPE = {  # Llama 3's scaling: their keys, and our defaults
    "factor": 1.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _unpack_rope(hf: ConfigDict) -> ConfigDict:
    """Flatten rope_parameters, or rope_scaling of transformers 4. Raises BadInput for other scalings than Llama 3's."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise BadInput(f"rope_parameters = {rope!r}: expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor")
    partial = hf.get("partial_rotary_factor") if partial is None else partial
    if kind not in ("default", "llama3") or partial not in (None, 1):
        raise BadInput(
            f"rope_type = {kind!r}, partial_rotary_factor = {partial!r}: phase 5 computes "
            "'default' or 'llama3', and 1, only"
        )
    # "absent" is no number, so that ConfigKey refuses a scaling without a factor
    scaling = {key: rope.get(key, "absent") for key in _ROPE} if kind == "llama3" else _ROPE
    theta = rope.get("rope_theta", hf.get("rope_theta"))
    return {**hf, **scaling, "rope_theta": 10_000.0 if theta is None else theta}


def _pack_rope(flat: ConfigDict) -> ConfigDict:
    """Nest the RoPE keys as transformers 5 does, and as transformers 4 and mlx-lm do."""
    scaling = {"rope_type": "llama3", **{key: flat[key] for key in _ROPE}}
    rope = scaling if flat["factor"] != 1 else {"rope_type": "default"}
    return {
        **{key: value for key, value in flat.items() if key not in _ROPE},
        "rope_parameters": {**rope, "rope_theta": flat["rope_theta"]},
        "rope_scaling": scaling if rope is scaling else None,
    }


def _unpack_mistral(hf: ConfigDict) -> ConfigDict:
    if hf.get("sliding_window") == 0:
        raise BadInput("sliding_window = 0: expected at least 1, or null for none")
    return _unpack_rope(hf)


def _unpack_qwen3(hf: ConfigDict) -> ConfigDict:
    kinds = hf.get("layer_types") or []
    if kinds := {*map(str, kinds if isinstance(kinds, list) else [kinds])} - {"full_attention"}:
        raise BadInput(f"layer_types has {', '.join(sorted(kinds))}: phase 5's qwen3 has full_attention in every layer")
    return _unpack_rope(hf)


def _llama_in_transformers(hf: ConfigDict) -> str:
    whole = hf["hidden_size"] % hf["num_attention_heads"] == 0
    return "" if whole else "its Llama has a d_model that is a multiple of n_heads"


def _mistral_in_mlx_lm(hf: ConfigDict) -> str:
    window, longest = hf["sliding_window"], hf["max_position_embeddings"]
    return "" if window >= longest else f"its Mistral has no window, which is another model after {window} tokens"


_LLAMA_KEYS = (
    ConfigKey("vocab_size", "vocab_size"),
    ConfigKey("d_model", "hidden_size"),
    ConfigKey("n_layers", "num_hidden_layers"),
    ConfigKey("n_heads", "num_attention_heads"),
    ConfigKey("n_kv_heads", "num_key_value_heads", missing=lambda hf: hf.get("num_attention_heads")),
    ConfigKey("head_dim", "head_dim", missing=lambda hf: 0),
    ConfigKey("d_ff", "intermediate_size"),
    ConfigKey("max_len", "max_position_embeddings"),
    ConfigKey("seq_len", "max_position_embeddings", written=False),
    ConfigKey("norm_eps", "rms_norm_eps", missing=lambda hf: 1e-6),
    ConfigKey("rope_theta", "rope_theta"),
    ConfigKey("rope_factor", "factor"),
    ConfigKey("rope_low_freq_factor", "low_freq_factor"),
    ConfigKey("rope_high_freq_factor", "high_freq_factor"),
    ConfigKey("rope_original_len", "original_max_position_embeddings"),
)


def _with_defaults(**absent: int) -> tuple[ConfigKey, ...]:
    """Llama's keys with other defaults for absent ones; null keeps its meaning in a Llama."""

    def other(number: ConfigKey) -> ConfigKey:
        default, null = absent.get(number.hf), number.missing
        if default is None or null is None:
            return number
        return replace(number, missing=lambda hf: null(hf) if number.hf in hf else default)

    return tuple(map(other, _LLAMA_KEYS))


LLAMA = Format(  # Touvron et al. 2023; names and defaults: transformers/models/llama
    model_type="llama",
    architecture="LlamaForCausalLM",
    phase=5,
    branches={True: "tied", False: None},
    ties=False,
    config_keys=_LLAMA_KEYS,
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
    buffers=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),  # in files from before 2024
    takes=lambda hf: hf.get("model_type") == "mistral" and hf.get("sliding_window", 0) is None,
    unpack=_unpack_rope,
    pack=_pack_rope,
    transformers=_llama_in_transformers,
)

MISTRAL = replace(  # Jiang et al. 2023; without a window it is a Llama
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    branches={True: "mistral_tied", False: "mistral"},
    config_keys=(
        *_with_defaults(num_key_value_heads=8),
        ConfigKey("window", "sliding_window", missing=lambda hf: 4096),
    ),
    only={"hidden_act": ("silu", "swish")},
    takes=lambda hf: False,
    unpack=_unpack_mistral,
    transformers=lambda config: "",
    mlx_lm=_mistral_in_mlx_lm,
)

QWEN3 = replace(  # Yang et al. 2025
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    branches={True: "qwen3_tied", False: "qwen3"},
    config_keys=_with_defaults(num_key_value_heads=32, head_dim=128),
    only={"hidden_act": ("silu", "swish"), "attention_bias": (False,), "use_sliding_window": (False,)},
    weights=(
        *LLAMA.weights,
        *(Row(f"blocks.{{i}}.mixer.{x}_norm", f"model.layers.{{i}}.self_attn.{x}_norm") for x in "qk"),
    ),
    takes=lambda hf: False,
    unpack=_unpack_qwen3,
    transformers=lambda config: "",
)

FORMATS = (GPT2, LLAMA, MISTRAL, QWEN3)
