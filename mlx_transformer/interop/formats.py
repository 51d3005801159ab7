"""Hugging Face architectures that a phase can hold: one Format each, with tables of config keys and of weights."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_transformer.interop.weights import Part, Row, Rows, Weights
from mlx_transformer.nn.config import MAX_AXIS
from mlx_transformer.utils.errors import BadInput

ConfigDict = dict[str, Any]
Default = float | Callable[[ConfigDict], float] | None
_MAX_FLOAT = 1e38  # float32 ends above it


@dataclass(frozen=True)
class ConfigKey:
    """A field of our Config and its key in config.json; some are only read, or only written.

    absent, null: the value for an absent key and for null: a number, or a function of our fields before this one; None:
    refused. They are those of transformers.
    """

    ours: str
    hf: str
    absent: Default = None
    null: Default = None
    kind: type[int] | type[float] = int
    read: bool = True
    written: bool = True

    def value(self, hf: ConfigDict, ours: ConfigDict) -> float:
        """Read the value from their config.json. Raises BadInput unless it is a number in range."""
        given = self.hf in hf
        value = hf[self.hf] if given else self.absent
        value = self.null if value is None else value
        value = value(ours) if callable(value) else value
        expected = f"a whole number from 1 to {MAX_AXIS:,}"
        if isinstance(value, int | float) and not isinstance(value, bool):
            if self.kind is int and isinstance(value, int) and 1 <= value <= MAX_AXIS:
                return value
            if self.kind is float and 0 <= value < _MAX_FLOAT:  # nan is not
                return float(value)
        if self.kind is float:
            expected = f"a number from 0 to {_MAX_FLOAT:g}"
        raise BadInput(f"{self.hf} {f'= {value!r}' if given else 'is absent'}: expected {expected}")


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
    training: Mapping[str, tuple[Any, Any]]  # keys that do not affect the logits: our value, their default
    weights: Rows
    prefix: str  # of the base model's weights: their files have it, or, of a base model alone, lack it
    buffers: tuple[str, ...] = ()  # patterns of names that are no weights
    holds: Callable[[ConfigDict], bool] = lambda hf: True  # whether the phase computes a config of this type
    unpack: Callable[[ConfigDict], ConfigDict] = dict  # flattens their config
    unused: Callable[[ConfigDict], Iterator[str]] = lambda hf: iter(())  # "key = value" of what transformers ignores
    pack: Callable[[ConfigDict], ConfigDict] = dict  # the inverse of unpack
    transformers: Callable[[ConfigDict], str] = lambda config: ""  # why transformers cannot load it, or ""
    mlx_lm: Callable[[ConfigDict], str] = lambda config: ""  # the same for mlx-lm

    def fits(self, hf: ConfigDict) -> bool:
        """Whether their config.json describes this architecture."""
        return hf.get("model_type") == self.model_type and self.holds(hf)

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
        ours: ConfigDict = {}
        for number in self.config_keys:
            if number.read:
                ours[number.ours] = number.value(hf, ours)
        return self.branches[tied], ours

    def write(self, branch: str | None, ours: ConfigDict) -> ConfigDict:
        """Convert a branch and our configuration to their config.json."""
        tied = next(tied for tied, name in self.branches.items() if name == branch)
        return self.pack(
            {
                "architectures": [self.architecture],
                "model_type": self.model_type,
                **{key.hf: ours[key.ours] for key in self.config_keys if key.written},
                **{key: values[0] for key, values in self.only.items()},
                **{key: ours for key, (ours, _) in self.training.items()},
                "tie_word_embeddings": tied,
            }
        )

    def clean(self, hf: Weights, branch: str | None) -> Weights:
        """Give their weights the names of the table, without buffers and the second copy of a tied matrix.

        A tied matrix may be there under either name. Raises BadInput if it is there twice and differs.
        """
        named = {self._name(name): value for name, value in hf.items()}
        if len(named) < len(hf):
            raise BadInput(f"some weights are there twice, with {self.prefix!r} in front and without")
        named = {name: value for name, value in named.items() if not any(re.fullmatch(b, name) for b in self.buffers)}
        names = {row.ours: f"{row.hf}.weight" for row in self.weights}
        head, embedding = names["head"], names["embedding"]
        if branch == self.branches.get(True) and head in named:
            copy = named.pop(head)
            if not mx.array_equal(copy, named.setdefault(embedding, copy)).item():
                raise BadInput(f"{head} is not {embedding}, and yet tie_word_embeddings is true")
        return named

    def _name(self, name: str) -> str:
        """Return a weight's name in the table for its name with or without the prefix."""
        name = name.removeprefix(self.prefix)
        with_prefix = any(row.hf.startswith(self.prefix) for row in self.weights)
        return self.prefix + name if with_prefix and not name.startswith("lm_head.") else name


