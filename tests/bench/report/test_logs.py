"""Published logs of schema version 1 and logs of version 2 are read in one form."""

import json

import pytest

from bench.report.logs import migrate, read_log
from mlx_transformer.utils.errors import BadInput
from tests.faults.runs import ROOT

GROUP = {"kind": "Group", "select": {"kind": "Inner"}, "optimizer": {"kind": "AdamW"}, "optional": False}


def test_a_log_of_version_1_gets_the_keys_and_names_of_version_2():
    old = {
        "schema_version": 1,
        "contestants": {"mlx": {"rate": 1.0}},
        "runs": [
            {"name": "phase 6/alone_softcap:phase_5", "phase": 6, "branch": "alone_softcap", "recipe": "phase_5"},
            {"result": {"phase": 2, "recipe": {"groups": [{**GROUP, "rate": 3.0}], "pace": {"kind": "ByTokens"}}}},
        ],
        "speedups": [{"name": "phase 2:alone_ema", "over": "phase 1"}],
        "story": "she stood alone_",
    }
    assert migrate(old) == {
        "schema_version": 2,
        "workers": {"mlx": {"rate": 1.0}},
        "runs": [
            {
                "name": "phase 6/phase_5_with_softcap:phase_5",
                "phase": 6,
                "branch": "phase_5_with_softcap",
                "recipe": "phase_5",
            },
            {"result": {"phase": 2, "recipe": {"groups": [{**GROUP, "lr_multiplier": 3.0}]}}},
        ],
        "speedups": [{"name": "phase 2:phase_1_with_ema", "over": "phase 1"}],
        "story": "she stood alone_",
    }


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/published/**/*.json")), ids=lambda path: str(path)[-40:])
def test_published_logs_migrate_once(path):
    log = read_log(path)
    assert migrate(log) == log
    assert "alone_" not in json.dumps({**log, "runs": []} if "runs" in log else log)


def test_a_log_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(BadInput, match=r"'bad\.json' is not valid JSON"):
        read_log(tmp_path / "bad.json")


def test_a_log_of_long_contexts_becomes_one_of_a_sweep():
    done = {"name": "trunk", "length": 256, "status": "done", "pass_seconds": [1.0], "peak_bytes": [3, 5, 4]}
    full = {"name": "longformer", "length": 512, "status": "out of memory"}
    old = {"schema_version": 1, "measures": "longcontext", "phase": 3, "size": "small"}
    assert migrate(old | {"rows": [done | {"decode_seconds": [0.1]}, full]})["settings"] == [
        {
            "name": "phase 3",
            "d_model": 128,
            "seq_len": 256,
            "batch_size": 1,
            "status": "done",
            "pass_seconds": {"gradients": [1.0], "decode": [0.1]},
            "peak_bytes": {"gradients": 4},
        },
        {"name": "phase 3/longformer", "d_model": 128, "seq_len": 512, "batch_size": 1, "status": "out of memory"},
    ]
