"""Llama, Mistral and Qwen3 from and to Hugging Face: equal logits, greedy text and weights."""

import json

import mlx.core as mx
import pytest

from mlx_transformer import load
from mlx_transformer.generate import complete, encode_prompt
from mlx_transformer.generate.decoding import GREEDY
from mlx_transformer.run import training
from mlx_transformer.run.commands.interop import export_model, import_model
from mlx_transformer.run.ladder import find_branch, find_phase
from phases import phase5
from tests.faults.runs import assert_bad, command
from tests.interop.hugging_face import (
    LENGTH,
    assert_mlx_lm_computes_the_same,
    assert_same,
    change,
    interop,
    library,
    read_config,
    refused,
    torch,
    transformers,
    weights,
    write_ours,
    write_theirs,
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ODD = {"hidden_size": 20, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10}  # 20 is no multiple of 3
# name -> type, our branch, numbers
THEIRS = {
    "llama": ("llama", None, {}),
    "llama, tied": ("llama", "tied", {"tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
    "llama, wide heads": ("llama", None, {"head_dim": 14, "num_key_value_heads": 6, "vocab_size": 311}),
    "llama, narrow heads": ("llama", None, {"head_dim": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}),
    "llama 3.1": ("llama", None, {"rope_parameters": LLAMA3, "head_dim": 32, "num_key_value_heads": 3}),
    "llama 3.2": ("llama", "tied", {"rope_parameters": {**LLAMA3, "factor": 32.0}, "tie_word_embeddings": True}),
    "mistral": ("mistral", "mistral", {"sliding_window": 7, "head_dim": None}),
    "mistral, tied": ("mistral", "mistral_tied", {"sliding_window": 16, "tie_word_embeddings": True}),
    "mistral, odd": ("mistral", "mistral", {"sliding_window": 3, **ODD}),
    "mistral that sees itself": ("mistral", "mistral", {"sliding_window": 1}),
    "mistral, scaled": ("mistral", "mistral", {"sliding_window": 40, "rope_parameters": LLAMA3, "head_dim": 16}),
    "mistral without a window": ("mistral", None, {"sliding_window": None, "head_dim": 6}),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 8}),
    "qwen3, tied": ("qwen3", "qwen3_tied", {"head_dim": 4, "tie_word_embeddings": True}),
    "qwen3, odd": ("qwen3", "qwen3", {**ODD, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3, scaled": ("qwen3", "qwen3", {"rope_parameters": LLAMA3, "head_dim": 12, "rms_norm_eps": 1e-3}),
}
everyone = pytest.mark.parametrize(("kind", "branch", "numbers"), THEIRS.values(), ids=THEIRS)


@everyone
def test_an_imported_model_computes_the_same_and_is_exported_unchanged(kind, branch, numbers, tmp_path):
    theirs = write_theirs(tmp_path / "theirs", kind, **numbers)
    ended = interop("import", tmp_path / "theirs", tmp_path / "run")
    assert (ended.code, ended.err) == (0, "")
    ours, _ = load(tmp_path / "run")
    assert type(ours) is find_branch(phase5, branch)
    assert_same(ours, theirs, LENGTH, numbers.get("vocab_size", 257))

    export_model(tmp_path / "run", tmp_path / "back")
    back, loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(loaded.values()), loaded
    for name, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    before, after = read_config(tmp_path / "theirs"), back.config.to_dict()
    back.config.save_pretrained(tmp_path / "again")
    after = read_config(tmp_path / "again")
    same = after.keys() & before.keys() - {"transformers_version", "dtype", "initializer_range", "use_cache"}
    if numbers.get("sliding_window", 0) is None:
        same -= {"model_type", "architectures"}  # it is a Llama
    assert {key: after[key] for key in same} == {key: before[key] for key in same}


def with_an_opening(folder):
    """Give a folder's tokenizer the token <s>, id 257, and a template that puts it in front of every text."""
    path = str(folder / "tokenizer.json")
    tokenizer = library.Tokenizer.from_file(path)
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = library.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    tokenizer.save(path)


def test_prompts_begin_with_their_bos(tmp_path):
    """With a BOS token other than EOS, as Llama's <s>."""
    write_theirs(tmp_path / "theirs", "llama", vocab_size=258, bos_token_id=257)
    with_an_opening(tmp_path / "theirs")
    ended = interop("import", tmp_path / "theirs", tmp_path / "run")
    assert (ended.code, "note" in ended.out) == (0, False)
    _, ours = load(tmp_path / "run")
    ids = encode_prompt(ours, "a cat", LENGTH)
    assert ids[0] == 257
    export_model(tmp_path / "run", tmp_path / "back")
    config = read_config(tmp_path / "back")
    assert (config["bos_token_id"], config["eos_token_id"]) == (257, 0)
    for folder in ("theirs", "back"):
        path = str(tmp_path / folder / "tokenizer.json")
        assert transformers.PreTrainedTokenizerFast(tokenizer_file=path)("a cat").input_ids == ids
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "back").bos_token == "<s>"


def test_another_bos_is_noted(tmp_path):
    write_theirs(tmp_path / "theirs", "llama", bos_token_id=5)
    ended = interop("import", tmp_path / "theirs", tmp_path / "run")
    assert "note: texts begin with token 5 there, and with 0, the tokenizer's BOS, here" in ended.out


def test_a_window_shorter_than_the_text_matters(tmp_path):
    """The comparison above would fail without the window."""
    theirs = write_theirs(tmp_path / "theirs", "mistral", sliding_window=7)
    change(tmp_path / "theirs", sliding_window=None)
    import_model(tmp_path / "theirs", tmp_path / "run")
    with pytest.raises(AssertionError):
        assert_same(load(tmp_path / "run")[0], theirs, LENGTH, 257)


@pytest.mark.parametrize("rope", [LLAMA3, {"rope_type": "default", "rope_theta": 3e5}], ids=["llama3", "default"])
def test_older_files(rope, tmp_path):
    """rope_theta and rope_scaling of transformers 4, the oldest name of the type, absent keys, frequencies."""
    theirs = write_theirs(tmp_path / "theirs", "llama", rope_parameters=rope, num_key_value_heads=6)
    config = read_config(tmp_path / "theirs")
    scaling = {key: value for key, value in config.pop("rope_parameters").items() if key != "rope_theta"}
    scaling["type"] = scaling.pop("rope_type")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling if rope is LLAMA3 else None}
    for key in ("head_dim", "num_key_value_heads", "attention_bias", "mlp_bias", "tie_word_embeddings"):
        del config[key]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    path = str(tmp_path / "theirs" / "model.safetensors")
    arrays = mx.load(path)
    mx.eval(arrays)
    mx.save_safetensors(path, arrays | {"model.layers.1.self_attn.rotary_emb.inv_freq": mx.ones(2)})
    import_model(tmp_path / "theirs", tmp_path / "run")
    assert_same(load(tmp_path / "run")[0], theirs, LENGTH, 257)


@pytest.mark.parametrize(
    ("kind", "numbers", "absent"),
    [
        ("mistral", {"hidden_size": 16, "num_attention_heads": 8, "num_key_value_heads": 8}, ["num_key_value_heads"]),
        (
            "qwen3",
            {"hidden_size": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128},
            ["num_key_value_heads", "head_dim"],
        ),
    ],
    ids=["mistral", "qwen3"],
)
def test_absent_keys_have_the_defaults_of_the_architecture(kind, numbers, absent, tmp_path):
    theirs = write_theirs(tmp_path / "theirs", kind, **numbers)
    config = read_config(tmp_path / "theirs")
    for key in absent:
        del config[key]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    import_model(tmp_path / "theirs", tmp_path / "run")
    assert_same(load(tmp_path / "run")[0], theirs, LENGTH, 257)


@pytest.mark.parametrize(("kind", "branch", "window"), [("llama", None, {}), ("mistral", "mistral", {"window": 9})])
def test_training_continues_from_an_imported_run(kind, branch, window, text, tmp_path):
    """--init-from takes their weights and configuration; --resume continues; the result can be exported."""
    odd = {"head_dim": 10, "rope_parameters": LLAMA3} | ({"sliding_window": 9} if window else {})
    write_theirs(tmp_path / "theirs", kind, **odd)
    ended = interop("import", tmp_path / "theirs", tmp_path / "run")
    named = f"--branch {branch} " if branch else ""
    assert f"python -m phases.phase5 {named}--init-from {tmp_path / 'run'}" in ended.out
    line = [*named.split(), "--data", text, "--seq-len", 24, "--batch-size", 2, "--quiet"]
    moved = tmp_path / "moved"
    line += ["--init-from", tmp_path / "run", "--learning-rate", 1e-3, "--out", moved]
    for args in ([*line, "--max-steps", 2], ["--resume", moved, "--max-steps", 4, "--quiet"]):
        ended = command(lambda: training.main(find_phase(5)), *args)
        assert (ended.code, ended.err) == (0, "")
    result = json.loads((moved / "result.json").read_text())
    own = {"head_dim": 10, "rope_factor": 8.0, "n_kv_heads": 2, "seq_len": 24, "max_len": LENGTH, **window}
    assert result["steps"] == 4
    assert result["config"] | own == result["config"]
    before, after = weights(load(tmp_path / "run")[0]), weights(load(moved)[0])
    assert all(not mx.array_equal(before[path], after[path]) for path in before)
    export_model(moved, tmp_path / "out")
    assert_same(load(moved)[0], transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), LENGTH, 257)


