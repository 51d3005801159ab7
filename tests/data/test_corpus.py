"""Preparing corpora: splitting, cleaning, duplicates, the cache, and the errors for bad files."""

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlx_transformer.data import corpus, documents, store, tinystories
from mlx_transformer.data.corpus import Corpus, load_corpus
from mlx_transformer.data.documents import read_documents, read_parts
from mlx_transformer.utils.errors import BadInput

pytestmark = pytest.mark.usefixtures("cache")
END = "<|endoftext|>"


def text_file(folder: Path, content: str | bytes, name: str = "text.txt") -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def stories(*texts: str) -> str:
    return "".join(f"{text}\n{END}\n" for text in texts)


def load(*args, **kwargs) -> Corpus:
    return load_corpus(*args, say=lambda line: None, **kwargs)


def splits(prepared: Corpus) -> tuple[list[str], list[str]]:
    return list(read_documents(prepared.train)), list(read_documents(prepared.valid))


def test_holds_out_the_last_twentieth_of_the_documents(tmp_path):
    texts = [f"Story number {i}.\nIt ends." for i in range(60)]
    prepared = load(text_file(tmp_path, stories(*texts)))
    assert splits(prepared) == (texts[:57], texts[57:])
    assert (prepared.train_documents, prepared.valid_documents, prepared.duplicates_removed) == (57, 3, 0)
    assert prepared.train_bytes == sum(len(t) for t in texts[:57])
    assert prepared.valid_bytes == sum(len(t) for t in texts[57:])
    assert (prepared.name, prepared.floor_bits) == ("text.txt", None)


def test_a_validation_file_is_taken_whole_and_its_documents_leave_train(tmp_path):
    train = text_file(tmp_path, stories("one", "two", " three \n", "two", "four"))
    valid = text_file(tmp_path, stories("two", "three", "three"), "valid.txt")
    prepared = load(train, valid)
    assert splits(prepared) == (["one", "four"], ["two", "three", "three"])
    assert prepared.duplicates_removed == 3
    assert "3 duplicates" in prepared.note


def test_duplicates_of_held_out_documents_leave_train(tmp_path):
    prepared = load(text_file(tmp_path, stories("same", "other", "same")))
    assert splits(prepared) == (["other"], ["same"])
    assert prepared.duplicates_removed == 1
    assert prepared.note.endswith("1 training and 1 validation document, 1 duplicate of validation documents removed")


def test_a_text_without_separators_is_split_by_lines(tmp_path):
    lines = [f"line {i}" if i % 5 else "" for i in range(1, 50)]  # 40 of 49 have something on them
    prepared = load(text_file(tmp_path, "\n".join(lines) + "\n\n"))
    train, valid = splits(prepared)
    assert "\n".join(train + valid).split("\n") == lines
    assert valid == ["line 48\nline 49"]
    assert prepared.train_documents == 1


def test_the_first_stories_are_kept(tmp_path):
    texts = [f"story {i}" for i in range(10)]
    prepared = load(text_file(tmp_path, stories(*texts)), stories=3)
    assert splits(prepared) == (texts[:3], texts[9:])


@pytest.mark.parametrize(
    ("content", "train", "valid"),
    [
        ("a\r\nb\r\n<|endoftext|>\r\nc\r\n", ["a\nb"], ["c"]),
        ("\ufeffa\n<|endoftext|>\nc", ["a"], ["c"]),
        ("a\n<|endoftext|> \t\n\n\nc\n", ["a"], ["c"]),
        ("<|endoftext|>\n<|endoftext|>\na\n<|endoftext|>\n \n<|endoftext|>\nc\n<|endoftext|>", ["a"], ["c"]),
        ("  a\n\n b \n\n<|endoftext|>\nc", ["a\n\n b"], ["c"]),
        ("a <|endoftext|>\r\nb<|endoftext|>b\n\n<|endoftext|>\r\nc", ["a", "b", "b"], ["c"]),
        ("a<|endoftext|>b\nb<|endoftext|>c", ["a", "b\nb"], ["c"]),
        ("a<|endoftext|><|endoftext|> \r\n<|endoftext|>c<|endoftext|", ["a"], ["c<|endoftext|"]),
    ],
)
def test_awkward_files(tmp_path, content, train, valid):
    assert splits(load(text_file(tmp_path, content))) == (train, valid)


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\ufeff"), max_size=30), max_size=8)
)
@example([END])
@example([f"a\n {END}\t\nb"])
def test_documents_come_back_stripped_whatever_they_hold(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_bytes(stories(*texts).encode())
    parts = [part for text in texts for part in text.split(END)]
    assert list(read_documents(path)) == [part.strip() for part in parts if part.strip()]


def test_long_documents_and_lines_come_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "SEGMENT", 16)
    texts = ["x" * 100, "word " * 30 + "end", "\n".join(["line"] * 40), "s" * 3 + END[:-1], "short"]
    path = Path(text_file(tmp_path, stories(*texts)))
    assert list(read_documents(path)) == texts
    assert max(len(text) for text, _ in read_parts(path)) <= 2 * 16
    assert [ends for _, ends in read_parts(path)].count(True) == len(texts)


@pytest.mark.parametrize("segment", range(1, 31))
def test_separators_across_parts_are_found(tmp_path, monkeypatch, segment):
    monkeypatch.setattr(documents, "SEGMENT", segment)
    text = f"one{END}<|two{END[:-1]}{END}{END}three <|end {END}\r\n{END}four"
    assert list(read_documents(Path(text_file(tmp_path, text)))) == ["one", f"<|two{END[:-1]}", "three <|end", "four"]


