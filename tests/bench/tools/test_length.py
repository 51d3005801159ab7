"""Length extrapolation: the same tokens at every length, the log, the plot."""

import json

import mlx.core as mx
import numpy as np
import pytest

from bench.compare.runs import Finished, Run
from bench.compare.variants import Variant
from bench.tools import length
from mlx_transformer.data.stream import validation_batches
from mlx_transformer.run.settings import Settings
from mlx_transformer.train.evaluate import Evaluator
from mlx_transformer.utils.errors import BadInput, RunFailed
from phases import phase3
from tests.ladder import V, tiny

VALID = np.random.default_rng(0).integers(0, V, 500).astype(np.uint16)


def test_the_loss_at_a_length_is_the_evaluator_s():
    net = tiny(phase3.BRANCHES["alibi"])
    for seq_len in (17, 34):
        nats = length.losses(net, VALID, seq_len)
        assert len(nats) == len(VALID) - 1
        assert nats.mean() == pytest.approx(Evaluator(net, validation_batches(VALID, seq_len, 8192))(), rel=1e-5)


def test_the_curve_is_the_extra_loss_by_position():
    net = tiny(phase3.BRANCHES["alibi"])
    found = length.measure(net, VALID, 16)
    assert list(found["losses"]) == ["16", "32", "64"]
    assert [point["position"] for point in found["curve"]] == list(range(2, 65, 2))
    cost = np.array([point["cost"] for point in found["curve"]])
    np.testing.assert_allclose(cost[:8], 0, atol=1e-5)
    x, y = (mx.array(VALID[i : i + 448].astype(np.int32)) for i in (0, 1))  # seven sequences of 64, 28 of 16

    def nats(rows):
        return np.array(net.token_loss(net.hidden(net.context(x.reshape(rows, -1))), y.reshape(rows, -1))).reshape(
            7, 64
        )

    wanted = (nats(7) - nats(28))[:, 48:50].mean()
    tail = length.measure(net, VALID[:449], 16)["curve"][24]
    assert tail["position"] == 50
    assert tail["cost"] == pytest.approx(wanted, abs=1e-5)
    assert abs(wanted) > 1e-4


@pytest.fixture(scope="module")
def run():
    flags = Settings(size="nano", data="fables", stories=200, vocab_size=300, max_tokens=1000)
    return Run.of(Variant(phase=3), flags)


def test_a_diverged_run_is_recorded_and_a_failed_one_is_an_error(run, monkeypatch):
    monkeypatch.setattr(length, "execute", lambda run, say: Finished(status="diverged"))
    assert length.evaluate_run(run, lambda said: None)["status"] == "diverged"
    monkeypatch.setattr(length, "execute", lambda run, say: Finished(status="failed", error="no space left"))
    with pytest.raises(RunFailed, match="no space left"):
        length.evaluate_run(run, lambda said: None)


def test_a_log_is_shown_and_drawn(run, tmp_path):
    curve = [{"position": 8 * (i + 1), "cost": 0.1 * i} for i in range(32)]
    losses = {"64": 3.0, "128": 3.5, "256": 4.0}
    done = {"status": "done", "losses": losses, "curve": curve}
    better = {**done, "losses": {**losses, "64": 2.0}}
    runs = [
        {"name": "phase 3/rope", "seed": 0, **done},
        {"name": "phase 3/rope", "seed": 1, **better},
        {"name": "phase 3/rope", "seed": 2, "status": "diverged"},
        {"name": "phase 3/t5", "seed": 0, "status": "diverged"},
    ]
    log = length.record([run], runs, complete=True)
    assert json.loads(json.dumps(log))["seq_len"] == 64
    assert [list(column.cells) for column in length.show(log).columns] == [
        ["phase 3/rope", "phase 3/t5"],
        ["3.0000", "diverged"],
        ["3.5000", "diverged"],
        ["4.0000", "diverged"],
        ["3", "1"],
    ]
    length.draw(log, tmp_path / "length.png")
    assert (tmp_path / "length.png").read_bytes().startswith(b"\x89PNG")


def test_only_a_log_of_the_same_command_is_written_again(run, tmp_path):
    path = tmp_path / "log.json"
    length.check_log(path, [run])
    path.write_text(json.dumps(length.record([run], [], complete=False)))
    length.check_log(path, [run])
    with pytest.raises(BadInput, match="is there already"):
        length.check_log(path, [run.with_settings(seed=1)])
    path.write_text("{}")
    with pytest.raises(BadInput, match="is there already"):
        length.check_log(path, [run])
    with pytest.raises(BadInput, match=r"\.json"):
        length.check_log(tmp_path / "log.txt", [run])
    with pytest.raises(BadInput, match="too long"):
        length.check_log(tmp_path / f"{'x' * 300}.json", [run])