OURS = [
    (None, {}),
    ("tied", {"rope_factor": 4.0, "rope_original_len": 12}),
    ("mistral", {"window": 6, "n_heads": 4}),
    ("qwen3_tied", {"n_heads": 4, "n_kv_heads": 1}),
]


@pytest.mark.parametrize(("branch", "numbers"), OURS, ids=str)
def test_an_exported_model_computes_the_same_and_is_imported_unchanged(branch, numbers, bpe, tmp_path):
    ours = write_ours(tmp_path / "run", bpe, 5, branch, **numbers)
    export_model(tmp_path / "run", tmp_path / "theirs")
    theirs, loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(loaded.values()), loaded
    assert_same(ours, theirs.eval(), 37, bpe.vocab_size)

    prompt = "the cat 123"  # through their cache, too, and each one's own tokenizer
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    completion = complete(ours, bpe, [prompt], sampling=GREEDY)[0]
    written = theirs.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, max_length=30)[0]
    assert tokenizer.decode(written, skip_special_tokens=True) == completion.text

    import_model(tmp_path / "theirs", tmp_path / "back")
    back = load(tmp_path / "back")[0]
    assert type(back) is type(ours)
    assert all(mx.array_equal(value, weights(ours)[path]) for path, value in weights(back).items())
    assert back.config.to_dict() == {**ours.config.to_dict(), "seq_len": 37}


