"""Made-up logs of bench.compare, as compare.json holds them."""

import re

import numpy as np

from bench.compare import summary

BUDGET = 5_000_000


def found(ratio, low, high, verdict=None):
    contains_one = (low or 0) <= 1 <= (high or np.inf)
    judged = "no difference" if contains_one else "faster" if (low or 0) > 1 else "slower"
    return {"ratio": ratio, "low": low, "high": high, "verdict": verdict or judged}


def middle(median, low=None, high=None):
    return {"median": median, "low": low, "high": high}


def a_run(name, seed, *, floor=2.3, speed=10_000.0, status="done"):
    draw = np.random.default_rng([seed, *map(ord, name)])
    tokens = np.arange(1, 21) * BUDGET // 20
    losses = floor + 2.2 * (tokens / 250_000) ** -0.7 + draw.normal(0, 0.01, 20) + 0.02 * seed
    seconds = tokens / speed * draw.uniform(0.97, 1.03)
    keep = {"done": 20, "diverged": 7, "failed": 3, "missing": 0}[status]
    evals = [
        {"tokens": int(t), "seconds": float(s), "valid_loss": float(x)}
        for t, s, x in list(zip(tokens, seconds, losses, strict=True))[:keep]
    ]
    phase, branch = int(re.match(r"phase (\d)", name)[1]), re.search(r"/([^ :]+)", name)
    ran = {
        "phase": phase,
        "code": None,
        "branch": branch and branch[1],
        "recipe": "default",
        "backend": summary.backend(name) or "mlx",
    }
    error = {"failed": "out of memory <at> step 12"}.get(status)
    best = min((one["valid_loss"] for one in evals), default=None)
    result = {
        "best_valid_loss": best,
        "best_valid_bpb": best / 2.726 if best else None,
        "tokens": evals[-1]["tokens"] if evals else 0,
        "train_seconds": evals[-1]["seconds"] if evals else 0.0,
        "stopped": "diverged" if status == "diverged" else "max_tokens",
        "quality": {"distinct_2": 0.81, "repetition": 0.004 * (seed + 1), "stories": 5},
    }
    has_result = status in ("done", "diverged")
    return {
        "name": name,
        **ran,
        "seed": seed,
        "status": status,
        "error": error,
        "evals": evals,
        "result": result if has_result else None,
    }


def a_log(variants=None, seeds=5, **changes):
    """A whole comparison; variants: name -> (loss floor, tokens per second, ratio over the first with its bounds)."""
    variants = variants or {
        "phase 1": (2.45, 10_220.0, None),
        "phase 1 · torch": (2.45, 10_010.0, None),
        "phase 2": (2.2, 9_800.0, (2.31, 1.90, 2.80)),
        "phase 2 · torch": (2.2, 9_650.0, None),
    }
    first = next(iter(variants))
    log = {
        "schema_version": 2,
        "complete": True,
        "quick": False,
        "machine": {
            "device": "Test chip (cpu), 23.5 GiB, OpenBLAS 0.3.34 (Haswell kernel), 2 threads",
            "backend": "cpu",
            "memory_bytes": 25 * 10**9,
            "system": "Linux-6.1-x86_64",
            "threads": 2,
            "versions": {"mlx": "0.32.4", "python": "3.11.7", "project": "0.1.0"},
            "commit": "1320f11",
            "load": [0.1, 0.2, 0.3],
        },
        "size": "small",
        "settings": {},
        "corpus": {
            "name": "tinystories",
            "sha256": "0" * 64,
            "train_tokens": 1_422_681,
            "valid_tokens": 51_977,
            "train_bytes": 5_605_311,
            "valid_bytes": 204_416,
            "floor_bpb": None,
        },
        "seeds": list(range(seeds)),
        "budget_tokens": BUDGET,
        "target": {"loss": 2.82, "rule": f"the highest over {seeds} seeds of phase 1's best validation loss"},
        "runs": [a_run(name, seed, floor=f, speed=s) for name, (f, s, _) in variants.items() for seed in range(seeds)],
        "throughput": [
            {
                "name": name,
                "tokens_per_second": middle(s, 0.98 * s, 1.03 * s),
                "rounds": 8,
                "memory_bytes": int(3e8 + s),
                "parameters": 1_841_664,
            }
            for name, (_, s, _) in variants.items()
        ],
        "speed": [
            {"a": summary.base(name), "b": name, "rounds": 8, **found(1.02, 0.99, 1.05)}
            for name in variants
            if summary.backend(name)
        ],
        "time_to_target": [
            {
                "name": name,
                "phase": 1,
                "code": None,
                "branch": None,
                "recipe": "default",
                "backend": "mlx",
                "reached": seeds,
                "seeds": seeds,
                "clock": middle(151.9, 140.0, 171.0),
                "tokens": middle(1_500_000, 1_250_000, 1_750_000),
                "tokens_over_throughput": middle(150.2, 141.0, 166.0),
            }
            for name in variants
        ],
        "speedups": [
            {
                "name": name,
                "over": first,
                "share_of_budget": share,
                "target_loss": 2.82,
                "clock": found(*(bound and 0.97 * bound for bound in ratio)),
                "tokens": found(*ratio),
                "tokens_over_throughput": found(*ratio),
            }
            for share in (0.5, 1)
            for name, (_, _, ratio) in variants.items()
            if ratio
        ],
        "parity": [
            {
                "phase": 1,
                "branch": None,
                "steps": 200,
                "max_difference": 3.2e-4,
                "differences": [0.0],
                "learning_rate": 3e-4,
                "seed": 0,
            }
        ],
    }
    return {**log, **changes}


