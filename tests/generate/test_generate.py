"""Decoding and sampling: what is drawn, from what, and how it becomes text."""

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
from mlx_transformer.generate import decoding
from mlx_transformer.generate.decoding import decode, encode_prompt, stream, tell
from mlx_transformer.generate.sampling import Sampling
from mlx_transformer.utils.errors import BadInput
from phases import phase1
from tests.faults import runs
from tests.ladder import tiny

GREEDY = Sampling(temperature=0.0)


class Bytes:
    """A tokenizer whose pieces are the bytes of UTF-8 and, as 0, the boundary."""

    eos_id, vocab_size, bos_id, prompt_prefix = 0, 257, 0, (0,)

    def encode(self, text):
        return [byte + 1 for byte in text.encode()]

    def decode(self, pieces):
        return bytes(piece - 1 for piece in pieces if piece).decode(errors="replace")


TOKENIZER = Bytes()


@pytest.fixture(scope="module")
def model():
    return tiny(phase1.Model, vocab_size=257, seq_len=40)


@pytest.fixture
def scripted(monkeypatch):
    """A decoder that says what it is told, one text for each prompt, then boundaries."""

    def script(*texts):
        pieces = [TOKENIZER.encode(text) for text in texts]

        def say(model, prompts, count, **_):
            for i in range(count):
                yield [own[i] if i < len(own) else TOKENIZER.eos_id for own in pieces]

        monkeypatch.setattr(decoding, "decode", say)
        return SimpleNamespace(config=SimpleNamespace(seq_len=40))

    return script


# Decoding


def greedy_by_hand(model, prompt, count):
    pieces = list(prompt)
    for _ in range(count):
        pieces.append(mx.argmax(model(mx.array([pieces]))[0, -1]).item())
    return pieces[len(prompt) :]


def test_greedy_is_the_argmax_of_the_uncached_model(model):
    prompt = [0, 5, 100, 7]
    drawn = [piece for (piece,) in decode(model, [prompt], 36, sampling=GREEDY)]
    assert drawn == greedy_by_hand(model, prompt, 36)
    assert len(set(drawn)) > 5, "a constant would prove little"


def test_prompts_of_unequal_length_do_not_touch_each_other(model):
    prompts = [[0, 9], [0, 5, 100, 7, 33, 250, 1, 2], [0], [0, 200, 201]]
    together = list(zip(*decode(model, prompts, 20, sampling=GREEDY), strict=True))
    for prompt, drawn in zip(prompts, together, strict=True):
        assert list(drawn) == greedy_by_hand(model, prompt, 20)


def test_a_cache_grows_as_it_fills():
    prompts = [[0, *range(1, 60)], [0, 9, 8]]
    decoder = decoding.Decoder(tiny(phase1.Model, vocab_size=257, seq_len=150))
    together = list(zip(*decoder(prompts, 72, sampling=GREEDY), strict=True))
    for prompt, drawn in zip(prompts, together, strict=True):
        assert list(drawn) == greedy_by_hand(decoder.model, prompt, 72)


def test_a_step_takes_the_room_that_it_uses(model):
    decoder, cache = decoding.Decoder(model), model.make_cache(1)
    model.last_hidden(mx.array([[0] * 62]), cache)
    slots = []
    for _ in range(5):
        mx.eval(decoder.step(mx.array([3]), cache))
        slots.append(cache.layers[0].arrays["k"].shape[2])
    assert slots == [64, 64, 80, 80, 80]


def test_nothing_is_drawn_where_nothing_is_asked(model):
    assert list(decode(model, [], 5)) == []
    assert list(decode(model, [[0]], 0)) == []
    assert tell(model, TOKENIZER, []) == []


def test_a_model_that_trains_is_decoded_without_its_dropout():
    net = tiny(phase1.Model, vocab_size=257, seq_len=40, dropout=0.5)
    net.train()
    prompts = [[1, 2, 3], [4]]
    first, second = (list(decode(net, prompts, 8)) for _ in range(2))
    assert net.training, "the model itself is left as it is"
    net.eval()
    assert first == second == list(decode(net, prompts, 8))


def test_every_thread_may_decode(model):
    prompts = [[i + 1] for i in range(40)]  # as many as two streams
    expected = list(decode(model, prompts, 4))
    for _ in range(2):
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(lambda: list(decode(model, prompts, 4))).result() == expected
    assert list(decode(model, prompts, 4)) == expected


