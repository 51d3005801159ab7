"""Fetching TinyStories from a hub on the loopback interface that redirects, limits, stalls, breaks off and changes."""

import contextlib
import hashlib
import re
import socket
import threading
from dataclasses import dataclass, field

import huggingface_hub.constants
import pytest

from mlx_transformer.data import hub as reaching
from mlx_transformer.data import tinystories
from mlx_transformer.data.corpus import load_corpus
from mlx_transformer.data.documents import read_documents
from mlx_transformer.data.tinystories import TRAIN, VALID, Unreachable, fetch
from mlx_transformer.utils.errors import BadInput
from tests.data.conftest import Handler


def text_of(stories: int, label: str) -> bytes:
    return b"".join(f"Story {i} of {label}: “once upon a time”.\n<|endoftext|>\n".encode() for i in range(stories))


@dataclass
class Hub:
    """What the server holds and how it behaves."""

    files: dict[str, bytes]  # of the branch main
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    ranges: bool = True  # does it answer Range requests
    linked_etag: bool = True  # does its redirect carry the hub's own ETag
    answers: list[int] = field(default_factory=list)  # status codes to give before behaving
    break_after: list[int] = field(default_factory=list)  # of the next bodies, how many bytes are sent
    requests: list[tuple[str, str]] = field(default_factory=list)  # file and Range header, of the answers with a body
    authorizations: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""

    def commit(self) -> str:
        """The commit that main is at."""
        name = hashlib.sha1(b"".join(self.files.values())).hexdigest()
        self.commits[name] = dict(self.files)
        return name


