"""The command: bad input ends in one sentence, Ctrl-C ends it, and a reader who leaves frees the model."""

import http.client
import json
import socket
import sys
import threading
import time
import urllib.request

import pytest

from mlx_transformer import __main__ as entry
from tests.faults.runs import assert_bad, command
from tests.serve.served import served

pytest.importorskip("starlette", reason="starlette is not installed: make test installs it")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: make test installs it")


def serve(*args):
    return command(entry.main, "serve", *args)


def test_bad_input_is_one_sentence(run, tmp_path, monkeypatch):
    assert_bad(serve(), "RUN is missing: a run folder")
    assert_bad(serve(tmp_path / "none", "--port", 0), "none' holds no model")
    assert_bad(serve(run, "--port", "65536"), "--port: '65536': expected a whole number from 0 to 65535")
    assert_bad(serve(run, "--port", "0", "--code", "idea.py"), "takes no code")
    assert_bad(serve(run, "--device", "tpu"), "'tpu'")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_bad(serve(run, "--port", port), f"--port {port}: cannot be used (", "give another one, or --port 0")
    monkeypatch.delitem(sys.modules, "mlx_transformer.serve.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert_bad(serve(run), "needs uvicorn, which is not installed: pip install 'mlx-transformer[serve]'")


def begin(address, **asked):
    """Return the connection of a request for a text, and its answer, of which the first line has come."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    body = json.dumps({"prompt": "the cat", "max_tokens": 10_000, **asked})
    connection.request("POST", "/api/write", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    assert "prompt" in json.loads(answer.readline())
    return connection, answer


def test_it_serves_until_ctrl_c(run):
    with served(run) as (process, address):
        assert json.load(urllib.request.urlopen(f"{address}/api/model"))["run"] == run.name
        _, answer = begin(address)
        assert json.loads(answer.readline())["token"] >= 0
    assert (process.returncode, process.said) == (0, "ended\n")


def test_a_reader_who_leaves_ends_the_job(run):
    from mlx_transformer.serve.app import make_app
    from mlx_transformer.serve.player import Player
    from mlx_transformer.serve.server import Server
    from mlx_transformer.serve.worker import Worker

    worker = Worker()
    app = make_app(worker.call(lambda: Player(run, None, "auto")), worker)
    server = Server(app, worker)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    readers = [begin(address, seed=seed) for seed in range(2)]
    assert worker.jobs == 2
    for connection, answer in readers:
        assert "text" in json.loads(answer.readline())
        answer.close()
        connection.close()
    until = time.monotonic() + 10
    while worker.jobs and time.monotonic() < until:
        time.sleep(0.01)
    assert worker.jobs == 0, "of 20,000 tokens only a few were read"
    server.should_exit = True
    thread.join(10)
    worker.close()
