"""Tokenizers: nothing is lost, the same bytes every time, and vocabularies no larger than the text supports."""

import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlx_transformer.data import fables
from mlx_transformer.data.corpus import Corpus, load_corpus
from mlx_transformer.data.tokenizers import (
    BPETokenizer,
    HFTokenizer,
    Tokenizer,
    WordTokenizer,
    load_tokenizer,
    split_words,
    train_tokenizer,
)
from mlx_transformer.data.tokenizers import training as module
from mlx_transformer.data.tokenizers.word import train_words
from mlx_transformer.utils.errors import BadInput

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "shakespeare.txt"
STORY = 'One day, {0} the cat said, "Hello, {1}!" They didn\'t sleep.\nThen {1} ran {2} times to the big red house.'
NAMES = ["Tom", "Lily", "Anna", "Ben", "Zoë", "Max", "Mia", "Sam"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [STORY.format(a, b, i * j) for i, a in enumerate(NAMES) for j, b in enumerate(NAMES)]
    (folder / "text.txt").write_text("".join(f"{text}\n<|endoftext|>\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_TRANSFORMER_CACHE", str(folder / "cache"))
        yield load_corpus(str(folder / "text.txt"), say=lambda line: None)


@pytest.fixture(scope="module")
def bpe(corpus) -> Tokenizer:
    return train_tokenizer("bpe", corpus, 400)


CHARACTERS = "\u2581\u2585 \n\t\0\r\x1a\u0301\ufeff\ufffd\U0010ffff\u2047\u200b\u3000é你🙂"
WORDS = ("  ", "<s>", "</s>", "<unk>", "<|endoftext|>", "<0x41>", "cat", "Hello", "e\u0301", "👩‍🚀", "[UNK]")
AWKWARD = st.text() | st.lists(st.sampled_from([*CHARACTERS, *WORDS]), max_size=12).map("".join)


@given(text=AWKWARD)
@example(text="")
@example(text="\u2581\u2581 \u2581")
@example(text=" leading and trailing ")
def test_bpe_is_lossless_on_any_text(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.eos_id not in ids
    assert all(0 <= token < bpe.vocab_size for token in ids)


@given(texts=st.lists(AWKWARD, max_size=5))
def test_a_batch_is_encoded_like_its_texts(bpe, texts):
    assert bpe.encode_batch(texts) == [bpe.encode(text) for text in texts]


@given(before=AWKWARD, after=AWKWARD, gap=st.sampled_from("\n\t"))
def test_a_text_may_be_cut_behind_a_newline(bpe, before, after, gap):
    assert bpe.encode(before + gap + after) == bpe.encode(before + gap) + bpe.encode(after)


@pytest.mark.parametrize("kind", ["bpe", "word"])
@given(ids=st.lists(st.integers(0, 399), max_size=30))
def test_decoding_can_be_streamed(corpus, kind, ids):
    tokenizer = train_tokenizer(kind, corpus, 400, explicit=False)
    shown = ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode([token % tokenizer.vocab_size for token in ids[:end]])
        assert text.startswith(shown.rstrip("\ufffd"))
        shown = text


def test_bpe_tokens_are_what_they_should_be(bpe):
    assert bpe.vocab_size == 400
    assert bpe.token(bpe.eos_id) == "<|endoftext|>"
    assert [bpe.token(token) for token in bpe.encode(" house.\n\n\t")] == ["▁house", ".", "\n", "\n", "\t"]
    assert bpe.decode([bpe.eos_id]) == ""
    assert (bpe.kind, bpe.lossless, bpe.unk_id) == ("bpe", True, None)
    assert len(bpe.encode("\u2581")) == 3
    assert bpe.decode(bpe.encode("🙂")[:2]) == "\ufffd"


def test_half_a_surrogate_pair_is_refused(bpe):
    with pytest.raises(BadInput, match="surrogate"):
        bpe.encode("caf\udce9")


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_saved_tokenizers_come_back(corpus, kind, tmp_path):
    tokenizer = train_tokenizer(kind, corpus, 300, explicit=False)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.kind, loaded.sha256, loaded.eos_id) == (kind, tokenizer.sha256, tokenizer.eos_id)
    assert loaded.encode(STORY) == tokenizer.encode(STORY)
    assert all(path.name.startswith("tokenizer.") for path in tmp_path.iterdir())


def test_training_is_cached_and_deterministic(corpus, bpe, monkeypatch, tmp_path):
    def no_training(*_):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_bpe", no_training)
        assert train_tokenizer("bpe", corpus, 400).sha256 == bpe.sha256
    monkeypatch.setenv("MLX_TRANSFORMER_CACHE", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert train_tokenizer("bpe", corpus, 400).sha256 == bpe.sha256


def test_a_vocabulary_larger_than_the_text_supports(corpus):
    with pytest.raises(BadInput, match=r"--vocab-size 5000 .*the largest is (\d+)") as raised:
        train_tokenizer("bpe", corpus, 5000)
    largest = int(str(raised.value).partition("largest is ")[2].partition(":")[0])
    assert train_tokenizer("bpe", corpus, largest).vocab_size == largest
    with pytest.raises(BadInput, match=f"the largest is {largest}"):
        train_tokenizer("bpe", corpus, largest + 1)
    assert train_tokenizer("bpe", corpus, 5000, explicit=False).vocab_size == largest // 64 * 64
    assert train_tokenizer("bpe", corpus, None).vocab_size == largest // 64 * 64


def test_a_word_vocabulary_larger_than_the_text_supports(corpus):
    words = train_tokenizer("word", corpus, None)
    with pytest.raises(BadInput, match=f"the largest is {words.vocab_size}"):
        train_tokenizer("word", corpus, words.vocab_size + 1)


@pytest.mark.parametrize(("kind", "size"), [("bpe", 261), ("word", 4), ("bpe", -1)])
def test_a_vocabulary_that_is_too_small(corpus, kind, size):
    with pytest.raises(BadInput, match=f"--vocab-size {size} is too small"):
        train_tokenizer(kind, corpus, size)


def test_the_smallest_vocabulary_of_a_text_with_many_characters(tmp_path, cache):
    text = "".join(chr(0x4E00 + i * i % 5000) + ("\u2581\t\u2585 \0"[i % 4]) for i in range(9000))
    (tmp_path / "text.txt").write_text(text.replace("\0", "") + "\nlast line")
    corpus = load_corpus(str(tmp_path / "text.txt"), say=lambda line: None)
    tokenizer = train_tokenizer("bpe", corpus, 262, explicit=False)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_text_with_nothing_to_learn_from(tmp_path, cache):
    (tmp_path / "text.txt").write_text("\u2581\n\u2585")
    corpus = load_corpus(str(tmp_path / "text.txt"), say=lambda line: None)
    with pytest.raises(BadInput, match="no characters to learn"):
        train_tokenizer("bpe", corpus, 300)


def test_a_line_without_a_space_can_be_learned_from(tmp_path, cache):
    (tmp_path / "text.txt").write_text("abcab" * 40_000 + "\nlast line")
    corpus = load_corpus(str(tmp_path / "text.txt"), say=lambda line: None)
    tokenizer = train_tokenizer("bpe", corpus, 300, explicit=False)
    assert len(tokenizer.encode("abcab" * 40_000)) < 60_000


def test_a_text_without_any_space_keeps_the_spaces_of_others(tmp_path, cache):
    (tmp_path / "text.txt").write_text("abcabc\nxyzxyz\n" * 20)
    corpus = load_corpus(str(tmp_path / "text.txt"), say=lambda line: None)
    tokenizer = train_tokenizer("bpe", corpus, 300, explicit=False)
    assert tokenizer.decode(tokenizer.encode("a b  c \u2581 d")) == "a b  c \u2581 d"


def test_the_sample_is_spread_over_the_text(corpus, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE_BYTES", corpus.train_bytes // 4)
    sample = module._sample(corpus)
    assert 0.2 < sum(map(len, sample)) / corpus.train_bytes < 0.27
    assert "Tom the cat" in sample[0]
    assert "Sam the cat" in sample[-1]


def test_words_read_well(corpus):
    words = train_tokenizer("word", corpus, None)
    assert (words.kind, words.lossless) == ("word", False)
    text = STORY.format("Tom", "Lily", 6)
    assert words.decode(words.encode(text)) == text
    assert words.decode(words.encode("Tom saw a zebra")) == "Tom <unk> <unk> <unk>"
    assert words.encode("zebra") == [words.unk_id]
    assert words.decode([0, 2, words.eos_id]) == ""
    assert words.token(words.eos_id) == "<eos>"


MARKED = {
    "मैं हिन्दी लिखता हूँ।": ["मैं", "हिन्दी", "लिखता", "हूँ", "।"],
    "בְּרֵאשִׁית בָּרָא, בֵּית־סֵפֶר": ["בְּרֵאשִׁית", "בָּרָא", ",", "בֵּית", "־", "סֵפֶר"],
    "กินข้าวที่นี่ น้ำ": ["กินข้าวที่นี่", "น้ำ"],
    "de\u0301ja\u0300 l'e\u0301te\u0301!": ["de\u0301ja\u0300", "l'e\u0301te\u0301", "!"],
    "می\u200cخواهم بِسْمِ": ["می\u200cخواهم", "بِسْمِ"],
    "❤️ 👩\u200d🚀 👍🏽 🇩🇪 1️⃣": ["❤️", "👩\u200d🚀", "👍🏽", "🇩🇪", "1️⃣"],
    "வணக்கம் ဗမာစာ": ["வணக்கம்", "ဗမာစာ"],
}


@pytest.mark.parametrize("text", MARKED)
def test_marks_belong_to_their_word(text):
    tokenizer, _ = train_words([text], 99)
    assert split_words(text) == MARKED[text]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_two_flags_and_lone_marks_are():
    assert split_words("🇩🇪🇫🇷x \u0301a🇩") == ["🇩🇪", "🇫🇷", "x", "\u0301", "a", "🇩"]


FORMER_WORD = re.compile(r"\n|\w+(?:['’]\w+)*|[^\w\s]")


@given(text=AWKWARD | st.text(st.characters(max_codepoint=0x2FF)))
@example(text=STORY)
@example(text="“Don’t_stop,” naïve Zoë said: 3.5 Привет 你好\n")
def test_a_text_without_marks_is_split_as_ever(text):
    joining = "\u200c", "\u200d", *map(chr, range(0x1F1E6, 0x1F400))
    marked = any(unicodedata.category(char)[0] == "M" or char in joining for char in text)
    assert marked or split_words(text) == FORMER_WORD.findall(text)
    assert "".join(split_words(text)) == "".join(FORMER_WORD.findall(text))


def test_fables_are_split_as_ever():
    stories = (fables.generate(seed).text for seed in range(200))
    assert all(split_words(text) == FORMER_WORD.findall(text) for text in stories)


def test_a_words_rank_is_its_frequency():
    tokenizer, supported = train_words(["b b b a a c c d"], 6)
    assert [tokenizer.token(i) for i in range(4, 6)] == ["b", "a"]
    assert supported == 8


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.words.json", "tokenizer.json"])
def test_a_damaged_tokenizer_is_one_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(b"{ damaged")
    with pytest.raises(BadInput) as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(BadInput, match="has no tokenizer"):
        load_tokenizer(tmp_path)


def imported(folder: Path, byte_level: bool, end: str = "<|endoftext|>") -> Path:
    """A tokenizer.json as other people make them."""
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.BPE(unk_token=None if byte_level else "[UNK]"))
    levels = library.pre_tokenizers
    made.pre_tokenizer = levels.ByteLevel(add_prefix_space=False) if byte_level else levels.Whitespace()
    if byte_level:
        made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[end] + ([] if byte_level else ["[UNK]"]),
        initial_alphabet=levels.ByteLevel.alphabet() if byte_level else [],
        show_progress=False,
    )
    made.train_from_iterator([STORY.format(a, b, 3) for a in NAMES for b in NAMES], trainer)
    made.enable_truncation(5)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@given(text=AWKWARD)
def test_an_imported_byte_level_tokenizer_is_lossless(tmp_path_factory, text):
    tokenizer = HFTokenizer(imported(tmp_path_factory.mktemp("hf"), byte_level=True).read_bytes())
    assert tokenizer.lossless
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_id not in tokenizer.encode(text)


def test_an_imported_tokenizer(tmp_path, corpus):
    path = imported(tmp_path, byte_level=False)
    tokenizer = train_tokenizer(str(path), corpus, 8192, explicit=False)
    assert (tokenizer.kind, tokenizer.lossless, tokenizer.token(tokenizer.eos_id)) == ("hf", False, "<|endoftext|>")
    assert tokenizer.encode("\u4e00") == [tokenizer.unk_id]
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode(STORY) == tokenizer.encode(STORY)
    with pytest.raises(BadInput, match="--vocab-size 77 does not fit"):
        train_tokenizer(str(tmp_path), corpus, 77)


def test_an_imported_tokenizer_needs_an_end(tmp_path, corpus):
    with pytest.raises(BadInput, match="no token that ends a text"):
        train_tokenizer(str(imported(tmp_path, byte_level=True, end="[PAD]")), corpus)
    with pytest.raises(BadInput, match="--tokenizer nothing is neither bpe nor word"):
        train_tokenizer("nothing", corpus)


def test_without_the_library_the_command_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(BadInput, match="pip install tokenizers"):
        HFTokenizer(json.dumps({}).encode())


@pytest.mark.skipif(not SHARED.exists(), reason="the shared texts are not here")
def test_real_text_takes_few_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_TRANSFORMER_CACHE", str(tmp_path))
    tokenizer = train_tokenizer("bpe", load_corpus(str(SHARED), say=lambda line: None), 1024)
    text = SHARED.read_text()[:20_000]
    assert isinstance(tokenizer, BPETokenizer)
    assert not isinstance(tokenizer, WordTokenizer)
    assert len(text) / len(tokenizer.encode(text)) > 2.3
