"""What --data takes: formats, compression and folders, all read as the same documents; and the errors for the rest."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_transformer.data import documents, load
from mlx_transformer.data.corpus import load_corpus
from mlx_transformer.data.documents import read_documents
from mlx_transformer.data.sources import Source, open_source
from mlx_transformer.utils.errors import BadInput

pytestmark = pytest.mark.usefixtures("cache")
END = "<|endoftext|>"
TEXTS = [
    "One, “two”.\nThree; four\n\n five",
    'He said: "no, never"',
    "tab\there, \\u0041\\n",
    f"left{END}right",
    "",
    "🙂 é",
]
DOCUMENTS = [*TEXTS[:3], "left", "right", TEXTS[5]]


def plain(texts: list[str], newline: str = "\n") -> str:
    return f"\n{END}\n".join(texts).replace("\n", newline)


def jsonl(texts: list[str], key: str = "text", **options: Any) -> str:
    return "\n".join(json.dumps({"id": i, key: text}, **options) for i, text in enumerate(texts))


def table(texts: list[str], column: str = "text", **options: Any) -> str:
    out = io.StringIO()
    csv.writer(out, **options).writerows([["id", column], *([i, text] for i, text in enumerate(texts))])
    return out.getvalue()


FORMATS = {
    "a.txt": plain(TEXTS),
    "a": plain(TEXTS, "\r\n"),
    "a.jsonl": jsonl(TEXTS),
    "b.json": jsonl(TEXTS, ensure_ascii=False).replace("\n", "\r\n \r\n"),
    "c.ndjson": "\ufeff" + jsonl(TEXTS) + "\n\n",
    "d.jsonl": jsonl([text.replace("\n", "\r\n") for text in TEXTS]) + '\n{"text": null}',
    "a.csv": table(TEXTS),
    "b.CSV": "\ufeff" + table([text.replace("\n", "\r\n") for text in TEXTS], lineterminator="\n") + "\n",
    "c.csv": table(TEXTS, delimiter=";", quoting=csv.QUOTE_ALL),
    "d.tsv": table(TEXTS, delimiter="\t"),
}


def write(path: Path, content: str | bytes) -> str:
    raw = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def read(source: Source) -> list[str]:
    texts, text = [], ""
    for part, ends in source.parts():
        text += part
        if ends:
            texts.append(text)
            text = ""
    return texts


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_same_documents(tmp_path, name, zipped):
    source = open_source(write(tmp_path / (name + zipped), FORMATS[name]))
    assert read(source) == DOCUMENTS
    assert source.size == len(FORMATS[name].encode())
    assert (source.name, source.column) == (name + zipped, None if name in ("a", "a.txt") else "text")
    assert source.has_separators()


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1, max_size=5),
    st.sampled_from([16, 1 << 20]),
    st.sampled_from([("x.jsonl", jsonl), ("x.csv", table), ("x.csv.gz", table)]),
)
def test_any_record_comes_back(tmp_path_factory, texts, segment, made):
    name, write_records = made
    path = tmp_path_factory.mktemp("records") / name
    lines = [text.replace("\r\n", "\n").replace("\r", "\n") for text in texts]
    expected = [text.strip() for text in lines if text.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "SEGMENT", segment)
        if not expected:
            with pytest.raises(BadInput, match="holds no text"):
                open_source(write(path, write_records(texts)))
        else:
            assert read(open_source(write(path, write_records(texts)))) == expected


def test_a_long_field_is_read(tmp_path):
    text = "word, " * 100_000 + "end"
    assert read(open_source(write(tmp_path / "a.csv", table([text])))) == [text]


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", jsonl(TEXTS, "story")), ("a.csv", table(TEXTS, "story"))])
def test_the_column_of_the_text_is_named(tmp_path, name, content):
    path = write(tmp_path / name, content)
    with pytest.raises(BadInput, match=r"no column 'text'; give one of these as --text-column: id, story") as raised:
        load_corpus(path, say=print)
    assert "\n" not in str(raised.value)
    corpus = load_corpus(path, say=print, text_column="story")
    assert [*read_documents(corpus.train), *read_documents(corpus.valid)] == DOCUMENTS
    assert (corpus.name, corpus.text_column) == (name, "story")
    assert "column 'story'" in corpus.note
    assert load(path, text_column="story", tokenizer="word").valid_documents == 1


def test_another_column_is_another_corpus(tmp_path):
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"a": f"cat {i}", "b": f"dog {i}"}) for i in range(5)))
    a, b = (load_corpus(path, say=print, text_column=name) for name in "ab")
    assert next(read_documents(a.train)) == "cat 0"
    assert next(read_documents(b.train)) == "dog 0"


def test_training_and_validation_text_may_differ_in_format(tmp_path):
    train = write(tmp_path / "train.txt", plain(["one", "two", "three"]))
    corpus = load_corpus(train, write(tmp_path / "valid.csv.gz", table(["two", "four"])), say=print)
    assert list(read_documents(corpus.train)) == ["one", "three"]
    assert list(read_documents(corpus.valid)) == ["two", "four"]
    assert (corpus.name, corpus.text_column, corpus.duplicates_removed) == ("train.txt", "text", 1)


def test_a_folder_is_its_files_in_order(tmp_path):
    folder = tmp_path / "stories"
    (folder / "more").mkdir(parents=True)
    (folder / ".git").mkdir()
    write(folder / ".git" / "config", b"\xff")
    write(folder / ".hidden", b"\xff")
    write(folder / "b.txt", "second\n\nline")
    write(folder / "a.md", f"first{END}and a half\n{END}\n")
    write(folder / "empty.txt", "")
    write(folder / "more" / "c.jsonl.gz", jsonl(["third", "fourth"]))
    source = open_source(str(folder))
    assert read(source) == ["first", "and a half", "second\n\nline", "third", "fourth"]
    assert (source.name, source.column) == ("stories", "text")
    assert load_corpus(str(folder), say=print).name == "stories"


def test_a_zipped_text_is_the_corpus_of_the_text(tmp_path):
    a, b = (load_corpus(write(tmp_path / name, plain(TEXTS)), say=print) for name in ("a.txt", "b.txt.gz"))
    assert (a.train, a.sha256) == (b.train, b.sha256)
    assert (a.name, b.name) == ("a.txt", "b.txt.gz")


BAD: dict[str, tuple[str | bytes, str]] = {
    "array.json": ('[{"text": "a"}]', "line 1, is not a JSON object; expected one per line"),
    "pretty.json": ('{\n "text": "a"\n}', "line 1, is not a JSON object"),
    "deep.jsonl": ("[" * 100_000, "line 1, is not a JSON object"),
    "broken.jsonl": (jsonl(["a", "b"]) + '\n{"text": "c', "line 3, is not a JSON object"),
    "missing.jsonl": (jsonl(["a", "b"]) + '\n{"id": 3}', "line 3: no column 'text'; .* --text-column: id"),
    "number.jsonl": ('{"text": 12}', "line 1: 'text' is 12, no string"),
    "list.jsonl": ('{"text": ["a"]}', "line 1: 'text' is .*, no string"),
    "surrogate.jsonl": ('{"text": "a\\ud800"}', "line 1: 'text' holds half of a surrogate pair"),
    "nothing.jsonl": (jsonl(["", " "]), "holds no text"),
    "header.csv": ("id,text\n", "holds no text"),
    "one.csv": (table(["only"]), "holds one document"),
    "headless.csv": (
        "1,Once upon a time there was a cat who sat.\n2,b\n",
        "no column 'text'; .*: 1, Once upon a time there was a c…",
    ),
    "unquoted.csv": ("id,text\n1,a, and b\n", "line 2: 3 columns where the header has 2; quote"),
    "short.csv": ("id,text\n1\n", "line 2: 1 column where the header has 2"),
    "unclosed.csv": ('id,text\n1,"a\n', "line 2, is not CSV"),
    "bad.csv": (b"id,text\n1,\xff\n", "not UTF-8 text: byte 10 "),
    "data.parquet": (b"PAR1", "would need pyarrow"),
    "archive.zip": (b"PK\x03\x04\x00", r"is NUL; give UTF-8 text, \.jsonl or \.csv, each also as \.gz, or a folder"),
    "empty.csv": ("", "is empty"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("flag", ["data", "valid"])
def test_what_cannot_be_read_is_one_sentence(tmp_path, cache, name, flag):
    path = write(tmp_path / name, BAD[name][0])
    good = write(tmp_path / "good.txt", "x\ny\n")
    if flag == "valid" and name == "one.csv":
        return
    with pytest.raises(BadInput, match=BAD[name][1]) as raised:
        load_corpus(*((path,) if flag == "data" else (good, path)), say=print)
    assert path in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not any(path.is_file() for path in cache.rglob("*"))


@pytest.mark.parametrize(
    "content",
    [b"plain text", gzip.compress(b"cat " * 9999)[:-9], gzip.compress(b"cat")[:-3] + b"abc"],
    ids=["not compressed", "cut off", "wrong checksum"],
)
def test_a_damaged_gzip_file_is_one_sentence(tmp_path, content):
    (tmp_path / "a.txt.gz").write_bytes(content)
    with pytest.raises(BadInput, match=r"a\.txt\.gz is not a whole gzip file"):
        load_corpus(str(tmp_path / "a.txt.gz"), say=print)


def test_a_column_needs_a_file_with_columns(tmp_path):
    text = write(tmp_path / "a.txt", plain(TEXTS))
    for data in (text, "fables", str(tmp_path)):
        with pytest.raises(BadInput, match=r"--text-column story goes with .* no columns"):
            load_corpus(data, say=print, text_column="story")