def test_the_cache_of_texts_with_separators_on_their_lines_stays_valid(tmp_path):
    """The key of a text that a former version prepared, and another one where that version found fewer documents."""
    content = stories("one", " two\n", "three").replace("\n", "\r\n")
    folder = load(text_file(tmp_path, content)).train.parent
    assert folder.name == f"text-{corpus.cache_key(hashlib.sha256(content.encode()).hexdigest(), '', None)}"
    content = stories("one", f"two{END}", "three")
    folder = load(text_file(tmp_path, content)).train.parent
    assert folder.name != f"text-{corpus.cache_key(hashlib.sha256(content.encode()).hexdigest(), '', None)}"


def test_prepared_corpora_are_cached_by_content(tmp_path, cache):
    path = text_file(tmp_path, stories("one", "two"))
    first = load(path)
    first.train.chmod(0o644)
    before = first.train.stat().st_mtime_ns
    copy = text_file(tmp_path, stories("one", "two"), "copy.txt")
    assert load(copy).train == first.train
    assert first.train.stat().st_mtime_ns == before
    text_file(tmp_path, stories("one", "three"))
    assert load(path).sha256 != first.sha256
    assert not list((cache / "corpora").glob(".*"))


def test_a_damaged_cache_is_made_again(tmp_path):
    path = text_file(tmp_path, stories("one", "two"))
    prepared = load(path)
    prepared.train.write_bytes(b"on")
    assert splits(load(path)) == (["one"], ["two"])


def test_line_ends_do_not_change_what_a_corpus_is(tmp_path):
    unix, dos = (
        text_file(tmp_path, stories("a\nb", "c").replace("\n", end), f"{len(end)}.txt") for end in ("\n", "\r\n")
    )
    assert load(unix).sha256 == load(dos).sha256


def test_nothing_is_left_behind_by_a_build_that_fails(cache):
    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.cached_folder("kind", "name", build)
    assert list((cache / "kind").iterdir()) == []


def test_two_builders_of_one_folder_both_get_a_whole_one(cache):
    def quick(folder: Path) -> None:
        (folder / "file").write_text("whole")

    def build(folder: Path) -> None:
        store.cached_folder("kind", "name", quick)  # another process, while this one is at work
        (folder / "file").write_text("whole")

    assert (store.cached_folder("kind", "name", build) / "file").read_text() == "whole"
    assert [path.name for path in (cache / "kind").iterdir()] == ["name"]


def test_abandoned_folders_are_swept(cache):
    old = cache / "kind" / ".name-dead"
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    store.cached_folder("kind", "name", lambda folder: None)
    assert not old.exists()


def test_a_full_disk_is_one_sentence(cache):
    def build(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(BadInput, match=r"No space left on device.*free some space"):
        store.cached_folder("kind", "name", build)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "holds no text"),
        (f"{END}\n{END}\n".encode(), "holds no text"),
        (b"good\xff", r"not UTF-8 text: byte 4 "),
        (b"x" * (1 << 20) + "é".encode()[:1] + b"y", r"byte 1,048,576 "),
        (b"x" * ((1 << 20) - 1) + "é".encode()[:1] + b"y", r"byte 1,048,575 "),
        (b"good \xc3", r"byte 5 "),
        ("two\nlines".encode("utf-16-le"), r"byte 1 .* is NUL"),
        (b"one line only\n", "holds one line"),
        (stories("one story").encode(), "holds one document"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, cache, content, message):
    path = text_file(tmp_path, content)
    with pytest.raises(BadInput, match=message) as raised:
        load(path)
    assert path in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not any(path.is_file() for path in cache.rglob("*"))


def test_bad_arguments_are_refused(tmp_path):
    path = text_file(tmp_path, stories("one", "two"))
    lines = text_file(tmp_path, "a\nb\n", "lines.txt")
    cases = [
        ((str(tmp_path / "no.txt"),), "does not exist"),
        (("/dev/null",), "not a regular file"),
        (("pairs",), "give --branch translator"),
        ((path, str(tmp_path / "no.txt")), "does not exist"),
        ((path, path), "nothing is left to train on"),
        ((path, None, 0), "--stories 0"),
        (("fables", path), r"--valid .* goes with --data PATH"),
        ((lines, None, 1), "--stories cannot count"),
    ]
    for arguments, message in cases:
        with pytest.raises(BadInput, match=message):
            load(*arguments)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(tmp_path):
    path = text_file(tmp_path, stories("one", "two"))
    os.chmod(path, 0)
    with pytest.raises(BadInput, match=r"cannot read .* Permission denied"):
        load(path)


def test_fables_have_a_floor_and_need_no_network(monkeypatch):
    monkeypatch.setattr(corpus, "FABLES_VALID_STORIES", 20)
    fables = load("fables", stories=50)
    train, valid = splits(fables)
    assert (len(train), len(valid), fables.duplicates_removed) == (50, 20, 0)
    assert not set(train) & set(valid)
    assert fables.train_bytes == sum(len(text.encode()) for text in train)
    assert fables.valid_bytes == sum(len(text.encode()) for text in valid)
    assert fables.floor_bits is not None
    assert 0.1 < fables.floor_bits / fables.valid_bytes < 3


def test_auto_falls_back_to_fables_and_says_why(monkeypatch):
    def fetch(*_):
        raise tinystories.Unreachable("TinyStories is out of reach: no such host")

    monkeypatch.setattr(tinystories, "fetch", fetch)
    monkeypatch.setattr(corpus, "FABLES_VALID_STORIES", 5)
    messages: list[str] = []
    assert load_corpus("auto", stories=10, say=messages.append).name == "fables"
    assert len(messages) == 1
    assert "no such host" in messages[0]
    with pytest.raises(BadInput, match="no such host"):
        load("tinystories")
