"""Hugging Face files as other programs write them: tied weights under one name, base models, keys in two places."""

import json

import pytest

from mlx_transformer import load
from mlx_transformer.interop.formats import FORMATS
from tests.interop.hugging_face import (
    LENGTH,
    assert_same,
    byte_level,
    interop,
    read_config,
    refused,
    transformers,
    write_theirs,
)
from tests.interop.test_llama import LLAMA3

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed: pip install safetensors")

KINDS = ("gpt2", "llama", "mistral", "qwen3")
WEIGHTS = "model.safetensors"


def write_tied(folder, kind):
    """Write a random model of theirs whose head is its embedding; return the model."""
    if kind == "gpt2":
        return write_theirs(folder, "gpt2", n_embd=12, n_layer=2, n_head=3, n_positions=LENGTH)
    return write_theirs(folder, kind, tie_word_embeddings=True, head_dim=8)


def assert_imported(folder, theirs, notes=()):
    """Check an import's notes and its logits."""
    ended = interop("import", folder, folder.parent / "run")
    assert (ended.code, ended.err) == (0, "")
    assert [line for line in ended.out.splitlines() if line.startswith("note: ")] == list(notes)
    assert_same(load(folder.parent / "run")[0], theirs, LENGTH, 257)


def rewrite(folder, rename):
    """Rename the weights of a folder; None drops one, several names copy it."""
    arrays = safetensors.load_file(folder / WEIGHTS)
    renamed = {new: value.clone() for name, value in arrays.items() for new in rename(name)}
    safetensors.save_file(renamed, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_matrix_under_the_name_that_save_model_keeps(kind, tmp_path):
    theirs = write_tied(tmp_path / "theirs", kind)
    safetensors.save_model(theirs, tmp_path / "theirs" / WEIGHTS)
    assert "lm_head.weight" in safetensors.load_file(tmp_path / "theirs" / WEIGHTS)
    assert_imported(tmp_path / "theirs", theirs, GPT2_NOTES if kind == "gpt2" else ())


GPT2_NOTES = (
    "note: attn_pdrop = 0.1 there is 0.0 here",
    "note: dropout is 0.1 there, and 0.0 in training here without --dropout",
)


@pytest.mark.parametrize("names", [("lm_head",), ("embedding",), ("lm_head", "embedding")], ids="+".join)
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_tied_matrix_under_every_name(kind, prefix, names, tmp_path):
    theirs = write_tied(tmp_path / "theirs", kind)
    front, embedding = ("transformer.", "wte") if kind == "gpt2" else ("model.", "embed_tokens")

    def rename(name):
        name = name.removeprefix(front)
        new = [f"{embedding}.weight", "lm_head.weight"] if name == f"{embedding}.weight" else [name]
        new = [name for name in new if len(new) == 1 or name.split(".")[0].replace(embedding, "embedding") in names]
        return [name if name.startswith("lm_head") or not prefix else front + name for name in new]

    rewrite(tmp_path / "theirs", rename)
    assert_imported(tmp_path / "theirs", theirs, GPT2_NOTES if kind == "gpt2" else ())


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_model_is_imported_where_its_head_is_the_embedding(kind, tmp_path):
    theirs = write_tied(tmp_path / "theirs", kind)
    theirs.base_model.save_pretrained(tmp_path / "base")
    assert not any("model." in name or "head" in name for name in safetensors.load_file(tmp_path / "base" / WEIGHTS))
    byte_level(tmp_path / "base")
    assert_imported(tmp_path / "base", theirs, GPT2_NOTES if kind == "gpt2" else ())


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_a_base_model_without_a_head_is_refused(kind, tmp_path):
    write_theirs(tmp_path / "theirs", kind).base_model.save_pretrained(tmp_path / "base")
    byte_level(tmp_path / "base")
    refused(tmp_path / "base", "lm_head.weight should be (257, 24) and is missing")


SCALING = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
WITHOUT_LENGTH = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
ROPE = {  # keys of config.json, and what is ignored
    "theta at the top": ({"rope_theta": 500_000}, []),
    "none": ({}, []),
    "theta in both places": ({"rope_theta": 500_000, "rope_parameters": DEFAULT}, ["rope_theta = 500000"]),
    "the same theta in both places": ({"rope_theta": 10_000, "rope_parameters": DEFAULT}, []),
    "theta at the top, type below": ({"rope_theta": 7.0, "rope_parameters": {"rope_type": "default"}}, []),
    "a theta above 2^31": ({"rope_theta": 10**10}, []),
    "scaling of transformers 4": ({"rope_theta": 5e4, "rope_scaling": SCALING}, []),
    "scaling in both places": (
        {"rope_theta": 5e4, "rope_scaling": SCALING, "rope_parameters": {**LLAMA3, "factor": 2.0, "rope_theta": 7.0}},
        ["rope_parameters.rope_theta = 7.0", "rope_parameters.factor = 2.0"],
    ),
    "an empty scaling": ({"rope_scaling": {}, "rope_parameters": LLAMA3}, []),
    "no length before": ({"rope_parameters": WITHOUT_LENGTH}, []),
    "the length before at the top": ({"rope_parameters": WITHOUT_LENGTH, "original_max_position_embeddings": 9}, []),
    "the length before in both places": (
        {"rope_parameters": LLAMA3, "original_max_position_embeddings": 9},
        ["rope_parameters.original_max_position_embeddings = 16"],
    ),
    "a factor without a scaling": (
        {"rope_parameters": {**DEFAULT, "factor": 4.0}, "original_max_position_embeddings": 9},
        ["rope_parameters.factor = 4.0"],
    ),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("llama", name) for name in ROPE), *((kind, "no length before") for kind in ("mistral", "qwen3"))],
)
def test_rope_is_read_as_transformers_reads_it(kind, name, tmp_path):
    folder, (values, ignored) = tmp_path / "theirs", ROPE[name]
    write_theirs(folder, kind)
    config = read_config(folder)
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config | values))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert_imported(folder, theirs, [f"note: {key} is ignored, as it is in transformers" for key in ignored])


