"""GPT-2 from and to Hugging Face: equal logits, greedy text and tokens; nothing silently dropped."""

import json

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlx_transformer import load
from mlx_transformer.data.corpus import load_corpus
from mlx_transformer.data.documents import read_parts
from mlx_transformer.data.tokenizers import HFTokenizer, WordTokenizer, train_tokenizer
from mlx_transformer.data.tokens import encode_text
from mlx_transformer.generate import complete
from mlx_transformer.generate.decoding import GREEDY
from mlx_transformer.interop.formats import FORMATS, GPT2
from mlx_transformer.interop.weights import Part, Row, from_hf, to_hf
from mlx_transformer.run import training
from mlx_transformer.run.commands import evaluate as evaluate_command
from mlx_transformer.run.commands import interop as command_line
from mlx_transformer.run.commands.interop import export_model, import_model
from mlx_transformer.run.ladder import find_branch, find_phase
from mlx_transformer.run.saved import save_model
from mlx_transformer.utils.errors import RunFailed, exit_cleanly
from phases import phase1, phase3
from tests.faults.runs import assert_bad, command
from tests.interop.hugging_face import (
    assert_mlx_lm_computes_the_same,
    assert_same,
    assert_same_text,
    byte_level,
    change,
    interop,
    refused,
    their_logits,
    torch,
    transformers,
    weights,
    write_ours,
    write_theirs,
)

# Theirs: odd sizes, with and without an own head, with rows to spare in the vocabulary.
THEIRS = {
    "tied": {"n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 21},
    "untied": {"n_embd": 15, "n_layer": 1, "n_head": 5, "n_positions": 33, "tie_word_embeddings": False},
    "one head, a narrow middle": {"n_embd": 9, "n_layer": 3, "n_head": 1, "n_positions": 19, "n_inner": 7},
    "rows to spare": {"n_embd": 14, "n_layer": 2, "n_head": 7, "n_positions": 17, "vocab_size": 311},
    "another epsilon": {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, "layer_norm_epsilon": 1e-2},
}


# Import


@pytest.mark.parametrize("numbers", THEIRS.values(), ids=THEIRS)
def test_an_imported_model_computes_the_same(numbers, tmp_path):
    theirs = write_theirs(tmp_path / "theirs", "gpt2", **numbers)
    ended = interop("import", tmp_path / "theirs", tmp_path / "run")
    assert (ended.code, ended.err) == (0, "")
    ours, tokenizer = load(tmp_path / "run")
    assert tokenizer.kind == "hf"
    assert type(ours) is find_branch(phase3, "tied" if numbers.get("tie_word_embeddings", True) else None)
    assert_same(ours, theirs, numbers["n_positions"], numbers.get("vocab_size", 257))


def test_an_imported_model_has_their_loss(tmp_path):
    theirs = write_theirs(tmp_path / "theirs", "gpt2", **THEIRS["untied"])
    import_model(tmp_path / "theirs", tmp_path / "run")
    (tmp_path / "text.txt").write_text("the cat sat on a mat")  # in one sequence of 33
    ended = command(
        lambda: exit_cleanly(evaluate_command.main), tmp_path / "run", "--data", tmp_path / "text.txt", "--json"
    )
    ids, _ = encode_text(read_parts(tmp_path / "text.txt"), load(tmp_path / "run")[1])
    logits = torch.tensor(their_logits(theirs, mx.array(ids[None, :-1].astype(np.int32))))[0]
    nats = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:].astype(np.int64))).item()
    values = json.loads(ended.out)
    assert (values["tokens"], values["nats_per_token"]) == (len(ids) - 1, pytest.approx(nats, abs=1e-4))


