"""The architectures of Hugging Face that a phase can hold: a Format each, its numbers and weights as tables."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_transformer.errors import BadInput
from mlx_transformer.interop.weights import Part, Row, Rows, Weights

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
        """Ours, out of their config.json. Raises BadInput where it is no number."""
        value = theirs.get(self.theirs)
        if value is None and self.missing is not None:
            value = self.missing(theirs)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadInput(f"{self.theirs} = {value!r}: expected a number")
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
    mlx_lm: Callable[[Numbers], str] = lambda config: ""  # why mlx-lm cannot hold such a model, or nothing

    def read(self, theirs: Numbers) -> tuple[str | None, Numbers]:
        """config.json -> branch and numbers of ours. Raises BadInput for what the phase cannot compute."""
        for key, values in self.only.items():
            if (value := theirs.get(key, values[0])) not in values:
                expected = " or ".join(map(repr, values))
                raise BadInput(f"{key} = {value!r} is nothing that phase {self.phase} computes: expected {expected}")
        tied = theirs.get("tie_word_embeddings", self.ties)
        if tied not in list(self.branches):
            raise BadInput(f"tie_word_embeddings = {tied!r}: expected {' or '.join(map(repr, self.branches))}")
        return self.branches[tied], {row.ours: row.value(theirs) for row in self.numbers if row.read}

    def write(self, branch: str | None, ours: Numbers) -> Numbers:
        """Branch and numbers of ours -> what their config.json says of the model."""
        tied = next(tied for tied, name in self.branches.items() if name == branch)
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **{row.theirs: ours[row.ours] for row in self.numbers if row.written},
            **{key: values[0] for key, values in self.only.items()},
            **self.training,
            "tie_word_embeddings": tied,
        }

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
        Number("vocab_size", "vocab_size"),
        Number("d_model", "n_embd"),
        Number("n_layers", "n_layer"),
        Number("n_heads", "n_head"),
        Number("d_ff", "n_inner", missing=lambda theirs: 4 * theirs["n_embd"]),
        Number("max_len", "n_positions"),
        Number("max_len", "n_ctx", read=False),  # mlx-lm wants it
        Number("seq_len", "n_positions", written=False),
        Number("norm_eps", "layer_norm_epsilon", missing=lambda theirs: 1e-5),
        Number("dropout", "resid_pdrop", missing=lambda theirs: 0.1),
        Number("dropout", "embd_pdrop", read=False),
    ),
    only={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
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

FORMATS = (GPT2,)