def test_the_seed_decides_the_text(model):
    texts = [tell(model, TOKENIZER, ["ab", "c"], seed=seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


# From pieces to text


def test_a_story_ends_at_the_boundary(scripted):
    one, two = tell(scripted("x", "then more"), TOKENIZER, ["a ", "b "])
    assert (one.text, one.continuation, one.ended) == ("a x", "x", True)
    assert (two.text, two.ended) == ("b then more", True)
    assert one.pieces == TOKENIZER.encode("x")


def test_a_story_ends_with_the_context_or_at_its_limit(scripted):
    model = scripted("x" * 99, "y" * 99)
    short, long = tell(model, TOKENIZER, ["a" * 30, "a"])
    assert (len(short.pieces), short.ended) == (40 - 31, False)
    assert (len(long.pieces), long.ended) == (40 - 2, False)
    short, long = tell(model, TOKENIZER, ["a" * 30, "a"], max_tokens=20)
    assert (len(short.pieces), len(long.pieces)) == (9, 20)


def test_a_context_filled_to_the_last_piece(model):
    (story,) = tell(model, TOKENIZER, ["a" * 38], sampling=GREEDY)
    assert story.pieces == greedy_by_hand(model, [0, *TOKENIZER.encode("a" * 38)], 1)


@settings(max_examples=30)
@given(st.text(max_size=12))
def test_a_stream_joined_is_the_story_and_shows_only_whole_characters(text):
    assume(len(text.encode()) < 30)
    with pytest.MonkeyPatch.context() as patch:
        pieces = TOKENIZER.encode(text)
        patch.setattr(decoding, "decode", lambda *_, **__: ([piece] for piece in [*pieces, 0]))
        parts = list(stream(SimpleNamespace(config=SimpleNamespace(seq_len=40)), TOKENIZER, "ab", None, GREEDY, 0))
    assert "".join(parts) == text
    assert all("\ufffd" not in part or "\ufffd" in text for part in parts)


def test_characters_of_several_pieces_come_at_once(scripted):
    parts = list(stream(scripted("né🙂!"), TOKENIZER, "a", None, GREEDY, 0))
    assert [part for part in parts if part] == ["n", "é", "🙂", "!"]


def test_a_character_that_is_never_finished_is_still_told(scripted, monkeypatch):
    model = scripted("")
    pieces = [*TOKENIZER.encode("x🙂")[:-1], 0]
    monkeypatch.setattr(decoding, "decode", lambda *_, **__: ([piece] for piece in pieces))
    assert "".join(stream(model, TOKENIZER, "a", None, GREEDY, 0)) == "x\ufffd"
    assert tell(model, TOKENIZER, ["a"])[0].continuation == "x\ufffd"


def test_a_stream_is_the_told_story(model):
    for seed in range(3):
        told = tell(model, TOKENIZER, ["hello"], seed=seed)[0].continuation
        assert "".join(stream(model, TOKENIZER, "hello", None, Sampling(), seed)) == told


def test_words_are_set_apart_from_the_prompt(monkeypatch):
    tokenizer = WordTokenizer(["once", "upon", "a", "time", "."])
    model = SimpleNamespace(config=SimpleNamespace(seq_len=40))
    pieces = [[piece] for piece in [*tokenizer.encode("a time."), tokenizer.eos_id]]
    monkeypatch.setattr(decoding, "decode", lambda *_, **__: iter(pieces))
    assert tell(model, tokenizer, ["once upon"])[0].text == "once upon a time."
    assert "".join(stream(model, tokenizer, "once upon", None, GREEDY, 0)) == " a time."


@pytest.mark.parametrize("prompt", ["", "  \n\t "])
def test_an_empty_prompt_is_bad_input(prompt):
    with pytest.raises(BadInput, match="is empty"):
        encode_prompt(TOKENIZER, prompt, 40)


def test_a_prompt_must_leave_room_for_a_piece():
    assert len(encode_prompt(TOKENIZER, "a" * 38, 40)) == 39
    with pytest.raises(BadInput, match=r"prompt 'a{39}' has 40 pieces: expected fewer than the context of 40"):
        encode_prompt(TOKENIZER, "a" * 39, 40)


# Sampling


def softmax(logits):
    p = np.exp(logits - logits.max())
    return p / p.sum()


def kept(logits, **numbers):
    """The pieces that a filter keeps."""
    return set(np.flatnonzero(np.isfinite(np.array(Sampling(**numbers).filtered(mx.array(logits[None])))[0])).tolist())


distinct = st.lists(st.integers(-60, 60), min_size=2, max_size=30, unique=True).map(
    lambda values: np.array(values, np.float32) / 10
)


@given(distinct, st.integers(1, 35))
def test_top_k_keeps_the_k_likeliest(logits, k):
    assert kept(logits, top_k=k, temperature=0.7) == set(np.argsort(-logits)[:k].tolist())


@given(distinct, st.floats(0.01, 1), st.floats(0.3, 3))
def test_top_p_keeps_the_smallest_likeliest_set_of_that_mass(logits, top_p, temperature):
    order = np.argsort(-logits)
    mass = np.cumsum(softmax(logits.astype(np.float64) / temperature)[order])
    assume(np.abs(mass - top_p).min() > 1e-5)
    size = int((mass < top_p).sum()) + 1
    assert kept(logits, top_p=top_p, temperature=temperature) == set(order[:size].tolist())


@given(distinct, st.floats(0, 1), st.floats(0.3, 3))
def test_min_p_keeps_what_has_that_share_of_the_likeliest(logits, min_p, temperature):
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
    expected = {piece for piece, own in zip(order[:size].tolist(), p, strict=False) if own >= min_p * p[0]}
    assert kept(logits, temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p) == expected


def test_equal_pieces_are_not_told_apart_by_top_k():
    assert kept(np.zeros(4, np.float32), top_k=1) == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-7, 1e-5, 1e-3])