@pytest.mark.parametrize(("branch", "numbers"), [*OURS[:2], ("mistral", {"window": 37}), *OURS[3:]], ids=str)
def test_mlx_lm_loads_an_export(branch, numbers, bpe, tmp_path):
    ours = write_ours(tmp_path / "run", bpe, 5, branch, **numbers)
    assert_mlx_lm_computes_the_same(ours, bpe, tmp_path)


def test_what_other_libraries_cannot_load_is_noted(bpe, tmp_path):
    write_ours(tmp_path / "short", bpe, 5, "mistral", window=6)
    said = export_model(tmp_path / "short", tmp_path / "theirs")
    assert "mlx-lm cannot hold it: its Mistral has no window, which is another model after 6 tokens" in said
    write_ours(tmp_path / "odd", bpe, 5, None, n_heads=4)
    ended = interop("export", tmp_path / "odd", tmp_path / "out")
    assert_bad(ended, "transformers cannot hold such a model: its Llama has a d_model that is a multiple of n_heads")
    assert not (tmp_path / "out").exists()


REFUSED = [
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0}}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("llama", {"rope_parameters": {**LLAMA3, "factor": None}}),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}),
    ("llama", {"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}),
    ("llama", {"rope_parameters": [1]}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 0}}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": -5.0}}),
    ("llama", {"rope_parameters": {"rope_type": ["llama3"]}}),
    ("llama", {"head_dim": 5}),
    ("llama", {"num_attention_heads": 0}),
    ("llama", {"num_attention_heads": "6"}),
    ("llama", {"num_attention_heads": 1.5}),
    ("llama", {"num_key_value_heads": 4}),
    ("mistral", {"sliding_window": 0}),
    ("mistral", {"sliding_window": "all"}),
    ("qwen3", {"use_sliding_window": True}),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("qwen3", {"layer_types": 5}),
]


@pytest.mark.parametrize(("kind", "values"), REFUSED, ids=str)
def test_a_config_that_the_phase_cannot_compute(kind, values, tmp_path):
    write_theirs(tmp_path / "theirs", kind)
    change(tmp_path / "theirs", **values)
    refused(tmp_path / "theirs")
