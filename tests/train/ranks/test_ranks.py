"""Training over several ranks: real processes in a ring on this machine."""

import json
import re
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest

from mlx_transformer.train import watch
from mlx_transformer.train.checkpoint import list_checkpoints, load_newest
from mlx_transformer.train.parallel import BUCKET_BYTES, Ranks, buckets
from tests.faults.runs import ON_CPU, merged
from tests.train.ranks.rings import LONGEST, ROOT, ring

WORKER = Path(__file__).parent / "worker.py"
SCHEMA = ROOT / "mlx_transformer" / "run" / "result.schema.json"
ENDLESS = ("--max-steps", 10**6, "--max-seconds", 2 * LONGEST)  # ends even where nobody is left to kill it
MOE = {"phase": 4, "branch": "moe"}
SHARDED = {"shard": "optimizer"}
RUNS = {  # by number of ranks
    2: [{"phase": 3}, {"phase": 6}, MOE, *({"phase": n, **SHARDED} for n in (1, 5))],
    4: [{"phase": 6, **SHARDED}, {**MOE, **SHARDED}],
}


def worked(folder: Path, size: int, runs: list[dict]) -> list[list[dict]]:
    """What each of so many ranks computed in each run."""
    out = folder / "out"
    with ring(folder, *[[WORKER, out, *map(json.dumps, runs)]] * size) as own:
        assert own.wait() == [0] * size, own.err(0)
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Each run in one process that computes a batch in as many parts as there are ranks, for 2 and 4 ranks."""
    runs = [{**run, "accumulate": size} for size in RUNS for run in RUNS[size]]
    (found,) = worked(tmp_path_factory.mktemp("one"), 1, runs)
    return {2: found[: len(RUNS[2])], 4: found[len(RUNS[2]) :]}


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_compute_what_one_process_does(size, one_process, tmp_path):
    everyone = worked(tmp_path, size, RUNS[size])
    for run, expected, found in zip(RUNS[size], one_process[size], everyone[0], strict=True):
        for name in expected["metrics"][0]:
            mine, theirs = ([step[name] for step in one["metrics"]] for one in (found, expected))
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6, err_msg=f"{run} {name}")
        np.testing.assert_allclose(found["valid"], expected["valid"], rtol=1e-5)
        for path, norm in expected["weights"].items():
            assert found["weights"][path] == pytest.approx(norm, rel=1e-4, abs=1e-6), (run, path)
        assert 0 < found["share"] < 1
        assert len(found["memory"]) == size
    for other in everyone[1:]:
        assert [run["bits"] for run in other] == [run["bits"] for run in everyone[0]]  # the same weights, bit for bit


def test_gradients_travel_in_few_messages_the_last_layers_first():
    sizes = {f"0/blocks.{i}.ffn.weight": BUCKET_BYTES // 4 for i in range(10)} | {
        "0/embedding.weight": 4,
        "signals": 12,
    }
    groups = buckets(sizes)
    assert sorted(path for group in groups for path in group) == sorted(sizes)
    assert len(groups) == 3
    assert groups[0][0] == "0/blocks.9.ffn.weight"


@pytest.mark.parametrize("broken", [np.zeros_like, lambda own: np.concatenate([own[: len(own) // 2]] * 2)])
@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_broken_collective_operation_is_an_error(broken, fails_at, monkeypatch):
    """A ring of which a rank is lost returns zeros, or what it has received before."""
    first, second = (Ranks(SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: 2), "ring") for rank in (0, 1))
    sent = []  # by rank 1: its header, then its message
    monkeypatch.setattr(second, "_gathered", lambda values: sent.append(values) or both(len(sent) - 1))

    def both(i: int) -> np.ndarray:
        """What both ranks send: they differ in the rank, which comes first in each."""
        theirs = sent[i].copy()
        theirs[i] = (0, ord("0"))[i]
        return np.concatenate([theirs, sent[i]])

    assert second.gather("value") == ["value", "value"]
    received = iter([broken(both(i)) if i == fails_at else both(i) for i in range(2)])
    monkeypatch.setattr(first, "_gathered", lambda _: next(received))
    with pytest.raises(RuntimeError, match="what no rank has sent"):
        first.gather("value")


def test_the_end_of_preparing_is_told_at_once(monkeypatch):
    """A rank that hangs after it is not granted the patience of one that prepares, however late its next beat is."""
    monkeypatch.setattr(watch, "BEAT_SECONDS", 1e6)
    here, there = socket.socketpair()
    with there:
        there.settimeout(LONGEST)
        own = watch.Watch(1, {0: ("here", here)})
        own.advance("computing a step")
        while b"computing a step" not in there.recv(4096):
            pass
        there.sendall(b'{"bye": true}\n')
        own.close()


@pytest.fixture(scope="module")
def flags(text):
    return command(ON_CPU, "--batch-size", 4, "--dropout", 0, "--data", text, "--eval-every", 4)


def command(flags: list, *further) -> list[str]:
    """The command line of phase 1; of a flag that is there twice the last one counts."""
    words = flags if flags[0] == "-m" else ["-m", "phases.phase1", *flags]
    return merged([*words, *further])


def losses(folder: Path) -> dict:
    lines = map(json.loads, (folder / "curve.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "log"}


def test_one_rank_writes_and_a_run_resumes_on_another_number_of_ranks(flags, tmp_path):
    alone, run = tmp_path / "alone", tmp_path / "run"
    with (
        ring(tmp_path / "a", command(flags, "--max-steps", 12, "--out", alone)) as one,
        ring(tmp_path / "b", *[command(flags, "--max-steps", 4, "--shard", "optimizer", "--out", run)] * 2) as two,
    ):
        assert one.wait() == [0], one.err(0)
        assert two.wait() == [0, 0], two.err(0)
        assert "2 ranks over ring, each with 2 sequences of a batch and 1/2 of the optimizer's state" in two.out(0)
        assert two.out(1) == two.err(1) == ""
    result = json.loads((run / "result.json").read_text())
    jsonschema.validate(result, json.loads(SCHEMA.read_text()))
    assert (result["ranks"]["count"], result["ranks"]["backend"]) == (2, "ring")
    resumed = ["-m", "phases.phase1", "--resume", run, "--quiet"]
    for name, size, steps in (("c", 1, 8), ("d", 2, 12), ("nothing to do", 2, 12)):
        with ring(tmp_path / name, *[[*resumed, "--max-steps", steps]] * size) as own:
            assert own.wait() == [0] * size, own.err(0)
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    assert json.loads((run / "result.json").read_text())["tokens"] == result["tokens"] * 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            ([], ["--seed", 1]),
            "error: rank 1 has another set of settings and another set of initial weights than rank 0",
        ),
        ((["--batch-size", 3],) * 2, "error: a batch of 3 sequences cannot be divided among 2 ranks"),
        (([], ["--valid", "no_such_file"]), "error: rank 1: "),
    ],
)
def test_bad_input_of_any_rank_is_one_sentence_from_rank_0(changes, sentence, flags, tmp_path):
    out = tmp_path / "run"
    commands = [command(flags, "--quiet", "--max-steps", 4, "--out", out, *own) for own in changes]
    with ring(tmp_path / "ring", *commands) as two:
        assert two.wait() == [2, 2], two.err(0)
        assert two.err(0).startswith(sentence)
        assert len(two.err(0).splitlines()) == 1
        assert two.out(1) == two.err(1) == ""
    assert not out.exists()


def wait_for_checkpoint(folder: Path) -> None:
    until = time.monotonic() + LONGEST
    while not list_checkpoints(folder / "checkpoints"):
        assert time.monotonic() < until, "no checkpoint"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "lost", "says"),
    [
        (signal.SIGKILL, 1, "has ended"),
        (signal.SIGKILL, 0, "has ended"),
        (signal.SIGSTOP, 2, "has not answered for 3 s"),
    ],
    ids=["killed", "first-killed", "stopped"],
)
def test_a_lost_rank_ends_all_with_one_sentence_that_names_it(number, lost, says, flags, tmp_path):
    out, size = tmp_path / "run", 3 if lost == 2 else 2
    endless = ("--quiet", *ENDLESS, "--save-every", 5, "--out", out, "--batch-size", 2 * size)
    with ring(tmp_path / "ring", *[command(flags, *endless)] * size, MLX_TRANSFORMER_RANK_TIMEOUT="3") as own:
        wait_for_checkpoint(out)
        own.processes[lost].send_signal(number)
        left = [rank for rank in range(size) if rank != lost]
        assert [own.processes[rank].wait(LONGEST) for rank in left] == [1] * len(left)
        sentences = [own.err(rank) for rank in left if own.err(rank)]
        assert len(sentences) == 1
        assert re.fullmatch(rf"error: rank {lost} \(.+\) {says}; all ranks end, .*", sentences[0])
    _, state, damaged = load_newest(out / "checkpoints")
    assert state["step"] >= 4
    assert not damaged


def test_ctrl_c_on_any_rank_saves_once(flags, tmp_path):
    out = tmp_path / "run"
    endless = command(flags, *ENDLESS, "--save-every", 100, "--out", out)
    with ring(tmp_path / "ring", endless, endless) as two:
        wait_for_checkpoint(out)
        two.processes[1].send_signal(signal.SIGINT)
        assert two.wait() == [130, 130]
        assert two.err(0).startswith("saved; resume with: ")
        assert two.out(1) == two.err(1) == ""
    result = json.loads((out / "result.json").read_text())
    assert result["stopped"] == "interrupted"
    assert list_checkpoints(out / "checkpoints")[-1].name == f"step_{result['steps']:08d}"
