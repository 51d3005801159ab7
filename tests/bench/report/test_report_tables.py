"""The tables of the pages of results, one function per kind of log."""

from bench.report import tables
from tests.bench.compare.compare_logs import a_log


def test_two_curves_are_compared_where_both_were_evaluated():
    def curve(*losses):
        return [{"kind": "log", "tokens": 5, "loss": 9.0}] + [
            {"kind": "eval", "tokens": 10 * i, "valid_loss": loss} for i, loss in enumerate(losses)
        ]

    rows = tables.apart_table(curve(3.0, 2.0, 1.0), curve(3.25, 1.5)).splitlines()
    assert rows[-1] == "| 2 | 0.5000 | 0.3750 |"


def test_machines_are_sorted_by_speed():
    slow = {"chip": "Old", "backend": "cpu", "memory_bytes": 8 * 2**30, "matmul_gflops": 190.0, "date": "2026-01-01"}
    slow |= {
        "versions": {"mlx": "0.32.4"},
        "sizes": {"nano": {"tokens_per_second": 9e4, "predicted_tokens_per_second": None}},
    }
    run = {"tokens_per_second": 83352.0, "predicted_tokens_per_second": [8e4, 9e4]}
    fast = {**slow, "chip": "Apple M1 Max", "matmul_gflops": 9000.0, "sizes": {"base": run}}
    rows = tables.machines_table([slow, fast]).splitlines()[2:]
    assert rows == [
        "| Apple M1 Max (cpu, 8 GiB) | 9,000 | — | — | 83,352 (80,000–90,000) | 0.32.4, 2026-01-01 |",
        "| Old (cpu, 8 GiB) | 190 | 90,000 | — | — | 0.32.4, 2026-01-01 |",
    ]
    assert tables.machines_table([]) == "None yet."


def test_steps_are_sorted_by_phase_with_the_measured_workers():
    ratio = {"a": "mlx", "b": "torch", "ratio": 2.0, "low": 1.5, "high": 2.5}
    facts = {"blas": "OpenBLAS 0.3 (SkylakeX kernel)"}
    log = {
        "measures": "step",
        "size": "base",
        "batch_size": 8,
        "config": {"seq_len": 64, "dropout": 0.0},
        "ratios": [ratio],
    }
    log["workers"] = {"mlx": {"tokens_per_second": 1234.5, "facts": facts}}
    rows = tables.shapes_table([{**log, "phase": 2}, {**log, "phase": 1}, {"measures": "memory"}]).splitlines()
    assert rows[0] == "| batch | dropout | our BLAS | `mlx`, tokens/s | speedup over `torch` |"
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| phase 1, base, 8 × 64", "| phase 2, base, 8 × 64"]
    assert "phase" not in tables.shapes_table([{**log, "phase": 1}])


def test_rivals_are_summed_up_by_size():
    def log(phase, size, *ratios):
        return {
            "phase": phase,
            "size": size,
            "ratios": [{"b": "torch", **dict(zip(("low", "ratio"), ratios, strict=True))}],
        }

    rows = tables.rivals_table([log(1, "small", 1.1, 1.2), log(2, "small", 0.9, 1.05), log(1, "nano", 0.5, 0.6)])
    assert rows.splitlines()[2:] == [
        "| training step | nano | 1 | `torch` | 0.60–0.60× | 0 of 1 |",
        "| training step | small | 1, 2 | `torch` | 1.05–1.20× | 1 of 2 |",
    ]


def test_what_helped_is_listed_by_verdict():
    ratios = {
        "phase 3/rope": (1.5, 1.4, 1.6),
        "phase 3/glu": (1.0, 0.9, 1.1),
        "phase 3:without_qk_norm": (0.8, 0.7, 0.9),
    }
    log = a_log({"phase 3": (2.4, 9e3, None), **{name: (2.3, 9e3, ratio) for name, ratio in ratios.items()}})
    target = f"{log['speedups'][0]['target_loss']:.3f}"
    assert tables.helped_table(log).splitlines()[2:] == [
        f"| phase 3 with ({log['size']}) | {target} | RoPE 1.50× (1.40–1.60) | GLU | — | — |",
        f"| phase 3 without ({log['size']}) | {target} | — | — | QK norm 0.80× | — |",
    ]
    newer = a_log({"phase 3": (2.4, 9e3, None), "phase 3/rope": (2.3, 9e3, (1.7, 1.6, 1.8))})
    assert "| RoPE 1.70× (1.60–1.80) | GLU |" in tables.helped_table(log, newer)