@pytest.mark.parametrize("end", ["<|endoftext|>", "[EOS]"])
def test_an_imported_model_generates_the_same(end, tmp_path):
    theirs = write_theirs(tmp_path / "theirs", "gpt2", **THEIRS["another epsilon"])
    byte_level(tmp_path / "theirs", end)
    import_model(tmp_path / "theirs", tmp_path / "run")
    ours, tokenizer = load(tmp_path / "run")
    assert tokenizer.token(tokenizer.eos_id) == end
    assert_same_text(ours, tokenizer, theirs, tmp_path / "theirs", 16)
    export_model(tmp_path / "run", tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert_same_text(ours, tokenizer, back, tmp_path / "back", 16)


def test_the_end_of_text_is_theirs(tmp_path):
    """eos_token_id rather than a usual name, where it is a special token; it is exported again."""
    write_theirs(tmp_path / "theirs", "gpt2", **THEIRS["rows to spare"])
    path = tmp_path / "theirs" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 257, "content": "<|im_end|>"})
    path.write_text(json.dumps(content))
    ends = ((257, 257), ([257, 0], 257), (0, 0), (5, 0), (50256, 0), (None, 0), ("257", 0))
    for i, (eos, eos_id) in enumerate(ends):
        change(tmp_path / "theirs", eos_token_id=eos)
        import_model(tmp_path / "theirs", tmp_path / f"run {i}")
        assert load(tmp_path / f"run {i}")[1].eos_id == eos_id
        export_model(tmp_path / f"run {i}", tmp_path / f"back {i}")
        assert json.loads((tmp_path / f"back {i}" / "config.json").read_text())["eos_token_id"] == eos_id


