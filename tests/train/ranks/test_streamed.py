"""A text that is streamed to several ranks: its files, its position in a checkpoint, and a fault."""

import json
from pathlib import Path

import pytest

from mlx_transformer.train.checkpoint import load_newest
from tests.faults.runs import ON_CPU, curve, merged, train, write_text
from tests.train.ranks.rings import ring


def losses(folder: Path) -> dict:
    return {line["step"]: line["loss"] for line in curve(folder) if line["kind"] == "log"}


def test_two_ranks_read_a_streamed_text_and_one_resumes_for_them(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for file in range(6):
        write_text(texts / f"{file}.txt", seed=file)
    flags = ["--batch-size", 4, "--dropout", 0, "--data", texts, "--stream", "--eval-every", 4, "--max-steps", 12]
    command = merged(["-m", "phases.phase1", *ON_CPU, *flags])
    whole, run = tmp_path / "whole", tmp_path / "run"
    with (
        ring(tmp_path / "a", *[[*command, "--out", whole]] * 2) as one,
        ring(tmp_path / "b", *[merged([*command, "--max-steps", 4, "--out", run])] * 2) as two,
    ):
        assert one.wait() == [0, 0], one.err(0)
        assert two.wait() == [0, 0], two.err(0)
        assert "texts is streamed, as requested: 5 files" in one.out(0)
    _, state, _ = load_newest(run / "checkpoints")
    files = [{file for file, _ in lane["files"]} for lane in state["data"]["lanes"]]
    assert len(files) == 2
    assert not files[0] & files[1]
    ended = train("--resume", run, "--max-steps", 12)
    assert ended.code == 0, ended.err
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    assert json.loads((run / "result.json").read_text())["tokens"] == 12 * 4 * 24
