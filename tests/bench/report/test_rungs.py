"""The table of branches by axis, and that of the cost of a length."""

from bench.report import rungs
from tests.bench.compare.compare_logs import a_log, found


def test_a_branch_is_marked_where_it_ranks_best():
    names = ("phase 4", "phase 4/linear", "phase 4/loser")
    log = a_log({names[0]: (2.2, 9e3, None), names[1]: (2.5, 8e3, None), names[2]: (2.6, 7e3, None)})
    log["speed"] = [
        {"a": a, "b": names[0], "rounds": 8, **found(r, r - 0.01, r + 0.01)}
        for a, r in zip(names[1:], (0.9, 0.7), strict=True)
    ]
    bytes_of = {names[0]: 520, names[1]: 1, names[2]: 520}
    footprint = {
        "rows": [
            {"name": n, "step_bytes": 10**7, "cache_bytes": {"64": 1, "8192": 8192 * b}} for n, b in bytes_of.items()
        ]
    }
    level = {"level": "64 pairs, 4x length", "accuracy": 0.5}
    tasks = {"names": names[:1], "runs": [{"name": names[0], "task": "recall", "accuracy": 1.0, "levels": [level]}]}
    head, _, phase, linear, loser = rungs.axes_table(log, footprint, tasks).splitlines()
    assert head.startswith("| variant | final loss (nats per token) | relative throughput |")
    assert "| **1** |" in phase
    assert phase.endswith("| **50** | — |")
    assert "| **1.0** | not measured | decode memory |" in linear
    assert loser.endswith("| nothing |")


def test_a_length_is_costed_at_the_longest_with_its_slope():
    def sweep(name, **measured):
        own = {"name": name, "seq_len": 256, "status": "done", "peak_bytes": {"step": 2e6}, **measured}
        return {"settings": [own, own | {"seq_len": 512}]}

    log = {
        "sweeps": {
            "step": sweep("phase 4", pass_seconds={"step": [0.02]}),
            "decode": sweep("phase 4", pass_seconds={"decode": [0.001]}, decoding_bytes=4000),
        },
        "slopes": {
            "phase 4": {
                m: {"all": 1.0, "last": 1.5} for m in ("step seconds", "step bytes", "decode seconds", "decode bytes")
            }
        },
    }
    assert rungs.length_cost_table(log).splitlines()[-1] == (
        "| phase 4 | 20 ms | 1.50 | 2.0 MB | 1.50 | 1.00 ms | 1.50 | 4 kB | 1.50 |"
    )