@pytest.mark.parametrize(
    "values",
    [
        {"rope_theta": None},
        {"rope_theta": 10**400},
        {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": None}},
        {"rope_parameters": {"full_attention": LLAMA3}},
    ],
    ids=str,
)
def test_rope_that_transformers_cannot_compute(values, tmp_path):
    write_theirs(tmp_path / "theirs", "llama")
    config = read_config(tmp_path / "theirs")
    del config["rope_parameters"]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | values))
    refused(tmp_path / "theirs")


def test_the_other_names_of_gpt2_s_numbers(tmp_path):
    theirs = write_tied(tmp_path / "theirs", "gpt2")
    config = read_config(tmp_path / "theirs")
    config |= {"hidden_size": config.pop("n_embd"), "num_attention_heads": 3, "n_head": 4, "n_ctx": 7}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    assert transformers.AutoConfig.from_pretrained(tmp_path / "theirs").n_head == 3
    assert_imported(tmp_path / "theirs", theirs, ["note: n_head = 4 is ignored, as it is in transformers", *GPT2_NOTES])


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.model_type} {form.branches[False]}")
def test_absent_numbers_have_the_defaults_of_transformers(form):
    """Every key absent, but for a mistral's window where the format is the one without."""
    hf = {"model_type": form.model_type}
    if not form.holds(hf):
        hf["sliding_window"] = None
    theirs = transformers.AutoConfig.for_model(**hf)
    branch, values = form.read(hf)
    assert branch == form.branches[theirs.tie_word_embeddings]
    expected = {number.ours: getattr(theirs, number.hf, None) for number in form.config_keys if number.read}
    if form.model_type == "gpt2":
        expected["d_ff"] = 4 * theirs.n_embd
    else:
        length = theirs.max_position_embeddings  # theirs of one without a scaling; 8,192 are never used
        no_scaling = {"rope_factor": 1.0, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0}
        expected |= {"rope_theta": theirs.rope_parameters["rope_theta"], **no_scaling, "rope_original_len": 8192}
        assert form.read({**hf, "rope_parameters": WITHOUT_LENGTH})[1]["rope_original_len"] == length
    assert values == expected
    for key, (_, absent) in form.training.items():
        assert getattr(theirs, key) == absent


def test_a_mistral_without_a_window_has_mistral_s_defaults(tmp_path):
    numbers = {"num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 48}
    theirs = write_theirs(tmp_path / "theirs", "mistral", sliding_window=None, **numbers)
    config = read_config(tmp_path / "theirs")
    del config["num_key_value_heads"], config["head_dim"]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    assert_imported(tmp_path / "theirs", theirs)


def test_a_width_that_is_no_multiple_of_the_heads(tmp_path):
    """head_dim is then the whole part of the quotient."""
    theirs = write_theirs(tmp_path / "theirs", "mistral", hidden_size=20, num_attention_heads=3, num_key_value_heads=1)
    config = read_config(tmp_path / "theirs")
    del config["head_dim"]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    assert_imported(tmp_path / "theirs", theirs)