def an_ablation():
    names = ["rope", "alibi", "t5_bias", "shaw", "transformer_xl", "gqa", "mqa", "rms_norm", "scale_norm", "no_norm"]
    names += ["silu", "glu", "reglu", "geglu", "swiglu", "longformer", "tied", "post_norm", "learned", "erf_gelu"]
    variants = {"phase 3": (2.3, 9_000.0, None)}
    for i, name in enumerate(names):
        ratio = 1.5 - 0.05 * i
        variants[f"phase 3/{name}"] = (2.15 + 0.02 * i, 9_000.0 - 200 * i, (ratio, 0.93 * ratio, 1.08 * ratio))
    return a_log(variants)


ODD = 'phase 4/<b>&"$x$_|*'


def a_hard_log():
    """All that can go wrong: runs that diverged, failed or are missing, a target not reached, odd names."""
    log = a_log(
        {
            "phase 1": (2.45, 10_220.0, None),
            "phase 2": (2.2, 9_800.0, None),
            "phase 3": (2.6, 9_000.0, None),
            ODD: (2.2, 8_000.0, None),
            "phase 5": (2.2, 8_000.0, None),
        }
    )
    log |= {"complete": False, "quick": True}
    broken = {("phase 2", 3): "diverged", ("phase 2", 4): "failed", (ODD, 4): "missing"} | {
        ("phase 5", seed): "diverged" for seed in range(5)
    }
    log["runs"] = [
        a_run(
            run["name"],
            run["seed"],
            status=broken.get((run["name"], run["seed"]), "done"),
            floor=2.6 if run["name"] == "phase 3" else 2.3,
        )
        for run in log["runs"]
    ]
    log["throughput"] = log["throughput"][:4]
    nothing = middle(None)
    _, two, three, four, five = log["time_to_target"]
    two |= {"reached": 3, "clock": middle(200.0, 150.0, None), "tokens": middle(2_000_000, 1_500_000, None)}
    three |= {"reached": 0, "clock": nothing, "tokens": nothing, "tokens_over_throughput": nothing}
    four |= {"tokens_over_throughput": None}
    five |= {"reached": 0, "clock": nothing, "tokens": nothing, "tokens_over_throughput": None}
    gone = found(None, None, 0.9, "slower")
    fates = {"phase 2": found(1.4, 0.8, None), "phase 3": gone, ODD: found(None, 1.7, None), "phase 5": gone}
    log["speedups"] = [
        {
            "name": name,
            "over": "phase 1",
            "share_of_budget": 1,
            "target_loss": 2.82,
            **dict.fromkeys(summary.MEASURES, fate),
        }
        for name, fate in fates.items()
    ]
    return log
