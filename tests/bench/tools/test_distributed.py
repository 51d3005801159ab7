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


@pytest.mark.parametrize("name", sorted({"kills.json", *(path.name for path in PUBLISHED.glob("kills*.json"))}))
def test_a_killed_run_loses_nothing(name):
    log = read(name)
    assert len(log["moments"]) == 10
    for moment in log["moments"]:
        assert moment["said"].startswith("error: ") or (moment["rank"], moment["said"]) == (0, "")
        assert moment["same_number_of_ranks"]["losses_are_equal"]
        assert moment["same_number_of_ranks"]["weights_are_equal"]
        assert moment["other_number_of_ranks"]["largest_relative_difference"] < 1e-5
    assert shown(distributed.show_kills(log)).count("bit for bit") == 10


def test_one_rank_cannot_be_left(tmp_path):
    with pytest.raises(BadInput, match="--ranks 1: expected at least 2"):
        distributed.main(args=["kill", "--ranks", "1", "--out", str(tmp_path / "log.json")])
