"""A data set of the hub by its name, from a hub on the loopback interface."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub.constants
import pytest

from mlx_transformer.data import hub as module
from mlx_transformer.data.corpus import load_corpus
from mlx_transformer.data.documents import read_documents
from mlx_transformer.data.sources import open_source
from mlx_transformer.utils.errors import BadInput
from tests.data.conftest import Handler

NAME = "someone/stories-v1.0"
STORIES = [f"Story {i} of the cat." for i in range(40)]
JSONL = "\n".join(json.dumps({"text": text}) for text in STORIES).encode()
CSV = ("story\n" + "\n".join(STORIES)).encode()


@dataclass
class Hub:
    files: dict[str, bytes]
    answers: list[int] = field(default_factory=list)  # status codes to give before behaving
    requests: list[str] = field(default_factory=list)


class Answers(Handler):
    hub: Hub

    def answer(self):
        path = self.path.partition("?")[0]
        self.hub.requests.append(path)
        if self.hub.answers:
            return self.reply(self.hub.answers.pop(0), {})
        commit = hashlib.sha1(repr(self.hub.files).encode()).hexdigest()
        if path == f"/api/datasets/{NAME}":
            siblings = [{"rfilename": name, "size": len(content)} for name, content in self.hub.files.items()]
            return self.reply(200, {}, json.dumps({"id": NAME, "sha": commit, "siblings": siblings}).encode())
        name = path.removeprefix(f"/datasets/{NAME}/resolve/{commit}/")
        if name not in self.hub.files:
            return self.reply(404, {})
        content = self.hub.files[name]
        return self.reply(200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content)


@pytest.fixture(autouse=True)
def hub(serve, monkeypatch, tmp_path) -> Hub:
    hub = Hub({"README.md": b"# Stories", "data/train.jsonl": JSONL, "data/valid.jsonl": b"{}"})
    serve(Answers, hub)
    monkeypatch.chdir(tmp_path)
    return hub


def quiet(_line: str) -> None: ...


def test_the_training_split_of_a_data_set(hub):
    messages: list[str] = []
    corpus = load_corpus(NAME, say=messages.append)
    assert list(read_documents(corpus.train)) == STORIES[:38]
    assert list(read_documents(corpus.valid)) == STORIES[38:]
    assert (corpus.name, corpus.text_column) == (NAME, "text")
    assert messages[0].startswith(f"{NAME} of the hub: 1 file, 0.0 MB: data/train.jsonl")
    assert not any("valid" in path for path in hub.requests)


def test_it_may_be_the_validation_text_and_name_a_column(hub, tmp_path):
    hub.files = {"stories.csv": CSV, "test.csv": b""}
    (tmp_path / "train.txt").write_text("a\n<|endoftext|>\nStory 3 of the cat.")
    corpus = load_corpus(str(tmp_path / "train.txt"), NAME, say=quiet, text_column="story")
    assert list(read_documents(corpus.valid)) == STORIES
    assert corpus.duplicates_removed == 1


FILES: dict[str, tuple[list[str], list[str]]] = {
    "several": (
        ["train-2.jsonl.gz", "train-10.jsonl.gz", "test-1.jsonl.gz"],
        ["train-10.jsonl.gz", "train-2.jsonl.gz"],
    ),
    "two formats": (["train.csv", "train.txt", "train.jsonl", "train.parquet"], ["train.jsonl"]),
    "named for nothing": (["stories.txt", "test.txt", "LICENSE.txt", "dataset_infos.json"], ["stories.txt"]),
    "training": (["Training_v2.csv", "all.jsonl"], ["Training_v2.csv"]),
    "folders": (["en/train/0.txt", "en/validation/0.txt", "fr/train/0.txt"], ["en/train/0.txt", "fr/train/0.txt"]),
}


@pytest.mark.parametrize("names", FILES)
def test_the_files_of_the_training_split(names):
    there, wanted = FILES[names]
    siblings = [huggingface_hub.hf_api.RepoSibling(rfilename=name, size=2) for name in there]
    info = huggingface_hub.DatasetInfo(id=NAME, siblings=[])
    info.siblings = siblings
    assert module._choose(NAME, info, ((".jsonl", ".json"), (".csv",), (".txt",))) == dict.fromkeys(wanted, 2)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"data/train-00000.parquet": b"", "README.md": b""}, "has Parquet files only, which would need pyarrow"),
        ({"README.md": b"", "a.bin": b""}, r"has no \.jsonl, \.csv or \.txt to train on; it has README\.md, a\.bin"),
        ({}, "it has no files"),
        ({"train.csv": CSV}, "train.csv: no column 'text'; .*: story"),
    ],
)
def test_a_data_set_that_cannot_be_read_is_one_sentence(hub, files, message):
    hub.files = files
    with pytest.raises(BadInput, match=message) as raised:
        load_corpus(NAME, say=quiet)
    assert "\n" not in str(raised.value)


def test_what_was_fetched_needs_no_hub(hub, monkeypatch):
    first = load_corpus(NAME, say=quiet)
    hub.answers = [500] * 100
    assert load_corpus(NAME, say=quiet).train == first.train
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert load_corpus(NAME, say=quiet).train == first.train
    assert hub.requests == []
    with pytest.raises(BadInput, match=r"someone/else does not exist here, and .* of the hub: HF_HUB_OFFLINE is set"):
        load_corpus("someone/else", say=quiet)


def test_a_data_set_that_changed_is_another_corpus(hub):
    first = load_corpus(NAME, say=quiet)
    hub.files["data/train.jsonl"] = JSONL.replace(b"cat", b"dog")
    assert load_corpus(NAME, say=quiet).sha256 != first.sha256


@pytest.mark.parametrize("status", [401, 404, 503])
def test_a_refusal_is_one_sentence(hub, status):
    hub.answers = [status] * 100
    with pytest.raises(BadInput, match=f"out of reach as a data set of the hub: the hub answered {status} ") as raised:
        load_corpus(NAME, say=quiet)
    assert "\n" not in str(raised.value)


def test_a_file_that_breaks_off_is_one_sentence(hub, monkeypatch):
    def breaks(*_, **__):
        raise OSError("Connection reset")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", breaks)
    with pytest.raises(BadInput, match=r"data/train.jsonl could not be fetched \(OSError: Connection reset\)"):
        load_corpus(NAME, say=quiet)


def test_paths_are_no_data_sets(hub, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "someone").mkdir()
    for path in (
        "texts/none",
        "someone/none.txt",
        "none/none.txt",
        "none/none.csv.gz",
        "a/b/c",
        "./a/b",
        "/a/b",
        "~/b",
    ):
        with pytest.raises(
            BadInput, match=r"does not exist; --data takes .* OWNER/NAME of the hub or the path of a text"
        ):
            load_corpus(path, say=quiet)
    (tmp_path / "someone" / "stories-v1.0").write_text("a\nb\n")
    assert open_source(NAME).files == (Path(NAME),)
    assert hub.requests == []