@pytest.mark.parametrize("numbers", THEIRS.values(), ids=THEIRS)
def test_an_import_exported_again_is_the_original(numbers, tmp_path):
    theirs = write_theirs(tmp_path / "theirs", "gpt2", **numbers)
    import_model(tmp_path / "theirs", tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    for name, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back"))
    before["n_inner"] = before["n_inner"] or 4 * before["n_embd"]
    same = after.keys() - {"n_ctx", "attn_pdrop"}
    assert {key: after[key] for key in same} == {key: before[key] for key in same}
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert auto("né\u2581 🙂").input_ids == load(tmp_path / "run")[1].encode("né\u2581 🙂")
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (tmp_path / "theirs" / "tokenizer.json").read_bytes()


def test_older_files(tmp_path):
    """Names without prefix, the causal mask among the weights, the tied matrix twice, half precision, shards."""
    theirs = write_theirs(tmp_path / "theirs", "gpt2", **THEIRS["tied"])
    path = tmp_path / "theirs" / "model.safetensors"
    arrays = {name.removeprefix("transformer."): value for name, value in mx.load(str(path)).items()}
    arrays = {name: value.astype(mx.bfloat16) for name, value in arrays.items()}
    arrays["lm_head.weight"] = arrays["wte.weight"]
    arrays |= {f"h.{i}.attn.bias": mx.ones((1, 1, 21, 21)) for i in range(2)}
    arrays |= {f"h.{i}.attn.masked_bias": mx.array(-1e4) for i in range(2)}
    mx.eval(arrays)
    path.unlink()
    names = sorted(arrays)
    for shard, own in (("model-1.safetensors", names[::2]), ("model-2.safetensors", names[1::2])):
        mx.save_safetensors(str(path.parent / shard), {name: arrays[name] for name in own})
    places = {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(names)}
    (path.parent / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    import_model(tmp_path / "theirs", tmp_path / "run")
    ours, _ = load(tmp_path / "run")
    theirs = theirs.bfloat16().float()
    assert {value.dtype for value in weights(ours).values()} == {mx.float32}
    assert_same(ours, theirs, 21, 257)


def test_training_continues_from_an_imported_run(text, tmp_path):
    """--init-from takes their weights and configuration; --resume continues; the result can be exported."""
    numbers = {**THEIRS["another epsilon"], "n_positions": 40}
    write_theirs(tmp_path / "theirs", "gpt2", **numbers)
    import_model(tmp_path / "theirs", tmp_path / "run")
    line = ["--branch", "tied", "--data", text, "--seq-len", 24, "--batch-size", 2, "--dropout", 0, "--quiet"]

    def train(*args):
        ended = command(lambda: training.main(find_phase(3)), *args, "--max-steps", 2)
        assert (ended.code, ended.err) == (0, "")

    still, moved = tmp_path / "still", tmp_path / "moved"
    train(*line, "--init-from", tmp_path / "run", "--learning-rate", 1e-12, "--out", still)
    before, after = (mx.load(str(folder / "model" / "model.safetensors")) for folder in (tmp_path / "run", still))
    assert before.keys() == after.keys()
    assert all(mx.allclose(before[name], after[name], atol=1e-6).item() for name in before)
    train(*line, "--init-from", tmp_path / "run" / "model", "--learning-rate", 1e-3, "--out", moved)
    ended = command(lambda: training.main(find_phase(3)), "--resume", moved, "--max-steps", 5, "--quiet")
    assert (ended.code, ended.err) == (0, "")
    result = json.loads((moved / "result.json").read_text())
    assert (result["steps"], result["tokenizer"]["kind"]) == (5, "hf")
    assert result["config"] | {"norm_eps": 1e-2, "max_len": 40, "seq_len": 24, "vocab_size": 257} == result["config"]
    export_model(moved, tmp_path / "out")
    assert_same(load(moved)[0], transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), 40, 257)


def test_a_model_with_rows_to_spare_can_be_trained(text, tmp_path):
    write_theirs(tmp_path / "theirs", "gpt2", **THEIRS["rows to spare"])
    import_model(tmp_path / "theirs", tmp_path / "run")
    line = ["--branch", "tied", "--data", text, "--batch-size", 2, "--max-steps", 1, "--quiet"]
    line += ["--init-from", tmp_path / "run", "--out", tmp_path / "on"]
    assert command(lambda: training.main(find_phase(3)), *line).code == 0
    assert load(tmp_path / "on")[0].config.vocab_size == 311


def test_differences_in_training_are_noted(tmp_path):
    write_theirs(tmp_path / "theirs", "gpt2", **THEIRS["tied"], resid_pdrop=0.2, embd_pdrop=0.3)
    change(tmp_path / "theirs", eos_token_id=[5, 7])
    said = interop("import", tmp_path / "theirs", tmp_path / "run").out.splitlines()
    assert said[:4] == [
        "note: embd_pdrop = 0.3 there is 0.2 here",
        "note: attn_pdrop = 0.1 there is 0.0 here",
        "note: texts end with token [5, 7] there, and with 0, the tokenizer's EOS, here",  # 5 is a plain token
        "note: dropout is 0.2 there, and 0.0 in training here without --dropout",
    ]
    train = "python -m phases.phase3 --branch tied --init-from"
    assert said[4].startswith(f"phase 3 in '{tmp_path / 'run'}'; train it with: {train}")
    assert len(said) == 5


# Export


@pytest.mark.parametrize("numbers", [{}, {"d_model": 12, "n_heads": 4, "d_ff": 48, "n_layers": 1}], ids=["odd", "even"])
@pytest.mark.parametrize("branch", [None, "tied"])
def test_an_exported_model_computes_the_same(branch, numbers, bpe, tmp_path):
    ours = write_ours(tmp_path / "run", bpe, 3, branch, **numbers)
    ended = interop("export", tmp_path / "run", tmp_path / "theirs")
    assert (ended.code, ended.err) == (0, "")
    theirs, loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs", output_loading_info=True, use_safetensors=True
    )
    assert not any(loaded.values()), loaded
    assert theirs.config.tie_word_embeddings == (branch == "tied")
    assert_same(ours, theirs.eval(), 37, bpe.vocab_size)

    assert_same_text(ours, bpe, theirs, tmp_path / "theirs", 30)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    completion = complete(ours, bpe, ["the cat 123"], sampling=GREEDY)[0]
    assert tokenizer.decode([*bpe.encode("the cat 123"), *completion.tokens]) == completion.text