_CONV1D = Part(transposed=True)


def _third(nth: int) -> Part:
    """A third of GPT-2's matrix for queries, keys and values."""
    return Part(nth, 3, transposed=True)


def _gpt2_in_mlx_lm(hf: ConfigDict) -> str:
    if not hf["tie_word_embeddings"]:
        return "its GPT-2 has no head of its own"
    return "" if hf["n_inner"] == 4 * hf["n_embd"] else "its GPT-2 has a d_ff of 4 d_model"


_GPT2_ALIASES = {  # transformers prefers the first name where both are there
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


def _unused_in_gpt2(hf: ConfigDict) -> Iterator[str]:
    for other, key in _GPT2_ALIASES.items():
        if other in hf and hf.get(key, hf[other]) != hf[other]:
            yield f"{key} = {hf[key]}"


GPT2 = Format(  # Radford et al. 2019; names and defaults: transformers/models/gpt2
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    phase=3,
    branches={True: "tied", False: None},
    ties=True,
    config_keys=(
        ConfigKey("vocab_size", "vocab_size", 50257),
        ConfigKey("d_model", "n_embd", 768),
        ConfigKey("n_layers", "n_layer", 12),
        ConfigKey("n_heads", "n_head", 12),
        ConfigKey("d_ff", "n_inner", null=lambda ours: 4 * ours["d_model"]),
        ConfigKey("max_len", "n_positions", 1024),
        ConfigKey("seq_len", "n_positions", 1024, written=False),
        ConfigKey("norm_eps", "layer_norm_epsilon", 1e-5, kind=float),
        ConfigKey("dropout", "resid_pdrop", 0.1, kind=float),
        ConfigKey("dropout", "embd_pdrop", 0.1, kind=float, read=False),
    ),
    only={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False, True),  # differs in rounding alone
        "add_cross_attention": (False,),
    },
    training={"attn_pdrop": (0.0, 0.1)},
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
    unpack=lambda hf: {**hf, **{key: hf[other] for other, key in _GPT2_ALIASES.items() if other in hf}},
    unused=_unused_in_gpt2,
    pack=lambda flat: {**flat, "n_ctx": flat["n_positions"]},  # required by mlx-lm
    mlx_lm=_gpt2_in_mlx_lm,
)

_ORIGINAL_LENGTH = "original_max_position_embeddings"
_ROPE = {  # Llama 3's scaling: their keys, and our defaults
    "factor": 1.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    _ORIGINAL_LENGTH: 8192,
}


