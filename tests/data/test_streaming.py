"""Texts that are streamed: positions, ranks, memory, faults, and a data set from a hub on the loopback interface."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlx_transformer import data
from mlx_transformer.data import corpus, hub, shards, streaming
from mlx_transformer.data.tokens import StreamedTokens
from mlx_transformer.train.checkpoint import load_newest
from mlx_transformer.utils.errors import BadInput
from tests.data.test_hub import NAME, Answers, Hub
from tests.faults.runs import ON_CPU, assert_bad, assert_same_run, train

FILES, DOCUMENTS, SEQ_LEN = 50, 20, 8  # documents of a file, of 9 words that no other document has in this order


def document(file: int, number: int) -> str:
    """A document whose first word is its own."""
    return f"w{file * DOCUMENTS + number} the cat sat on a mat by now"


def write_files(folder: Path, count: int = FILES) -> Path:
    folder.mkdir(parents=True)
    for file in range(count):
        texts = (document(file, number) for number in range(DOCUMENTS))
        (folder / f"part-{file:02}.txt").write_text("\n<|endoftext|>\n".join(texts))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("texts") / "files")


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(streaming, "BUFFER_TOKENS", 400)
    monkeypatch.setattr(streaming, "_CHARACTERS", 200)
    monkeypatch.setattr(corpus, "SAMPLE_BYTES", 100_000)


@pytest.fixture
def tokens(folder) -> StreamedTokens:
    return data.load(folder, tokenizer="word", stream=True)


def own_words(batches: list[np.ndarray], tokens: StreamedTokens) -> list[str]:
    """The words that name documents, in the targets of batches."""
    words = [tokens.tokenizer.token(int(one)) for batch in batches for one in batch[:, 1:].ravel()]
    return [word for word in words if word[0] == "w"]


def drawn(stream, count: int) -> list[np.ndarray]:
    return [next(stream) for _ in range(count)]


def first_epoch(stream) -> list[np.ndarray]:
    found = []
    while all(lane["epoch"] == 0 for lane in stream.state()["lanes"]):
        found.append(next(stream))
    return found[:-1]


def test_a_position_is_restored_exactly(tokens):
    stream = tokens.batches(4, SEQ_LEN, seed=3)
    first = drawn(stream, 150)  # of batches of 32 tokens: two epochs of some 10,000 tokens need more
    state = json.loads(json.dumps(stream.state()))
    expected = drawn(stream, 400)
    again = tokens.batches(4, SEQ_LEN, seed=3)
    again.restore(state)
    np.testing.assert_array_equal(drawn(again, 400), expected)
    assert again.state() == stream.state()
    assert again.state()["lanes"][0]["epoch"] == 1
    stream.restore(state)  # what Prefetch does at its end
    np.testing.assert_array_equal(next(stream), expected[0])
    assert not np.array_equal(first[0], next(tokens.batches(4, SEQ_LEN, seed=4)))
    with pytest.raises(BadInput, match="does not belong to this text, --seed 4"):
        tokens.batches(4, SEQ_LEN, seed=4).restore(state)


def test_an_epoch_has_each_document_once_in_a_shuffled_order(tokens):
    words = own_words(first_epoch(tokens.batches(1, SEQ_LEN, seed=0)), tokens)
    numbers = [int(word[1:]) for word in words]
    assert len(numbers) == len(set(numbers))
    assert len(numbers) > 0.95 * (FILES - 1) * DOCUMENTS  # the end of a buffer is shorter than a sequence
    assert max(numbers) < (FILES - 1) * DOCUMENTS  # the last file is held out
    assert tokens.valid_documents == DOCUMENTS
    assert tokens.epoch_tokens == pytest.approx((FILES - 1) * DOCUMENTS * 10, rel=0.1)
    files = [number // DOCUMENTS for number in numbers]
    assert files != sorted(files)
    assert numbers[:20] != sorted(numbers[:20])


def test_ranks_read_files_of_their_own_and_one_process_can_go_on_for_them(tokens):
    ranks = [tokens.of_rank(rank, 2).batches(4, SEQ_LEN, seed=0) for rank in range(2)]
    words = [set(own_words(first_epoch(stream), tokens)) for stream in ranks]
    assert not words[0] & words[1]
    assert all(len(own) > 0.4 * (FILES - 1) * DOCUMENTS for own in words)
    for stream in ranks:
        stream.restore(tokens.of_rank(stream.rank, 2).batches(4, SEQ_LEN, seed=0).state())
    before = [drawn(stream, 30) for stream in ranks]
    assert before[0][0].shape == (2, SEQ_LEN + 1)
    lanes = [lane for stream in ranks for lane in stream.state()["lanes"]]
    saved = {key: value for key, value in ranks[0].state().items() if key != "rank"} | {"lanes": lanes}
    alone = tokens.batches(4, SEQ_LEN, seed=0)
    alone.restore(saved)
    for _ in range(30):
        np.testing.assert_array_equal(next(alone), np.concatenate([next(stream) for stream in ranks]))
    three = [tokens.of_rank(rank, 3).batches(3, SEQ_LEN, seed=0) for rank in range(3)]
    for stream in three:
        stream.restore(saved)
    rest = [set(own_words(first_epoch(stream), tokens)) for stream in three]
    assert all(not one & other for one, other in itertools.combinations(rest, 2))
    seen = set(own_words([batch for own in before for batch in own], tokens))
    assert len(seen.union(*rest)) > 0.85 * (FILES - 1) * DOCUMENTS  # ranks that end an epoch earlier leave some


def test_few_tokens_are_in_memory(tokens):
    stream, most = tokens.batches(2, SEQ_LEN, seed=0), 0
    for _ in range(400):
        next(stream)
        most = max(most, stream.held_tokens())
    longest = 2 * (streaming.BUFFER_TOKENS + 100)  # two buffers, each with the tokens of one call of the tokenizer more
    assert streaming.BUFFER_TOKENS < most <= longest < tokens.epoch_tokens / 8


def test_small_texts_are_prepared_whole_and_large_ones_are_streamed(folder, monkeypatch):
    said = []
    assert corpus.load_corpus(str(folder), say=said.append).shards is None
    monkeypatch.setattr(shards, "STREAM_BYTES", 1000)
    found = corpus.load_corpus(str(folder), say=said.append)
    assert len(found.shards) == FILES - 1
    assert "is streamed, which is more than" in said[1]
    assert "part-49.txt is held out, and its documents are left out of the others" in said[1]


def test_documents_of_the_validation_text_are_left_out(folder, tmp_path):
    (tmp_path / "valid.txt").write_text("\n<|endoftext|>\n".join(document(file, 0) for file in range(FILES)))
    tokens = data.load(folder, tokenizer="word", valid=tmp_path / "valid.txt", stream=True)
    words = own_words(first_epoch(tokens.batches(1, SEQ_LEN, seed=0)), tokens)
    assert len(words) > 0.9 * FILES * (DOCUMENTS - 1)
    assert not {f"w{file * DOCUMENTS}" for file in range(FILES)} & set(words)


def test_bad_input_is_one_sentence(folder, tmp_path):
    flags = [*ON_CPU, "--stream", "--max-steps", 2, "--tokenizer", "word", "--out", tmp_path / "run"]
    texts = write_files(tmp_path / "texts", 3)
    assert_bad(train(*flags, "--data", texts, "--stories", 9), "--stories 9 cannot be counted")
    assert_bad(train(*flags, "--data", "fables"), "--stream goes with a folder of texts")
    assert_bad(train(*flags, "--data", tmp_path / "none"), "none does not exist; --stream takes a folder")
    assert_bad(train(*flags, "--data", texts / "part-00.txt"), "is one file, and the last one is held out")
    (texts / "part-01.txt").write_text(" \n")
    (texts / "part-00.txt").write_text("")
    assert_bad(train(*flags, "--data", texts), "part-00.txt of ", "is empty: remove it")
    (texts / "part-00.txt").unlink()
    assert_bad(train(*flags, "--data", texts), "part-01.txt of the streamed text is empty, or holds white space only")
    tokens = data.load(folder, tokenizer="word", stream=True)
    with pytest.raises(BadInput, match="has 49 files to train on, and 50 ranks read files of their own: start 49"):
        tokens.of_rank(0, 50).batches(50, SEQ_LEN, 0)


def test_a_run_resumes_after_a_file_has_vanished(tmp_path, no_pictures):
    texts = write_files(tmp_path / "texts", 12)
    flags = [*ON_CPU, "--seq-len", SEQ_LEN, "--stream", "--data", texts, "--tokenizer", "word", "--save-every", 10]
    flags += ["--vocab-size", 200, "--batch-size", 8]
    ends = ["--max-steps", 40, "--max-seconds", 1000, "--eval-every", 200]
    assert train(*flags, *ends, "--out", tmp_path / "whole").code == 0
    kept = tmp_path / "kept"
    kept.mkdir()
    ended = train(*flags, *ends, "--max-steps", 20, "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert "11 files, about" in ended.out
    for file in sorted(texts.iterdir())[:11]:
        shutil.move(file, kept)  # one that is open can be read on
        (texts / file.name).write_text("")
    ended = train("--resume", tmp_path / "run", *ends)
    assert ended.code == 2  # noticed before training
    assert "is empty" in ended.err
    for file in kept.iterdir():
        shutil.copy(file, texts)
    read, opened = shards.Shards.open, []

    def vanishes(self, number):
        opened.append(number)
        if len(opened) > 3:
            (self.place / self.files[number]).unlink(missing_ok=True)
        return read(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.Shards, "open", vanishes)
        ended = train("--resume", tmp_path / "run", *ends)
    assert ended.code == 1, ended
    assert ended.err.startswith("error: ")
    assert "of the streamed text is gone" in ended.err
    assert ended.err.count("\n") == 1
    _, state, damaged = load_newest(tmp_path / "run" / "checkpoints")
    assert state["step"] in (20, 30)
    assert not damaged
    for file in kept.iterdir():
        shutil.copy(file, texts)
    ended = train("--resume", tmp_path / "run", *ends)
    assert ended.code == 0, ended.err
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["corpus"]["streamed"]["files"] == 11


def test_a_data_set_of_the_hub_is_fetched_file_by_file(serve, cache, tmp_path, monkeypatch):
    lines = [[json.dumps({"text": document(file, n)}) for n in range(DOCUMENTS)] for file in range(8)]
    files = {f"data/train-{i}.jsonl": "\n".join(own).encode() for i, own in enumerate(lines)}
    there = Hub({"README.md": b"# Texts", **files})
    serve(Answers, there)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shards, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(corpus, "SAMPLE_BYTES", 1500)
    said = []
    assert corpus.load_corpus(NAME, say=said.append, stream=True).text_column == "text"
    assert "data/train-7.jsonl is held out" in said[0]
    tokens = data.load(NAME, tokenizer="word", stream=True)
    fetched = {path for path in there.requests if "resolve" in path}
    assert 2 <= len(fetched) < 5  # the one that is held out, and those of the sample
    stream, most = tokens.batches(2, SEQ_LEN, seed=0), 0
    while stream.state()["lanes"][0]["epoch"] < 2:
        next(stream)
        most = max(most, len(list((cache / "hub" / "streamed").iterdir())))
    assert most <= 2
    assert not list((tmp_path / "hub-cache").rglob("*.jsonl"))
    there.files.clear()
    with pytest.raises(Exception, match=r"could not be fetched .*; the last checkpoint is whole"):
        drawn(stream, 1000)
    monkeypatch.setattr(hub, "ask", lambda request: (_ for _ in ()).throw(hub.Unanswered("no answer")))
    with pytest.raises(BadInput, match="is out of reach as a data set of the hub: no answer"):
        data.load(NAME, stream=True)