def test_an_exported_run_with_an_imported_tokenizer_generates_the_same(tmp_path):
    byte_level(tmp_path)
    tokenizer = HFTokenizer.read(tmp_path / "tokenizer.json")
    ours = write_ours(tmp_path / "run", tokenizer, 3)
    export_model(tmp_path / "run", tmp_path / "theirs")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    assert_same_text(ours, tokenizer, theirs, tmp_path / "theirs", 30)


@pytest.mark.parametrize("branch", [None, "tied"])
def test_an_export_imported_again_is_the_original(branch, bpe, tmp_path):
    ours = write_ours(tmp_path / "run", bpe, 3, branch)
    export_model(tmp_path / "run" / "model", tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "back")
    back, tokenizer = load(tmp_path / "back")
    assert type(back) is type(ours)
    assert weights(back).keys() == weights(ours).keys()
    assert all(mx.array_equal(value, weights(ours)[path]) for path, value in weights(back).items())
    assert back.config.to_dict() == {**ours.config.to_dict(), "seq_len": ours.config.max_len}
    assert (tokenizer.eos_id, tokenizer.lossless) == (bpe.eos_id, True)


def test_mlx_lm_loads_an_export(bpe, tmp_path):
    assert_mlx_lm_computes_the_same(write_ours(tmp_path / "run", bpe, 3, "tied", d_ff=60), bpe, tmp_path)


@pytest.mark.parametrize(("branch", "why"), [(None, "no head of its own"), ("tied", "a d_ff of 4 d_model")])
def test_what_mlx_lm_cannot_load_is_noted(branch, why, bpe, tmp_path):
    write_ours(tmp_path / "run", bpe, 3, branch)
    assert f"mlx-lm cannot hold it: its GPT-2 has {why}" in export_model(tmp_path / "run", tmp_path / "theirs")


# The tokenizer

CHARACTERS = "\u2581\u2585 \n\t\0\r\x1a\u0301\ufeff\ufffd\U0010ffff\u2047\u200b\u3000é你🙂"
WORDS = ("  ", "<s>", "</s>", "<unk>", "<0x41>", "the cat", " do", "saaaa", "e\u0301", "👩‍🚀", "[UNK]", "tttttttt")
JOINED = st.lists(st.sampled_from([*CHARACTERS, *WORDS]), max_size=12).map("".join)
TEXTS = st.text() | JOINED | st.text("a t\n", max_size=40)  # the last: runs, in which pairs overlap


@pytest.fixture(scope="module")
def auto(bpe, tmp_path_factory):
    """AutoTokenizer of an exported run."""
    folder = tmp_path_factory.mktemp("auto")
    write_ours(folder / "run", bpe, 3)
    export_model(folder / "run", folder / "theirs")
    return transformers.AutoTokenizer.from_pretrained(folder / "theirs")


@given(text=TEXTS)
@example(text="")
@example(text="\u2581\u2581 \u2581")
@example(text=" leading and trailing ")
def test_their_tokenizer_gives_the_same_tokens_and_the_same_text(bpe, auto, text):
    ids = bpe.encode(text)
    assert auto(text, add_special_tokens=False).input_ids == ids
    assert auto(text).input_ids == [bpe.eos_id, *ids]
    assert auto.decode(ids) == text
    assert auto.decode([bpe.eos_id, *ids], skip_special_tokens=True) == text


def test_their_tokenizer_over_real_texts(shared_data, tmp_path):
    """A vocabulary of realistic size, on other texts than it was trained on."""
    names = ("tinystories-valid.txt", "wikitext2-valid.txt", "shakespeare.txt")
    texts = {name: (shared_data / name).read_text(encoding="utf-8")[:100_000] for name in names}
    (tmp_path / "text.txt").write_text(texts[names[0]], encoding="utf-8")
    tokenizer = train_tokenizer("bpe", load_corpus(str(tmp_path / "text.txt"), say=lambda line: None), 2048)
    write_ours(tmp_path / "run", tokenizer, 3)
    export_model(tmp_path / "run", tmp_path / "theirs")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    for text in texts.values():
        for start in range(0, len(text), 1000):
            part = text[start : start + 1000].replace("<|endoftext|>", "")
            ids = tokenizer.encode(part)
            assert auto(part, add_special_tokens=False).input_ids == ids
            assert auto.decode(ids) == part