def test_a_low_temperature_takes_the_likeliest(temperature):
    logits = mx.array([[3.0, 500.0, -500.0, 499.0], [1.0, 0.5, 0.0, -3e4]])
    for seed in range(5):
        assert Sampling(temperature=temperature)(logits, mx.random.key(seed)).tolist() == [1, 0]


def test_a_high_temperature_forgets_the_logits():
    drawn = Sampling(temperature=1e38)(mx.array([[3.0, 50.0, -50.0, 0.0]] * 400), mx.random.key(0))
    assert set(drawn.tolist()) == {0, 1, 2, 3}


def test_draws_follow_the_softmax():
    logits = np.array([1.0, 0.0, -1.0, 2.0], np.float32)
    drawn = Sampling(temperature=1.5)(mx.broadcast_to(mx.array(logits), (20_000, 4)), mx.random.key(1))
    shares = np.bincount(np.array(drawn), minlength=4) / 20_000
    np.testing.assert_allclose(shares, softmax(logits / 1.5), atol=0.015)  # 4 standard deviations


def test_rows_are_filtered_each_on_its_own():
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
def test_impossible_numbers_are_bad_input(name, value):
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


def test_stories_on_the_command_line(run):
    said = runs.tell(run, "--prompt", "the cat", "--prompt", "a dog", "--seed", 5)
    assert (said.code, said.err) == (0, "")
    one, two = said.out.rstrip("\n").split("\n\n")[0], said.out
    assert one.startswith("the cat")
    assert "\n\na dog" in two
    assert runs.tell(run, "--prompt", "the cat", "--prompt", "a dog", "--seed", 5) == said
    assert runs.tell(run, "--prompt", "the cat", "--prompt", "a dog", "--seed", 6) != said


def test_the_model_folder_is_as_good_as_the_run(run):
    flags = ["--prompt", "the cat", "--temperature", 0]
    assert runs.tell(run / "model", *flags) == runs.tell(run, *flags)


def test_streamed_text_is_the_same(run):
    for seed in range(3):
        flags = [run, "--prompt", "the cat", "--seed", seed]
        assert runs.tell(*flags, "--stream").out.rstrip("\n") == runs.tell(*flags).out.rstrip("\n")


def test_lines_from_the_keyboard(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"the cat\r\n\n   \n{'dog ' * 99}\na dog", newline=""))
    said = runs.tell(run, "--max-tokens", 3, "--temperature", 0)
    assert said.code == 2
    alone = [
        runs.tell(run, "--max-tokens", 3, "--temperature", 0, "--prompt", text).out for text in ("the cat", "a dog")
    ]
    assert said.out == "\n".join(alone) + "\n"
    refused, sum_of_it = said.err.splitlines()
    assert refused.startswith("error: prompt 'dog dog")
    assert sum_of_it == "error: 1 of the lines could not be continued: see above"


def test_no_stdin(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    said = runs.tell(run)
    assert (said.code, said.err) == (2, "error: there is no standard input to read prompts from: give --prompt\n")


def test_a_line_that_is_no_text(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the \xff cat\na dog\n"), encoding="utf-8"))
    said = runs.tell(run, "--max-tokens", 3)
    assert (said.code, said.err) == (0, "")
    assert "\na dog" in said.out


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
    runs.assert_bad(runs.tell(run, *flags))


def test_no_gpu(run):
    if mx.is_available(mx.gpu):
        pytest.skip("there is a GPU")
    runs.assert_bad(runs.tell(run, "--prompt", "a", "--device", "gpu"), "none here")


def test_no_run_at_all():
    runs.assert_bad(runs.tell("--prompt", "a"))


def test_no_such_run(tmp_path):
    runs.assert_bad(runs.tell(tmp_path / "none", "--prompt", "a"), "holds no model")
    runs.assert_bad(runs.tell(tmp_path, "--prompt", "a"), "holds no model")