def test_the_best_tuned_learning_rate_is_bold():
    rates = [{"learning_rate": rate, "median": loss} for rate, loss in ((0.01, 3.1), (0.02, 3.05), (0.04, None))]
    log = {"phase": 6, "size": "nano", "budget_tokens": 600_000, "best": 0.02, "learning_rates": rates}
    assert tables.learning_rate_table(log).splitlines()[2:] == [
        "| phase 6 | nano | 600k | 0.01: 3.1000, **0.02: 3.0500**, 0.04: diverged |"
    ]
    named = tables.learning_rate_table(log | {"branch": "tied", "recipe": "lion"})
    assert named.splitlines()[2].startswith("| phase 6/tied:lion | nano |")


def test_the_tuned_numbers_of_a_phase_are_a_row():
    best = {"learning_rate": 0.004, "embedding": 9.0, "head": 12.0}
    log = {"phase": 2, "size": "nano", "budget_tokens": 960_000, "best": best, "settled": False}
    log["trials"] = [{"median": 3.1}, {"median": 3.05}]
    (row,) = tables.tune_table(log).splitlines()[2:]
    assert row == "| phase 2 | nano | 960k | 0.004 | 9 | 12 | 3.0500 | 3.1000 | 2 | **no** |"


def test_a_sweep_shows_the_fastest_setting_of_each_width():
    setting = {"d_model": 64, "seq_len": 128, "batch_size": 16, "tokens_per_second": 9_999.6}
    setting |= {"matmul_share": 0.512, "peak_bytes": {"forward": 1, "step": 1.5e9}}
    slower = {**setting, "batch_size": 4, "tokens_per_second": 1.0}
    log = {"best": [{"d_model": 64, "seq_len": 128, "batch_size": 16}], "settings": [slower, setting]}
    assert tables.sweep_table(log).splitlines()[2:] == ["| 64 | 16 × 128 | 10,000 | 51% | 1.50 GB |"]


def test_precisions_are_compared_with_float32():
    dtypes = [{"dtype": "float16", "losses": [3.0, 4.0], "above": [0.001, -0.0225]}]
    rows = tables.precision_table({"seeds": [0, 1], "dtypes": dtypes}).splitlines()
    assert rows[2:] == ["| float16 | 3.0000 | 4.0000 | -2.25% |"]


def test_lengths_have_a_row_per_variant():
    done = [
        {"name": "phase 3/rope", "status": "done", "losses": {"64": loss, "128": 3.0}} for loss in (2.0, 2.5, 2.125)
    ]
    log = {"phase": 3, "runs": [*done, {"name": "phase 3/shaw", "status": "diverged"}]}
    assert tables.length_table(log).splitlines() == [
        "| variant | 64 tokens | 128 tokens |",
        "| --- | --- | --- |",
        "| phase 3/rope | 2.125 (2.000–2.500) | 3.000 (3.000–3.000) |",
        "| phase 3/shaw | not measured | not measured |",
    ]


def test_long_contexts_are_shown_by_their_medians():
    done = {"name": "phase 3", "seq_len": 1024, "status": "done", "peak_bytes": {"gradients": 2_000_000_000}}
    done |= {"pass_seconds": {"gradients": [1.0, 3.0, 2.0], "decode": [0.0012]}}
    log = {"settings": [done, {"name": "phase 3/longformer", "seq_len": 2048, "status": "out of memory"}]}
    assert tables.longcontext_table(log).splitlines()[2:] == [
        "| 1,024 | phase 3 | 2.000 | 2,000 | 1.20 |",
        "| 2,048 | phase 3/longformer | out of memory | out of memory | out of memory |",
    ]