def test_where_the_tokenizers_differ(bpe, auto):
    """The two cases that the docstring of `_bpe` names."""
    text = "a<|endoftext|>b"
    assert auto(text, add_special_tokens=False).input_ids == [*bpe.encode("a"), bpe.eos_id, *bpe.encode("b")]
    assert auto(text, add_special_tokens=False, split_special_tokens=True).input_ids == bpe.encode(text)
    half = bpe.encode("🙂")[:2]
    assert (bpe.decode(half), auto.decode(half)) == ("\ufffd", "\ufffd\ufffd")


# The table


@pytest.mark.parametrize("form", FORMATS, ids=[form.model_type for form in FORMATS])
def test_every_row_of_a_table_is_used_and_every_parameter_has_one(form):
    for branch in form.branches.values():
        kind = find_branch(find_phase(form.phase), branch)
        model = kind(kind.Config(vocab_size=11, d_model=6, n_layers=2, n_heads=3, d_ff=5, seq_len=4))
        own = weights(model)
        theirs = to_hf(form.weights, own)
        back = from_hf(form.weights, theirs, {path: value.shape for path, value in own.items()})
        assert all(mx.array_equal(back[path], own[path]) for path in own)
        used = {row.ours for row in form.weights if any(row.find(path) for path in own)}
        assert {row.ours for row in form.weights} - used <= {"head"}
        assert sum(value.size for value in theirs.values()) == sum(value.size for value in own.values())


@given(parts=st.integers(1, 4), out=st.integers(1, 5), into=st.integers(1, 5), transposed=st.booleans())
def test_a_part_is_read_as_it_was_written(parts, out, into, transposed):
    rows = tuple(Row(f"b.{{i}}.p{n}", "l.{i}.fused", Part(n, parts, transposed)) for n in range(parts))
    ours = {f"b.7.p{n}.weight": mx.random.normal((out, into)) for n in reversed(range(parts))}
    ours |= {f"b.7.p{n}.bias": mx.random.normal((out,)) for n in range(parts)}
    theirs = to_hf(rows, ours)
    assert {name: value.shape for name, value in theirs.items()} == {
        "l.7.fused.weight": (into, parts * out) if transposed else (parts * out, into),
        "l.7.fused.bias": (parts * out,),
    }
    back = from_hf(rows, theirs, {path: value.shape for path, value in ours.items()})
    assert all(mx.array_equal(back[path], ours[path]) for path in ours)


def test_a_parameter_without_a_row_or_with_two_is_named():
    with pytest.raises(ValueError, match=r"for blocks\.0\.secret\.weight, b\.weight"):
        to_hf(GPT2.weights, {"blocks.0.secret.weight": mx.ones(2), "b.weight": mx.ones(2)})
    with pytest.raises(ValueError, match=r"for a\.weight"):
        to_hf((Row("a", "b"), Row("a", "c")), {"a.weight": mx.ones(2)})


# Folders that cannot be used


@pytest.fixture
def theirs(tmp_path):
    write_theirs(tmp_path / "theirs", "gpt2", **THEIRS["tied"])
    return tmp_path / "theirs"


@pytest.mark.parametrize("kind", ["gemma", "bert", None, 7, ["gpt2"], "../gpt2"])
def test_an_architecture_that_no_phase_holds(kind, theirs):
    change(theirs, model_type=kind)
    refused(theirs, f"holds a model of type {kind!r}: supported are gpt2 (phase 3)")