def _unpack_rope(hf: ConfigDict) -> ConfigDict:
    """Flatten rope_parameters, or rope_scaling of transformers 4, with the precedence that transformers 5 has.

    Raises BadInput for other scalings than Llama 3's.
    """
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise BadInput(f"rope_parameters = {rope!r}: expected an object of numbers for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if kind not in ("default", "llama3") or partial not in (None, 1):
        raise BadInput(
            f"rope_type = {kind!r}, partial_rotary_factor = {partial!r}: phase 5 computes "
            "'default' or 'llama3', and 1, only"
        )
    scaling = _ROPE
    if kind == "llama3":
        scaling = {key: rope[key] for key in _ROPE if key in rope}
        if _ORIGINAL_LENGTH in hf:
            scaling[_ORIGINAL_LENGTH] = hf[_ORIGINAL_LENGTH]
    theta = rope.get("rope_theta", hf.get("rope_theta", 10_000.0))
    return {**{key: value for key, value in hf.items() if key not in _ROPE}, **scaling, "rope_theta": theta}


def _unused_in_rope(hf: ConfigDict) -> Iterator[str]:
    used = _unpack_rope(hf)
    places = {name: hf[name] for name in ("rope_parameters", "rope_scaling") if isinstance(hf.get(name), dict)}
    if "llama3" not in (place.get("rope_type", place.get("type")) for place in places.values()):
        used = {"rope_theta": used["rope_theta"]}
    for name, place in {"": {"rope_theta": hf.get("rope_theta")}, **places}.items():
        for key in ("rope_theta", *_ROPE):
            if place.get(key) not in (None, used.get(key)):
                yield f"{name}.{key} = {place[key]}".lstrip(".")


def _pack_rope(flat: ConfigDict) -> ConfigDict:
    """Nest the RoPE keys as transformers 5 does, and as transformers 4 and mlx-lm do."""
    scaling = {"rope_type": "llama3", **{key: flat[key] for key in _ROPE}}
    rope = scaling if flat["factor"] != 1 else {"rope_type": "default"}
    return {
        **{key: value for key, value in flat.items() if key not in _ROPE},
        "rope_parameters": {**rope, "rope_theta": flat["rope_theta"]},
        "rope_scaling": scaling if rope is scaling else None,
    }


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


def _llama_keys(
    vocab_size: int, d_ff: int, max_len: int, n_kv_heads: int | None = None, head_dim: int | None = None
) -> tuple[ConfigKey, ...]:
    """List the keys of Llama, with the defaults in which the architectures differ."""
    return (
        ConfigKey("vocab_size", "vocab_size", vocab_size),
        ConfigKey("d_model", "hidden_size", 4096),
        ConfigKey("n_layers", "num_hidden_layers", 32),
        ConfigKey("n_heads", "num_attention_heads", 32),
        ConfigKey("n_kv_heads", "num_key_value_heads", n_kv_heads, null=lambda ours: ours["n_heads"]),
        ConfigKey("head_dim", "head_dim", head_dim, null=lambda ours: ours["d_model"] // ours["n_heads"]),
        ConfigKey("d_ff", "intermediate_size", d_ff),
        ConfigKey("max_len", "max_position_embeddings", max_len),
        ConfigKey("seq_len", "max_position_embeddings", max_len, written=False),
        ConfigKey("norm_eps", "rms_norm_eps", 1e-6, kind=float),
        ConfigKey("rope_theta", "rope_theta", kind=float),
        ConfigKey("rope_factor", "factor", kind=float),
        ConfigKey("rope_low_freq_factor", "low_freq_factor", kind=float),
        ConfigKey("rope_high_freq_factor", "high_freq_factor", kind=float),
        ConfigKey("rope_original_len", _ORIGINAL_LENGTH, absent=lambda ours: ours["max_len"]),
    )


LLAMA = Format(  # Touvron et al. 2023; names and defaults: transformers/models/llama
    model_type="llama",
    architecture="LlamaForCausalLM",
    phase=5,
    branches={True: "tied", False: None},
    ties=False,
    config_keys=_llama_keys(vocab_size=32000, d_ff=11008, max_len=2048),
    only={"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)},
    training={"attention_dropout": (0.0, 0.0)},
    weights=(
        Row("embedding", "model.embed_tokens"),
        Row("blocks.{i}.norms.0", "model.layers.{i}.input_layernorm"),
        *(Row(f"blocks.{{i}}.mixer.{x}_proj", f"model.layers.{{i}}.self_attn.{x}_proj") for x in "qkvo"),
        Row("blocks.{i}.norms.1", "model.layers.{i}.post_attention_layernorm"),
        *(Row(f"blocks.{{i}}.ffn.{x}_proj", f"model.layers.{{i}}.mlp.{x}_proj") for x in ("gate", "up", "down")),
        Row("final_norm", "model.norm"),
        Row("head", "lm_head"),
    ),
    prefix="model.",
    buffers=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),  # in files from before 2024
    unpack=_unpack_rope,
    unused=_unused_in_rope,
    pack=_pack_rope,
    transformers=_llama_in_transformers,
)

_MISTRAL_KEYS = _llama_keys(vocab_size=32000, d_ff=14336, max_len=131_072, n_kv_heads=8)

MISTRAL = replace(  # Jiang et al. 2023
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    branches={True: "mistral_tied", False: "mistral"},
    config_keys=(*_MISTRAL_KEYS, ConfigKey("window", "sliding_window", 4096)),
    only={"hidden_act": ("silu", "swish")},
    holds=lambda hf: hf.get("sliding_window", 0) is not None,
    transformers=lambda config: "",
    mlx_lm=_mistral_in_mlx_lm,
)

MISTRAL_WITHOUT_WINDOW = replace(  # computes what a Llama does; only read
    LLAMA,
    model_type="mistral",
    config_keys=_MISTRAL_KEYS,
    only={"hidden_act": ("silu", "swish")},
    holds=lambda hf: hf.get("sliding_window", 0) is None,
)

QWEN3 = replace(  # Yang et al. 2025
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    branches={True: "qwen3_tied", False: "qwen3"},
    config_keys=_llama_keys(vocab_size=151_936, d_ff=22016, max_len=32768, n_kv_heads=32, head_dim=128),
    only={"hidden_act": ("silu", "swish"), "attention_bias": (False,), "use_sliding_window": (False,)},
    weights=(
        *LLAMA.weights,
        *(Row(f"blocks.{{i}}.mixer.{x}_norm", f"model.layers.{{i}}.self_attn.{x}_norm") for x in "qk"),
    ),
    unpack=_unpack_qwen3,
    transformers=lambda config: "",
)

FORMATS = (GPT2, LLAMA, MISTRAL, MISTRAL_WITHOUT_WINDOW, QWEN3)
