"""Decoding, sampling, and how tokens become text."""

import io
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlx_transformer.data.tokenizers import WordTokenizer
from mlx_transformer.generate import (
    Sampling,
    complete,
    completion,
    decode,
    decoding,
    encode_prompt,
    generate,
    generate_unconditional,
    stream_completion,
)
from mlx_transformer.utils.errors import BadInput
from phases import phase1
from tests.faults import runs
from tests.ladder import kinds, tiny

GREEDY = Sampling(temperature=0.0)


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8 and, as 0, EOS."""

    eos_id, vocab_size, bos_id, prompt_prefix = 0, 257, 0, (0,)

    def encode(self, text):
        return [byte + 1 for byte in text.encode()]

    def decode(self, tokens):
        return bytes(token - 1 for token in tokens if token).decode(errors="replace")


TOKENIZER = Bytes()
SHAPE = SimpleNamespace(
    config=SimpleNamespace(seq_len=40), parallel=False
)  # all that is asked of a model that is not run


@pytest.fixture(scope="module")
def model():
    return tiny(phase1.Model, vocab_size=257, seq_len=40)


@pytest.fixture
def scripted(monkeypatch):
    """Replace the decoder by one that writes a given text after each prompt, then EOS."""

    def script(*texts):
        tokens = [TOKENIZER.encode(text) for text in texts]

        def decode(model, prompts, count, **_):
            for i in range(count):
                yield [own[i] if i < len(own) else TOKENIZER.eos_id for own in tokens]

        monkeypatch.setattr(completion, "decode", decode)
        return SHAPE

    return script


# Decoding


def greedy_by_hand(model, prompt, count, context=10**9):
    """Decode without a cache; a full context is cut to its last half."""
    window, drawn = list(prompt), []
    for _ in range(count):
        if len(window) >= context:
            window = window[-(context // 2) :]
        drawn.append(mx.argmax(model(mx.array([window]))[0, -1]).item())
        window.append(drawn[-1])
    return drawn


def test_greedy_is_the_argmax_of_the_uncached_model(model):
    prompt = [0, 5, 100, 7]
    drawn = [token for (token,) in decode(model, [prompt], 36, sampling=GREEDY)]
    assert drawn == greedy_by_hand(model, prompt, 36)
    assert len(set(drawn)) > 5, "a constant would prove little"


def test_prompts_of_unequal_length_do_not_affect_each_other(model):
    prompts = [[0, 9], [0, 5, 100, 7, 33, 250, 1, 2], [0], [0, 200, 201]]
    together = list(zip(*decode(model, prompts, 20, sampling=GREEDY), strict=True))
    for prompt, drawn in zip(prompts, together, strict=True):
        assert list(drawn) == greedy_by_hand(model, prompt, 20)


SLIDING = ("1", "3", "3-longformer", "3-t5", "5-mistral", "idea-hybrid")  # every kind of cache


@pytest.mark.parametrize("name", SLIDING)
def test_past_the_context_the_last_half_is_read_again(name):
    """Each sequence of a batch at its own time: as alone, and as without a cache."""
    net = tiny(kinds()[name])  # a context of 17
    decoder = decoding.Decoder(net)
    prompts = [[5, 9], [5, 60, 7, 33, 25, 1, 2, 9, 9, 8, 50], [3]]
    together = list(zip(*decoder(prompts, 36, context=17), strict=True))
    for prompt, drawn in zip(prompts, together, strict=True):
        assert list(drawn) == greedy_by_hand(net, prompt, 36, context=17)
        assert [token for (token,) in decoder([prompt], 36, context=17)] == list(drawn)
    assert len({token for drawn in together for token in drawn}) > 5, "a constant would prove little"
    assert [drawn[:6] for drawn in together] == list(zip(*decoder(prompts, 6), strict=True))


def test_sequences_on_two_streams_slide(model):
    prompts = [[0, *range(1, 2 + i % 5)] for i in range(34)]
    together = list(zip(*decode(model, prompts, 50, context=40), strict=True))
    for i in (0, 4, 20, 33):
        assert list(together[i]) == greedy_by_hand(model, prompts[i], 50, context=40)


def test_a_cache_that_slides_stays_as_long_as_the_context(model):
    decoder, sizes = decoding.Decoder(model), []
    step = decoder.step
    decoder.step = lambda tokens, cache: (step(tokens, cache), sizes.append(cache.layers[0].arrays["k"].shape[2]))[0]
    list(decoder([[0], [0, 5, 7], [1, 2, 3, 4, 5, 6]], 200, context=40))
    assert max(sizes) <= 64
    assert len(set(sizes)) <= 4, "each shape is compiled"


def test_slides_are_counted():
    for context in (2, 3, 17, 40):
        for prompt in range(1, context):
            window, slides = prompt, 0
            for drawn in range(1, 100):
                if window >= context:
                    window, slides = max(1, context // 2), slides + 1
                window += 1
                assert decoding.count_slides(prompt, drawn, context) == slides


def test_a_cache_grows_as_it_fills():
    prompts = [[0, *range(1, 60)], [0, 9, 8]]
    decoder = decoding.Decoder(tiny(phase1.Model, vocab_size=257, seq_len=150))
    together = list(zip(*decoder(prompts, 72, sampling=GREEDY), strict=True))
    for prompt, drawn in zip(prompts, together, strict=True):
        assert list(drawn) == greedy_by_hand(decoder.model, prompt, 72)


def test_a_cache_grows_only_when_it_is_full(model):
    decoder, cache = decoding.Decoder(model), model.make_cache(1)
    model.last_hidden(mx.array([[0] * 62]), cache)
    slots = []
    for _ in range(5):
        mx.eval(decoder.step(mx.array([3]), cache))
        slots.append(cache.layers[0].arrays["k"].shape[2])
    assert slots == [64, 64, 80, 80, 80]


def test_no_prompt_and_no_token_give_nothing(model):
    assert list(decode(model, [], 5)) == []
    assert list(decode(model, [[0]], 0)) == []
    assert complete(model, TOKENIZER, []) == []


def test_a_model_in_training_mode_is_decoded_without_dropout():
    net = tiny(phase1.Model, vocab_size=257, seq_len=40, dropout=0.5)
    net.train()
    prompts = [[1, 2, 3], [4]]
    first, second = (list(decode(net, prompts, 8)) for _ in range(2))
    assert net.training, "the model itself must not change"
    net.eval()
    assert first == second == list(decode(net, prompts, 8))


def test_any_thread_can_decode(model):
    prompts = [[i + 1] for i in range(40)]  # as many as two streams
    expected = list(decode(model, prompts, 4))
    for _ in range(2):
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(lambda: list(decode(model, prompts, 4))).result() == expected
    assert list(decode(model, prompts, 4)) == expected


def test_the_seed_decides_the_text(model):
    texts = [complete(model, TOKENIZER, ["ab", "c"], seed=seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


# From tokens to text


def test_a_completion_ends_with_eos(scripted):
    one, two = complete(scripted("x", "then more"), TOKENIZER, ["a ", "b "])
    assert (one.text, one.continuation, one.ended) == ("a x", "x", True)
    assert (two.text, two.ended) == ("b then more", True)
    assert one.tokens == TOKENIZER.encode("x")


def test_a_completion_ends_with_the_context_or_at_its_limit(scripted):
    model = scripted("x" * 99, "y" * 99)
    short, long = complete(model, TOKENIZER, ["a" * 30, "a"])
    assert (len(short.tokens), short.ended) == (40 - 31, False)
    assert (len(long.tokens), long.ended) == (40 - 2, False)
    assert (short.slides, long.slides) == (0, 0)


def test_max_tokens_reaches_past_the_context(scripted):
    short, long = complete(scripted("x" * 99, "y" * 99), TOKENIZER, ["a" * 30, "a"], max_tokens=35)
    assert (len(short.tokens), len(long.tokens)) == (35, 35)
    assert (short.slides, long.slides) == (2, 0)  # room for 9 tokens, then 20 after each slide; room for 38


def test_generate(model):
    """The public function: one prompt or several, at once or streamed."""
    options = {"max_tokens": 60, "temperature": 0.7, "top_k": 40, "seed": 2}
    one, two = generate(model, TOKENIZER, ["hello", "a"], **options)
    sampling = Sampling(temperature=0.7, top_k=40)
    assert [one, two] == complete(model, TOKENIZER, ["hello", "a"], max_tokens=60, sampling=sampling, seed=2)
    (alone,) = generate(model, TOKENIZER, "hello", **options)
    assert "".join(generate(model, TOKENIZER, "hello", stream=True, **options)) == alone.continuation
    assert (alone.slides, alone.ended) == (2, False)
    with pytest.raises(BadInput, match="stream = True with 2 prompts: expected one"):
        generate(model, TOKENIZER, ["a", "b"], stream=True)
    with pytest.raises(BadInput, match="max-tokens = 0"):
        generate(model, TOKENIZER, "a", max_tokens=0)
    with pytest.raises(BadInput, match="is empty"):
        generate(model, TOKENIZER, "", stream=True)


def test_unconditional_samples(model):
    one, two = generate_unconditional(model, TOKENIZER, 2, seed=3)
    assert one.prompt == two.prompt == ""
    assert one.tokens != two.tokens
    assert [one, two] == generate_unconditional(model, TOKENIZER, 2, seed=3)
    assert all(sample.ended or len(sample.tokens) == 39 for sample in (one, two))


def test_a_context_filled_to_the_last_token(model):
    (one,) = complete(model, TOKENIZER, ["a" * 38], sampling=GREEDY)
    assert one.tokens == greedy_by_hand(model, [0, *TOKENIZER.encode("a" * 38)], 1)


@settings(max_examples=30)
@given(st.text(max_size=12))
def test_a_stream_joined_is_the_completion_and_shows_only_whole_characters(text):
    assume(len(text.encode()) < 30)
    with pytest.MonkeyPatch.context() as patch:
        tokens = TOKENIZER.encode(text)
        patch.setattr(completion, "decode", lambda *_, **__: ([token] for token in [*tokens, 0]))
        parts = list(stream_completion(SHAPE, TOKENIZER, "ab"))
    assert "".join(parts) == text
    assert all("\ufffd" not in part or "\ufffd" in text for part in parts)


def test_characters_of_several_tokens_come_at_once(scripted):
    parts = list(stream_completion(scripted("né🙂!"), TOKENIZER, "a"))
    assert [part for part in parts if part] == ["n", "é", "🙂", "!"]


def test_a_character_that_is_never_finished_is_still_yielded(scripted, monkeypatch):
    model = scripted("")
    tokens = [*TOKENIZER.encode("x🙂")[:-1], 0]
    monkeypatch.setattr(completion, "decode", lambda *_, **__: ([token] for token in tokens))
    assert "".join(stream_completion(model, TOKENIZER, "a")) == "x\ufffd"
    assert complete(model, TOKENIZER, ["a"])[0].continuation == "x\ufffd"


def test_a_stream_is_the_completion(model):
    for seed in range(3):
        for max_tokens in (None, 100):
            (whole,) = complete(model, TOKENIZER, ["hello"], seed=seed, max_tokens=max_tokens)
            parts = stream_completion(model, TOKENIZER, "hello", seed=seed, max_tokens=max_tokens)
            assert "".join(parts) == whole.continuation


def test_words_are_separated_from_the_prompt(monkeypatch):
    tokenizer = WordTokenizer(["once", "upon", "a", "time", "."])
    tokens = [[token] for token in [*tokenizer.encode("a time."), tokenizer.eos_id]]
    monkeypatch.setattr(completion, "decode", lambda *_, **__: iter(tokens))
    assert complete(SHAPE, tokenizer, ["once upon"])[0].text == "once upon a time."
    assert "".join(stream_completion(SHAPE, tokenizer, "once upon")) == " a time."


@pytest.mark.parametrize("prompt", ["", "  \n\t "])
def test_an_empty_prompt_is_bad_input(prompt):
    with pytest.raises(BadInput, match="is empty"):
        encode_prompt(TOKENIZER, prompt, 40)


def test_a_prompt_must_leave_room_for_a_token():
    assert len(encode_prompt(TOKENIZER, "a" * 38, 40)) == 39
    with pytest.raises(BadInput, match=r"prompt 'a{39}' has 40 tokens: expected fewer than the context of 40"):
        encode_prompt(TOKENIZER, "a" * 39, 40)


# Sampling


def softmax(logits):
    p = np.exp(logits - logits.max())
    return p / p.sum()


def kept(logits, **numbers):
    """The tokens that a filter keeps."""
    return set(np.flatnonzero(np.isfinite(np.array(Sampling(**numbers).filtered(mx.array(logits[None])))[0])).tolist())


distinct = st.lists(st.integers(-60, 60), min_size=2, max_size=30, unique=True).map(
    lambda values: np.array(values, np.float32) / 10
)


@given(distinct, st.integers(1, 35))
def test_top_k_keeps_the_k_most_probable(logits, k):
    assert kept(logits, top_k=k, temperature=0.7) == set(np.argsort(-logits)[:k].tolist())


@given(distinct, st.floats(0.01, 1), st.floats(0.3, 3))
def test_top_p_keeps_the_smallest_set_of_that_mass(logits, top_p, temperature):
    order = np.argsort(-logits)
    mass = np.cumsum(softmax(logits.astype(np.float64) / temperature)[order])
    assume(np.abs(mass - top_p).min() > 1e-5)
    size = int((mass < top_p).sum()) + 1
    assert kept(logits, top_p=top_p, temperature=temperature) == set(order[:size].tolist())


@given(distinct, st.floats(0, 1), st.floats(0.3, 3))
def test_min_p_keeps_tokens_relative_to_the_most_probable(logits, min_p, temperature):
    p = softmax(logits.astype(np.float64) / temperature)
    assume(np.abs(p - min_p * p.max()).min() > 1e-6 or min_p in (0, 1))
    assert kept(logits, min_p=min_p, temperature=temperature) == set(np.flatnonzero(p >= min_p * p.max()).tolist())


@given(distinct, st.integers(1, 30), st.floats(0.01, 1), st.floats(0, 1))
def test_filters_apply_one_after_the_other(logits, top_k, top_p, min_p):
    order = np.argsort(-logits)[:top_k]
    p = softmax(logits.astype(np.float64)[order])
    mass = np.cumsum(p)
    assume(np.abs(mass - top_p).min() > 1e-5 and np.abs(p - min_p * p[0])[1:].min(initial=1) > 1e-5)
    size = min(int((mass < top_p).sum()) + 1, len(order))
    expected = {token for token, own in zip(order[:size].tolist(), p, strict=False) if own >= min_p * p[0]}
    assert kept(logits, temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p) == expected


def test_top_k_keeps_equal_tokens():
    assert kept(np.zeros(4, np.float32), top_k=1) == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-7, 1e-5, 1e-3])
def test_a_low_temperature_is_greedy(temperature):
    logits = mx.array([[3.0, 500.0, -500.0, 499.0], [1.0, 0.5, 0.0, -3e4]])
    for seed in range(5):
        assert Sampling(temperature=temperature)(logits, mx.random.key(seed)).tolist() == [1, 0]


def test_a_high_temperature_is_uniform():
    drawn = Sampling(temperature=1e38)(mx.array([[3.0, 50.0, -50.0, 0.0]] * 400), mx.random.key(0))
    assert set(drawn.tolist()) == {0, 1, 2, 3}


def test_samples_follow_the_softmax():
    logits = np.array([1.0, 0.0, -1.0, 2.0], np.float32)
    drawn = Sampling(temperature=1.5)(mx.broadcast_to(mx.array(logits), (20_000, 4)), mx.random.key(1))
    shares = np.bincount(np.array(drawn), minlength=4) / 20_000
    np.testing.assert_allclose(shares, softmax(logits / 1.5), atol=0.015)  # 4 standard deviations


def test_sequences_are_filtered_independently():
    logits = mx.array([[5.0, 4.0, 0.0], [0.0, 1.0, 6.0]])
    finite = np.isfinite(np.array(Sampling(top_k=2).filtered(logits)))
    np.testing.assert_array_equal(finite, [[True, True, False], [False, True, True]])


WRONG = [
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("top_k", 0),
    ("top_k", -3),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", float("nan")),
    ("min_p", -0.1),
    ("min_p", 1.1),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_sampling_options_out_of_range(name, value):
    with pytest.raises(BadInput, match=f"^{name.replace('_', '-')} = .*: expected "):
        Sampling(**{name: value})


# The command line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    text = runs.write_text(folder / "text.txt")
    flags = [*runs.TINY, "--data", text, "--max-steps", 3, "--quiet", "--out", folder / "run"]
    assert runs.train(*flags).code == 0
    return folder / "run"


def test_completions_on_the_command_line(run):
    ended = runs.generate(run, "--prompt", "the cat", "--prompt", "a dog", "--seed", 5)
    assert (ended.code, ended.err) == (0, "")
    one, two = ended.out.rstrip("\n").split("\n\n")[0], ended.out
    assert one.startswith("the cat")
    assert "\n\na dog" in two
    assert runs.generate(run, "--prompt", "the cat", "--prompt", "a dog", "--seed", 5) == ended
    assert runs.generate(run, "--prompt", "the cat", "--prompt", "a dog", "--seed", 6) != ended


def test_the_model_folder_gives_the_same_as_the_run(run):
    flags = ["--prompt", "the cat", "--temperature", 0]
    assert runs.generate(run / "model", *flags) == runs.generate(run, *flags)


def test_streamed_text_is_the_same(run):
    for seed in range(3):
        flags = [run, "--prompt", "the cat", "--seed", seed]
        assert runs.generate(*flags, "--stream").out.rstrip("\n") == runs.generate(*flags).out.rstrip("\n")


def test_a_note_says_that_text_is_forgotten(run):
    for form in ([], ["--stream"]):
        flags = [run, "--prompt", "the cat", "--temperature", 0, *form]
        assert runs.generate(*flags).err == ""
        assert runs.generate(*flags, "--max-tokens", 5).err == ""
        ended = runs.generate(*flags, "--max-tokens", 60)
        assert ended.err.startswith("note: past the context of 24 tokens, older text is forgotten")
        assert ended.err.count("\n") == 1


def test_lines_from_the_keyboard(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"the cat\r\n\n   \n{'dog ' * 99}\na dog", newline=""))
    ended = runs.generate(run, "--max-tokens", 3, "--temperature", 0)
    assert ended.code == 2
    alone = [
        runs.generate(run, "--max-tokens", 3, "--temperature", 0, "--prompt", text).out for text in ("the cat", "a dog")
    ]
    assert ended.out == "\n".join(alone) + "\n"
    refused, total = ended.err.splitlines()
    assert refused.startswith("error: prompt 'dog dog")
    assert total == "error: 1 of the lines could not be continued: see above"


def test_no_stdin(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    ended = runs.generate(run)
    assert (ended.code, ended.err) == (2, "error: there is no standard input to read prompts from: give --prompt\n")


def test_a_line_that_is_not_utf_8(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the \xff cat\na dog\n"), encoding="utf-8"))
    ended = runs.generate(run, "--max-tokens", 3)
    assert (ended.code, ended.err) == (0, "")
    assert "\na dog" in ended.out


BAD = {
    "empty prompt": ["--prompt", ""],
    "prompt longer than the context": ["--prompt", "cat " * 99],
    "one bad prompt of two": ["--prompt", "a cat", "--prompt", "cat " * 99],
    "temperature": ["--prompt", "a", "--temperature", "-1"],
    "temperature is no number": ["--prompt", "a", "--temperature", "warm"],
    "top-p of nothing": ["--prompt", "a", "--top-p", "0"],
    "top-p of more than all": ["--prompt", "a", "--top-p", "1.5"],
    "top-k of nothing": ["--prompt", "a", "--top-k", "0"],
    "min-p": ["--prompt", "a", "--min-p", "2"],
    "max-tokens": ["--prompt", "a", "--max-tokens", "0"],
    "seed": ["--prompt", "a", "--seed", "-1"],
    "device": ["--prompt", "a", "--device", "tpu"],
    "unknown flag": ["--prompt", "a", "--length", "5"],
    "two runs": ["another", "--prompt", "a"],
    "not UTF-8": ["--prompt", "\udcff"],
}


@pytest.mark.parametrize("flags", BAD.values(), ids=BAD)
def test_bad_input(flags, run):
    runs.assert_bad(runs.generate(run, *flags))


def test_no_gpu(run):
    if mx.is_available(mx.gpu):
        pytest.skip("there is a GPU")
    runs.assert_bad(runs.generate(run, "--prompt", "a", "--device", "gpu"), "none here")


def test_no_run_at_all():
    runs.assert_bad(runs.generate("--prompt", "a"))


def test_no_such_run(tmp_path):
    runs.assert_bad(runs.generate(tmp_path / "none", "--prompt", "a"), "holds no model")
    runs.assert_bad(runs.generate(tmp_path, "--prompt", "a"), "holds no model")