UNSUPPORTED = [
    {"activation_function": "relu"},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"add_cross_attention": True},
    {"tie_word_embeddings": "yes"},
    {"tie_word_embeddings": []},
    {"activation_function": ["gelu_new"]},
    {"n_embd": None},
    {"n_embd": "12"},
    {"n_head": 5},
    {"n_layer": 0},
    {"n_layer": True},
    {"n_inner": 1.5},
    {"vocab_size": 10**10},
    {"layer_norm_epsilon": float("nan")},
    {"layer_norm_epsilon": -1e-5},
    {"quantization_config": {"quant_method": "fp8"}},
    {"resid_pdrop": 1},
    {"layer_norm_epsilon": [1]},
]


@pytest.mark.parametrize("values", UNSUPPORTED, ids=str)
def test_a_config_that_the_phase_cannot_compute(values, theirs):
    change(theirs, **values)
    refused(theirs)


def test_numbers_that_are_absent_are_their_defaults(theirs):
    path = theirs / "config.json"
    small = ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in small}))
    refused(theirs, "h.0.attn.c_attn.bias should be (2304,) and is (36,)", "; and 128 more")


@pytest.mark.parametrize("key", ["add_cross_attention", "reorder_and_upcast_attn", "scale_attn_weights"])
def test_null_is_absent(key, theirs, tmp_path):
    change(theirs, **{key: None})
    assert interop("import", theirs, tmp_path / "run").code == 0


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "\x00", "[" * 100_000])
def test_a_damaged_config(text, theirs):
    (theirs / "config.json").write_text(text)
    refused(theirs, "config.json")


def test_more_layers_than_weights_are_refused_before_they_are_made(theirs):
    change(theirs, n_layer=10**9)
    refused(theirs, "too few for the 1000000000 layers of config.json")


def without_one(arrays):
    del arrays["transformer.h.1.mlp.c_fc.bias"]
    return "h.1.mlp.c_fc.bias should be (48,) and is missing"


def with_more(arrays):
    arrays |= {"transformer.h.2.ln_1.weight": mx.ones(12), "score.weight": mx.ones((2, 12))}
    return "h.2.ln_1.weight should be absent and is (12,); score.weight should be absent and is (2, 12)"


def with_many_more(arrays):
    arrays |= {f"x{i}": mx.ones(1) for i in range(30)}
    return "; and 10 more"


def with_a_name_twice(arrays):
    arrays["ln_f.weight"] = mx.ones(12)
    return "some weights are there twice, with 'transformer.' in front and without"


def of_another_shape(arrays):
    arrays["transformer.h.0.attn.c_attn.weight"] = arrays["transformer.h.0.attn.c_attn.weight"].T
    return "h.0.attn.c_attn.weight should be (12, 36) and is (36, 12)"


def with_another_head(arrays):
    arrays["lm_head.weight"] = arrays["transformer.wte.weight"] + 1
    return "lm_head.weight is not wte.weight, and yet tie_word_embeddings is true"


def in_whole_numbers(arrays):
    arrays["transformer.h.0.ln_1.bias"] = (arrays["transformer.h.0.ln_1.bias"] * 100).astype(mx.int8)
    return "h.0.ln_1.bias holds int8: expected floats, not quantized"


def with_nan(arrays):
    arrays["transformer.wpe.weight"] = arrays["transformer.wpe.weight"] * mx.nan
    return "not finite in 'position.weight'"


WRONG = [
    with_nan,
    in_whole_numbers,
    without_one,
    with_more,
    with_many_more,
    with_a_name_twice,
    of_another_shape,
    with_another_head,
]


@pytest.mark.parametrize("wrong", WRONG)
def test_weights_that_do_not_fit(wrong, theirs):
    path = str(theirs / "model.safetensors")
    arrays = mx.load(path)
    mx.eval(arrays)
    said = wrong(arrays)
    mx.save_safetensors(path, arrays)
    refused(theirs, said)


