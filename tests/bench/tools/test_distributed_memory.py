"""`python -m bench distributed`: its published logs, and bad input."""

import io
import json
from pathlib import Path

import pytest

from bench.tools import distributed
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.terminal import Terminal

PUBLISHED = Path(__file__).parents[3] / "results" / "published" / "distributed"


def read(name: str) -> dict:
    return json.loads((PUBLISHED / name).read_text())


def shown(table) -> str:
    out = io.StringIO()
    Terminal(width=120, file=out).print(table)
    return out.getvalue()


def test_four_ranks_keep_less_than_one_process():
    log = read("memory.json")
    one, whole, sharded = log["runs"]
    weights = 4 * log["parameters"]["total"]
    assert [row["shard"] for row in log["runs"]] == ["none", "none", "optimizer"]
    assert whole["optimizer_bytes"] == pytest.approx([2 * weights] * 4, rel=1e-3)
    assert sharded["optimizer_bytes"] == pytest.approx([2 * weights / 4] * 4, rel=0.05)
    assert max(sharded["peak_memory_bytes"]) < max(whole["peak_memory_bytes"]) < one["peak_memory_bytes"][0]
    assert "optimizer" in shown(distributed.show_memory(log))


def test_one_rank_cannot_be_left(tmp_path):
    with pytest.raises(BadInput, match="--ranks 1: expected at least 2"):
        distributed.main(args=["kill", "--ranks", "1", "--out", str(tmp_path / "log.json")])