class Answers(Handler):
    hub: Hub

    def answer(self):
        *_, place, revision, name = self.path.partition("?")[0].split("/")
        self.hub.authorizations.append((self.path, self.headers.get("Authorization")))
        if self.hub.answers:
            return self.reply(self.hub.answers.pop(0), {})
        commit = self.hub.commit() if revision == "main" else revision
        content = self.hub.commits.get(commit, {}).get(name)
        if content is None:
            return self.reply(404, {})
        if not self.path.startswith("/datasets/roneneldan/TinyStories/resolve/"):
            assert place == "cdn"
            return self.send_file(name, content)
        etag = {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"'} if self.hub.linked_etag else {}
        cdn = self.hub.url.replace("127.0.0.1", "localhost") + f"/cdn/{commit}/{name}?sig=1"
        facts = {"X-Repo-Commit": commit, "X-Linked-Size": str(len(content)), "ETag": f'"blob-{hash(content)}"'}
        return self.reply(302, {"Location": cdn, **facts, **etag})

    def send_file(self, name: str, content: bytes) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.hub.requests.append((name, self.headers.get("Range", "")))
        headers, status = {"ETag": f'"md5-{hashlib.md5(content).hexdigest()}"'}, 200
        if span and self.hub.ranges:
            first, last = int(span[1]), min(int(span[2]), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206 if first <= last else 416
        self.reply(status, {**headers, "Content-Length": str(len(content))})
        if self.hub.break_after:
            content = content[: self.hub.break_after.pop(0)]
            self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.write(content)


@pytest.fixture
def hub(serve) -> Hub:
    hub = Hub({TRAIN: text_of(1000, "train"), VALID: text_of(20, "valid")})
    hub.url = serve(Answers, hub)
    return hub


def quiet(_line: str) -> None:
    pass


def sizes(hub: Hub, name: str) -> int:
    return sum(
        int(span.rpartition("-")[2]) - int(span[6:].partition("-")[0]) + 1 for n, span in hub.requests if n == name
    )


def test_only_what_is_needed_is_read_and_kept(hub):
    source = fetch(100, quiet)
    held = source.train.read_bytes()
    assert held == hub.files[TRAIN][: len(held)]
    assert held.count(b"<|endoftext|>") >= 100
    assert len(held) < 3 * len(text_of(100, "train"))
    assert source.valid.read_bytes() == hub.files[VALID]
    assert sizes(hub, TRAIN) < len(hub.files[TRAIN]) / 2


def test_what_is_cached_needs_no_hub(hub):
    first = fetch(100, quiet)
    hub.requests.clear()
    hub.answers = [500] * 100
    again = fetch(90, quiet)
    assert (again.train, again.how, again.identity) == (first.train, "in the cache", first.identity)
    assert hub.requests == []


def test_more_stories_continue_where_the_file_ends(hub):
    held = len(fetch(100, quiet).train.read_bytes())
    hub.requests.clear()
    source = fetch(10_000, quiet)  # more than there are
    assert source.train.read_bytes() == hub.files[TRAIN]
    assert (TRAIN, f"bytes={held}-{held + 9_999}") in hub.requests
    assert not any(span.startswith("bytes=0-") for name, span in hub.requests if name == TRAIN)


def test_a_connection_that_drops_is_taken_up_again(hub):
    hub.break_after = [500, 0, 7_000, 1]
    assert fetch(10_000, quiet).train.read_bytes() == hub.files[TRAIN]
    assert hub.break_after == []


def test_a_busy_hub_is_asked_again(hub, monkeypatch):
    describe = tinystories._describe
    monkeypatch.setattr(tinystories, "_describe", lambda held: (describe(held), hub.answers.extend([503, 500]))[0])
    assert fetch(10_000, quiet).train.read_bytes() == hub.files[TRAIN]
    assert hub.answers == []


def test_a_download_that_was_given_up_resumes_in_the_next_run(hub):
    hub.break_after = [999_999, 999_999] + [0] * 6  # the first is the validation file
    with pytest.raises(Unreachable, match=r"broke off at 0.0 MB .*the next run resumes there") as raised:
        fetch(10_000, quiet)
    assert "\n" not in str(raised.value)
    hub.requests.clear()
    assert fetch(10_000, quiet).train.read_bytes() == hub.files[TRAIN]
    assert hub.requests[0] == (TRAIN, "bytes=10000-19999")


@pytest.mark.parametrize("broken", [{"ranges": False}, {"files": {TRAIN: b"", VALID: b""}}])
def test_a_server_that_is_no_hub_is_one_sentence(hub, broken):
    vars(hub).update(broken)
    with pytest.raises(Unreachable, match=r"sends no parts of|is no hub") as raised:
        fetch(100, quiet)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("linked_etag", [True, False])
def test_a_file_that_changed_is_never_mixed(hub, linked_etag):
    hub.linked_etag = linked_etag
    fetch(100, quiet)
    hub.files[TRAIN] = text_of(1100, "another version")
    messages: list[str] = []
    assert fetch(10_000, messages.append).train.read_bytes() == hub.files[TRAIN]
    assert any("not what it was on the hub" in line for line in messages)


def test_a_file_that_became_shorter_is_fetched_anew(hub):
    fetch(500, quiet)
    hub.files[TRAIN] = text_of(50, "short")
    assert fetch(900, quiet).train.read_bytes() == hub.files[TRAIN]


def test_a_file_that_changes_while_it_is_fetched_is_read_at_one_commit(hub, monkeypatch):
    before, read = dict(hub.files), tinystories._read

    def changing(*span):
        hub.files[TRAIN] = text_of(1000, "later")
        hub.commit()
        return read(*span)

    monkeypatch.setattr(tinystories, "_read", changing)
    assert fetch(10_000, quiet).train.read_bytes() == before[TRAIN]


def test_a_cached_file_that_is_too_long_is_fetched_anew(hub):
    path = fetch(100, quiet).train
    path.write_bytes(path.read_bytes() * 100)
    assert fetch(10_000, quiet).train.read_bytes() == hub.files[TRAIN]


def test_bytes_that_are_not_the_files_are_noticed(hub):
    path = fetch(100, quiet).train
    path.write_bytes(path.read_bytes().replace(b"Story 1 ", b"Glory 1 "))
    with pytest.raises(BadInput, match=r"was not the hub's file and has been deleted") as raised:
        fetch(10_000, quiet)
    assert not isinstance(raised.value, Unreachable)  # no reason to train on fables
    assert fetch(10_000, quiet).train.read_bytes() == hub.files[TRAIN]


@pytest.mark.parametrize("status", [404, 401, 503])
def test_a_refusal_is_one_sentence(hub, status):
    hub.answers = [status] * 100
    with pytest.raises(
        Unreachable, match=f"TinyStories is out of reach: the hub answered {status} .*holds 0 of 100"
    ) as raised:
        fetch(100, quiet)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, BadInput)


def test_the_token_goes_to_the_hub_alone(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(100, quiet)
    assert {token for path, token in hub.authorizations if path.startswith("/datasets")} == {"Bearer hf_secret"}
    assert {token for path, token in hub.authorizations if path.startswith("/cdn")} == {None}


def test_offline_the_cache_serves_if_it_holds_enough(hub, monkeypatch):
    fetch(100, quiet)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert fetch(100, quiet).how == "in the cache"
    with pytest.raises(Unreachable, match=r"HF_HUB_OFFLINE is set.*holds .* of 900 stories"):
        fetch(900, quiet)
    assert hub.requests == []


def test_the_librarys_own_cache_serves(use_hub, tmp_path, monkeypatch):
    use_hub("http://127.0.0.1:9")
    snapshot = tmp_path / "hub-cache" / "datasets--roneneldan--TinyStories" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("c0ffee")
    for name in (TRAIN, VALID):
        (snapshot / name).write_bytes(text_of(30, name))
    source = fetch(30, quiet)
    assert source.train.read_bytes() == text_of(30, TRAIN)
    assert "huggingface_hub" in source.how


def test_a_silent_hub_is_given_up(use_hub, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        use_hub(f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(reaching, "REACH_SECONDS", 0.3)
        with pytest.raises(Unreachable, match=r"no answer from the hub within 0.3 s|ReadTimeout"):
            fetch(10, quiet)


def test_a_name_service_that_hangs_is_given_up(use_hub, tmp_path, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [released.wait(10)][1:])
    use_hub("http://hub.invalid")
    monkeypatch.setattr(reaching, "REACH_SECONDS", 0.3)
    with pytest.raises(Unreachable, match=r"no answer from the hub within 0.3 s|ReadTimeout"):
        fetch(10, quiet)
    released.set()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "not a url", "http://"])
def test_no_hub_there_is_one_sentence(use_hub, url):
    use_hub(url)
    with pytest.raises(Unreachable, match="TinyStories is out of reach: ") as raised:
        fetch(10, quiet)
    assert "\n" not in str(raised.value)


def test_two_at_once_share_one_download(hub):
    contents: list[bytes] = []
    threads = [threading.Thread(target=lambda: contents.append(fetch(900, quiet).train.read_bytes())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents[0] == contents[1] == hub.files[TRAIN][: len(contents[0])]


def test_the_corpus_has_the_stories_asked_for(hub):
    hub.files[TRAIN] = text_of(50, "train") + text_of(1, "valid") + text_of(800, "more")
    messages: list[str] = []
    corpus = load_corpus("auto", stories=60, say=messages.append)
    stories = list(read_documents(corpus.train))
    assert (corpus.name, corpus.train_documents, corpus.valid_documents, corpus.duplicates_removed) == (
        "tinystories",
        59,
        20,
        1,
    )
    assert stories[0] == "Story 0 of train: “once upon a time”."
    assert len(stories) == 59
    assert "TinyStories, the first 60 stories" in messages[-1]
    assert load_corpus("tinystories", stories=60, say=quiet).sha256 == corpus.sha256