def test_weights_in_other_formats(theirs):
    path = theirs / "model.safetensors"
    raw = path.read_bytes()
    for content in (b"", raw[:100], raw[:-1], b"PK\x03\x04"):
        path.write_bytes(content)
        refused(theirs, "model.safetensors")
    path.unlink()
    refused(theirs, "model.safetensors")
    (theirs / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(theirs, "pytorch_model.bin' is a pickle")


INDICES = [
    {},
    [],
    {"weight_map": []},
    {"weight_map": {"a": 1}},
    {"weight_map": {"a": "../x.safetensors"}},
    {"weight_map": {"a": "model.bin"}},
    {"weight_map": {"a": "gone.safetensors"}},
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_an_index_that_names_no_shards(index, theirs):
    (theirs / "model.safetensors").unlink()
    (theirs / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(theirs)


def test_an_index_beside_the_single_file(theirs, tmp_path):
    """Like from_pretrained, the import prefers the single file to an index."""
    (theirs / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert interop("import", theirs, tmp_path / "run").code == 0


def test_a_tokenizer_that_does_not_belong_to_it(theirs):
    path = theirs / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["one more"] = 257
    path.write_text(json.dumps(content))
    refused(theirs, "a tokenizer of 258 tokens and a model of 257")
    content["model"]["vocab"], content["added_tokens"] = {}, []
    path.write_text(json.dumps(content))
    refused(theirs, "this tokenizer.json has no tokens")
    path.write_text("{")
    refused(theirs, "tokenizer")
    path.unlink()
    refused(theirs, "tokenizer.json", "save_pretrained")


def test_a_run_that_cannot_be_exported(bpe, text, tmp_path):
    model = phase1.Model(phase1.Config(vocab_size=bpe.vocab_size, d_model=8, n_layers=1, n_heads=2, d_ff=8, seq_len=8))
    save_model(tmp_path / "run" / "model", model, bpe, 1, None)
    held = "phase 3/tied, phase 3, phase 5/tied, phase 5, phase 5/mistral_tied, "
    assert_bad(interop("export", tmp_path / "run", tmp_path / "out"), "phase 1 is not exported to", held)
    write_ours(tmp_path / "words", WordTokenizer(["the", "cat"]), 3)
    assert_bad(interop("export", tmp_path / "words", tmp_path / "out"), "a word tokenizer has no form")
    assert_bad(interop("export", tmp_path / "nowhere", tmp_path / "out"), "holds no model")
    assert not (tmp_path / "out").exists()


def test_an_empty_target_stays_the_folder_that_it_was(theirs, tmp_path, monkeypatch):
    """Somebody's working directory, or what a link leads to."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    before = (tmp_path / "here").stat().st_ino
    monkeypatch.chdir(tmp_path / "here")
    assert interop("import", theirs, ".").code == 0
    assert (tmp_path / "here").stat().st_ino == before
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert interop("import", theirs, tmp_path / "link").code == 0
    assert interop("import", theirs, tmp_path / ("n" * 250)).code == 0
    for name in ("here", "there", "n" * 250):
        assert weights(load(tmp_path / name)[0])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_target_that_is_not_empty(theirs, bpe, tmp_path):
    write_ours(tmp_path / "run", bpe, 3)
    for line in (["import", theirs, tmp_path / "run"], ["export", tmp_path / "run", theirs]):
        assert_bad(interop(*line), "is not empty: expected a folder that is new or empty")
    assert_bad(interop("export", tmp_path / "run", theirs / "config.json"), "is a file: expected a folder")
    assert_bad(interop("import", theirs, theirs / "config.json" / "run"), "cannot be made", "is a file")
    (tmp_path / "new").mkdir()
    assert interop("export", tmp_path / "run", tmp_path / "new").code == 0


def test_a_full_disk_leaves_nothing(theirs, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command_line, "save_model", full)
    with pytest.raises(RunFailed, match="No space left on device"):
        import_model(theirs, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("line", [[], ["import"], ["import", "a"], ["improt", "a", "b"], ["import", "a", "b", "c"]])
def test_a_command_that_cannot_be_read(line):
    assert_bad(interop(*line))
