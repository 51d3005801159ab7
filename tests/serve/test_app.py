"""The server's answers: what the model writes, expects and attends to, and one sentence for bad input."""

import json

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("starlette", reason="starlette is not installed: make test installs it")

from starlette.testclient import TestClient

import mlx_transformer as mt
from mlx_transformer.data.tokenizers.huggingface import HFTokenizer
from mlx_transformer.run.ladder import Experiment
from mlx_transformer.serve.app import make_app
from mlx_transformer.serve.player import Player
from mlx_transformer.serve.worker import Worker
from mlx_transformer.utils.errors import BadInput
from phases import phase1, phase5
from tests.serve.conftest import HYBRID, NUMBERS

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def player(worker, run):
    return worker.call(lambda: Player(run, None, "auto"))


@pytest.fixture(scope="module")
def client(player, worker):
    return TestClient(make_app(player, worker), base_url="http://127.0.0.1:8765", raise_server_exceptions=False)


def write(client, **asked):
    answer = client.post("/api/write", json=asked)
    assert answer.status_code == 200, answer.text
    given, *drawn, end = map(json.loads, answer.text.splitlines())
    return given["prompt"], drawn, end


def ask(client, path, **asked):
    answer = client.post(path, json=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()


SAMPLING = {"temperature": 1.2, "top_k": 50, "top_p": 0.95, "min_p": 0.001}


@pytest.mark.parametrize("asked", [{}, {"seed": 7, "max_tokens": 100, **SAMPLING}, {"temperature": 0, "max_tokens": 3}])
def test_it_writes_what_generate_writes(client, player, worker, asked):
    given, drawn, end = write(client, prompt="the cat", **asked)
    (expected,) = worker.call(lambda: mt.generate(player.model, player.tokenizer, "the cat", **asked))
    assert [one["token"] for one in drawn] == expected.tokens
    assert "".join(one["text"] for one in drawn) + end["rest"] == expected.continuation
    assert (end["ended"], end["slides"]) == (expected.ended, expected.slides)
    assert "".join(one["text"] for one in given) == "the cat"
    assert given[0]["name"] == "¶"


def test_every_character_is_shown_once(client, player):
    """Characters of several tokens come with their last one, in a beginning and in what is drawn."""
    prompt = "né🙂 <script>alert(1)</script>"
    given, drawn, end = write(client, prompt=prompt, max_tokens=80, temperature=3)
    assert "".join(one["text"] for one in given) == prompt
    tokens = [one["token"] for one in (*given, *drawn)]
    text = "".join(one["text"] for one in (*given, *drawn)) + end["rest"]
    assert text == player.tokenizer.decode(tokens)


def test_the_candidates_are_the_model_s(client, player, worker):
    tokens = [player.tokenizer.bos_id, *player.tokenizer.encode("the cat")]
    p = worker.call(lambda: np.array(mx.softmax(player.model(mx.array([tokens]))[0, -1])))
    found = ask(client, "/api/look", tokens=tokens, token=int(p.argmin()), temperature=0.5, top_k=3)
    assert [one["token"] for one in found["candidates"]] == np.argsort(-p, kind="stable")[:10].tolist()
    np.testing.assert_allclose([one["p"] for one in found["candidates"]], np.sort(p)[::-1][:10], rtol=1e-3)
    top = np.sort(p)[::-1][:3] ** 2
    np.testing.assert_allclose([one["sampled"] for one in found["candidates"]], [*top / top.sum(), *[0] * 7], rtol=1e-3)
    assert found["own"]["rank"] == found["of"] == len(p)
    assert found["own"]["sampled"] == 0
    greedy = ask(client, "/api/look", tokens=tokens, temperature=0)
    assert [one["sampled"] for one in greedy["candidates"]] == [1, *[0] * 9]
    assert greedy["own"] is None


def test_past_the_context_the_candidates_are_those_it_was_drawn_from(client, player):
    """Greedy text repeats nothing else: each token is the first candidate of what the model still saw."""
    given, drawn, end = write(client, prompt="the cat", temperature=0, max_tokens=100)
    tokens = [one["token"] for one in (*given, *drawn)]
    assert end["slides"] > 1
    for i in range(len(given), len(tokens), 7):
        assert ask(client, "/api/look", tokens=tokens[:i], token=tokens[i])["own"]["rank"] == 1
    attention = ask(client, "/api/attend", tokens=tokens, layer=1, head=1)
    assert 0 < len(tokens) - attention["start"] <= player.model.config.seq_len
    assert len(attention["rows"]) == len(tokens) - attention["start"]


def test_attention_of_a_head_and_of_a_layer(client):
    tokens = [one["token"] for one in write(client, prompt="the cat", max_tokens=8)[0]]
    heads = [ask(client, "/api/attend", tokens=tokens, layer=0, head=head)["rows"] for head in (0, 1)]
    mean = ask(client, "/api/attend", tokens=tokens, layer=0)["rows"]
    for i, (first, second, both) in enumerate(zip(*heads, mean, strict=True)):
        assert len(first) == i + 1
        assert sum(first) == pytest.approx(1, abs=1e-3)
        assert both == pytest.approx(np.mean([first, second], axis=0), abs=2e-4)


def test_a_model_of_one_s_own_and_a_mixer_without_weights(worker, data, tmp_path):
    (tmp_path / "idea.py").write_text(HYBRID)
    kind = Experiment.of_file(tmp_path / "idea.py").find_branch(None)
    numbers = kind.Config(vocab_size=data.tokenizer.vocab_size, n_kv_heads=1, **NUMBERS)
    mt.save(tmp_path / "run", kind(numbers), data.tokenizer)
    player = worker.call(lambda: Player(tmp_path / "run", "kept", "cpu"))
    client = TestClient(make_app(player, worker), base_url="http://localhost")
    described = client.get("/api/model").json()
    assert described["layers"] == [{"mixer": "LinearAttention", "heads": 0}, {"mixer": "FusedAttention", "heads": 2}]
    assert (described["code"], described["run"]) == ("idea.py", "run")
    refused = client.post("/api/attend", json={"tokens": [0, 5], "layer": 0})
    assert (refused.status_code, "has no attention weights" in refused.json()["error"]) == (400, True)
    assert len(ask(client, "/api/attend", tokens=[0, 5], layer=1)["rows"]) == 2
    with pytest.raises(BadInput, match="runs only on request"):
        worker.call(lambda: Player(tmp_path / "run", None, "cpu"))


def test_a_model_with_a_tokenizer_of_hugging_face(worker, tmp_path):
    """As `import` leaves one: tokens of bytes, and more rows of the embedding than tokens."""
    library = pytest.importorskip("tokenizers", reason="tokenizers is not installed: make test installs it")
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer, made.decoder = library.pre_tokenizers.ByteLevel(False), library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([], trainer)
    tokenizer = HFTokenizer(made.to_str().encode())
    mt.save(tmp_path, phase5.Model(phase5.Config(vocab_size=300, n_kv_heads=1, **NUMBERS)), tokenizer)
    player = worker.call(lambda: Player(tmp_path, None, "auto"))
    client = TestClient(make_app(player, worker), base_url="http://localhost")
    given, drawn, end = write(client, prompt="né 🙂", max_tokens=60)
    (expected,) = worker.call(lambda: mt.generate(player.model, player.tokenizer, "né 🙂", max_tokens=60))
    assert "".join(one["text"] for one in given) == "né 🙂"
    assert "".join(one["text"] for one in drawn) + end["rest"] == expected.continuation
    tokens = [one["token"] for one in given]
    found = ask(client, "/api/look", tokens=tokens, token=299)
    assert (found["of"], found["own"]["text"]) == (300, "")
    assert len(ask(client, "/api/attend", tokens=tokens, layer=1)["rows"]) == len(tokens)


def test_a_translator_is_refused(worker, data, tmp_path):
    kind = phase1.BRANCHES["translator"]
    mt.save(tmp_path, kind(kind.Config(vocab_size=data.tokenizer.vocab_size, **NUMBERS)), data.tokenizer)
    with pytest.raises(BadInput, match="holds a translator, which the page does not show: use `python -m"):
        worker.call(lambda: Player(tmp_path, None, "cpu"))


BAD = {
    "write": [
        ({"prompt": ""}, "prompt '' is empty: expected some text"),
        ({"prompt": "a" * 200}, "expected fewer than the context of 48"),
        ({"prompt": "\ud800"}, "half of a surrogate pair"),
        ({}, "prompt is missing"),
        ({"prompt": 5}, "prompt = 5: expected text"),
        ({"prompt": "a", "temperature": "abc"}, 'temperature = "abc": expected a number'),
        ({"prompt": "a", "temperature": -1}, "temperature = -1.0: expected a number of at least 0"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature = NaN: expected a number"),
        ({"prompt": "a", "top_p": 0}, "top-p = 0.0: expected a number above 0"),
        ({"prompt": "a", "top_k": 1.5}, "top-k = 1.5: expected a whole number from 1"),
        ({"prompt": "a", "max_tokens": 0}, "max-tokens = 0: expected a whole number from 1 to 10000"),
        ({"prompt": "a", "seed": True}, "seed = true: expected a whole number"),
        ({"prompt": "a", "top": 1}, '"top" is unknown: expected prompt, '),
        ([1], "the request is a JSON list: expected an object"),
    ],
    "look": [
        ({"tokens": []}, "nothing stands before the first token"),
        ({"tokens": [0, 10**6]}, "token 1000000 is unknown: expected ids below"),
        ({"tokens": [0, -1]}, "tokens[1] = -1: expected a whole number"),
        ({"tokens": "abc"}, 'tokens = "abc": expected a list of token ids'),
    ],
    "attend": [
        ({"tokens": [0, 5], "layer": 2}, "layer = 2: expected a number from 0 to 1"),
        ({"tokens": [0, 5], "layer": 0, "head": 2}, "head = 2: expected a number from 0 to 1"),
        ({"tokens": [0, 5]}, "layer is missing"),
        ({"layer": 0}, "tokens are missing"),
    ],
}


def refusal(answer):
    """The status and the sentence of an answer."""
    (sentence,) = answer.json().values()
    assert "\n" not in sentence
    return answer.status_code, sentence


@pytest.mark.parametrize(("path", "asked", "words"), [(path, *case) for path, cases in BAD.items() for case in cases])
def test_bad_input_is_one_sentence(client, path, asked, words):
    status, sentence = refusal(client.post(f"/api/{path}", content=json.dumps(asked), headers=JSON))
    assert status == 400
    assert words in sentence


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"])
def test_what_is_no_json(client, body):
    status, sentence = refusal(client.post("/api/write", content=body, headers=JSON))
    assert (status, sentence) == (400, "the request is no JSON: expected an object")


def test_a_request_that_another_site_sends_is_refused(client):
    asked = {"prompt": "a", "max_tokens": 2}
    assert client.get("/", headers={"host": "localhost:1"}).status_code == 200, "through a tunnel"
    for headers in ({"host": "evil.example:8765"}, {"host": "127.0.0.1.evil.example"}, {"host": ""}):
        assert refusal(client.get("/", headers=headers))[0] == 403
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9"):
        status, sentence = refusal(client.post("/api/write", json=asked, headers={"origin": origin}))
        assert (status, "is another site" in sentence) == (403, True)
    assert client.post("/api/write", json=asked, headers={"origin": "http://127.0.0.1:8765"}).status_code == 200
    assert (
        refusal(client.post("/api/write", content=json.dumps(asked), headers={"content-type": "text/plain"}))[0] == 415
    )
    assert refusal(client.post("/api/write", json={"prompt": "a" * 1_000_001}))[0] == 413
    assert refusal(client.get("/api/write"))[0] == 405
    assert refusal(client.get("/../app.py"))[0] == 404


def test_the_page_loads_nothing_from_elsewhere(client):
    for name in ("", "page.js", "text.js", "token.js", "ask.js", "page.css", "icon.svg"):
        answer = client.get(f"/{name}")
        assert answer.status_code == 200
        assert "default-src 'none'; script-src 'self'" in answer.headers["content-security-policy"]
        text = answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text
        assert "https:" not in text
        assert "innerHTML" not in text


def test_an_error_of_the_server_is_one_sentence_and_the_next_request_works(client, player, monkeypatch, capfd):
    def fails(*_):
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(player.model, "last_logits", fails)
        status, sentence = refusal(client.post("/api/look", json={"tokens": [0]}))
    assert (status, sentence) == (500, "the server failed (RuntimeError): its terminal says more")
    assert "RuntimeError: broken" in capfd.readouterr().err


def test_an_error_in_the_middle_is_the_last_line(client, player, monkeypatch, capfd):
    def breaks(*_, **__):
        yield [5]
        raise RuntimeError("[malloc] Unable to allocate 9 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(player, "decoder", breaks)
        _, _, end = write(client, prompt="a")
    assert end["error"].startswith("out of memory ([malloc] Unable to allocate 9 bytes): shorten the text")
    assert write(client, prompt="a", max_tokens=2)
