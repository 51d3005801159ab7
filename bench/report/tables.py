"""The tables of the pages of results, one function per kind of log, as Markdown."""

import functools
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.compare import summary, tables
from bench.report import findings, rungs
from bench.report.placeholder import write_ratio
from bench.tools import floor
from bench.tools.tune import NAMES
from mlx_transformer.run.plots import short
from mlx_transformer.run.report import escaped

_SIZES = {"nano": 0, "small": 1, "base": 2}
_RIVALS = ("torch", "torch-compile", "torch-installed")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def step_table(log: Mapping[str, Any]) -> str:
    """Table of a log of `bench step`: throughput of a training step by worker."""
    ratios = {one["b"]: write_ratio(one) for one in log["ratios"]}
    rows = [
        (f"`{name}`", f"{one['tokens_per_second']:,.0f}", ratios.get(name, "")) for name, one in log["workers"].items()
    ]
    return table(("worker", "tokens/s", "speedup of `mlx`"), rows)


def shapes_table(logs: Sequence[Mapping[str, Any]]) -> str:
    """Table of several logs of `bench step`: speedup over PyTorch and the share of the GEMMs, one row per log."""
    steps = sorted((log for log in logs if log["measures"] == "step"), key=_order)
    phases = {log["phase"] for log in steps}
    ratios = [{one["b"]: one for one in log["ratios"]} for log in steps]
    rivals = [name for name in _RIVALS if any(name in own for own in ratios)]
    gemm = any("gemm" in own for own in ratios)
    rows = []
    for log, own in zip(steps, ratios, strict=True):
        against = [write_ratio(own[name]) if name in own else "" for name in rivals]
        if gemm:
            against.append(f"{own['gemm']['ratio']:.0%}" if "gemm" in own else "")
        phase = f"phase {log['phase']}, " if len(phases) > 1 else ""
        shape = f"{phase}{log['size']}, {log['batch_size']} × {log['config']['seq_len']}"
        ours = f"{log['workers']['mlx']['tokens_per_second']:,.0f}"
        rows.append((shape, f"{log['config']['dropout']:g}", _kernel(log), ours, *against))
    head = ("batch", "dropout", "our BLAS", "`mlx`, tokens/s", *(f"speedup over `{name}`" for name in rivals))
    return table((*head, "GEMMs, share of the step") if gemm else head, rows)


def _order(log: Mapping[str, Any]) -> tuple[Any, ...]:
    config = log["config"]
    return (log["phase"], _SIZES[log["size"]], _kernel(log), config["dropout"], config["seq_len"], log["batch_size"])


def _kernel(log: Mapping[str, Any]) -> str:
    """Return the kernel of the BLAS, such as "Haswell" of "OpenBLAS 0.3.34 (Haswell kernel)"."""
    found = re.search(r"\((.+) kernel\)", log["workers"]["mlx"]["facts"]["blas"] or "")
    return found[1] if found else "—"


def decode_table(log: Mapping[str, Any]) -> str:
    """Table of a log of `bench decode`: throughput of decoding by batch size."""
    against = [one["b"] for one in log["batches"][0]["ratios"]]
    rows = [
        (
            f"{part['batch']}",
            *(f"{one['tokens_per_second']:,.0f}" for name, one in part["workers"].items() if name == "mlx"),
            *map(write_ratio, part["ratios"]),
        )
        for part in log["batches"]
    ]
    return table(("batch", "`mlx`, tokens/s", *(f"speedup over `{name}`" for name in against)), rows)


def decodes_table(logs: Sequence[Mapping[str, Any]]) -> str:
    """Table of several logs of `bench decode`: throughput and speedup over PyTorch, one row per log and batch size."""
    ordered = sorted(logs, key=lambda log: (log["phase"], _SIZES[log["size"]]))
    parts = [(log, part) for log in ordered for part in log["batches"]]
    rivals = list(dict.fromkeys(one["b"] for _, part in parts for one in part["ratios"]))
    rows = []
    for log, part in parts:
        ratios = {one["b"]: write_ratio(one) for one in part["ratios"]}
        ours = f"{part['workers']['mlx']['tokens_per_second']:,.0f}"
        rows.append(
            (f"phase {log['phase']}, {log['size']}", f"{part['batch']}", ours, *(ratios.get(b, "") for b in rivals))
        )
    return table(("model", "prompts", "`mlx`, tokens/s", *(f"speedup over `{name}`" for name in rivals)), rows)


def baselines_table(text: str, *results: Mapping[str, Any]) -> str:
    """Table of the output of `bench baselines` and of runs on the same text."""
    rows = re.findall(r"^(\S+(?: \S+)*) {2,}([\d.]+) +([\d.]+)$", text, re.MULTILINE)
    rows += [
        (f"**{describe(one)}**", f"**{one['best_valid_loss']:.4f}**", f"**{one['best_valid_bpb']:.4f}**")
        for one in results
    ]
    return table(("model", "nats per token", "bits per byte"), rows)


def apart_table(*curves: Sequence[Mapping[str, Any]]) -> str:
    """Table of the difference between the validation losses of two curve.jsonl, at equal tokens."""
    ours, theirs = ({one["tokens"]: one["valid_loss"] for one in lines if one["kind"] == "eval"} for lines in curves)
    apart = [abs(loss - theirs[tokens]) for tokens, loss in ours.items() if tokens in theirs]
    head = ("evaluations", "largest difference (nats)", "median difference (nats)")
    return table(head, [(f"{len(apart)}", f"{max(apart):.4f}", f"{statistics.median(apart):.4f}")])


def tune_table(*logs: Mapping[str, Any]) -> str:
    """Table of logs of `bench tune`: each phase's best learning rate and multipliers, its loss with them and before."""
    rows = []
    for log in logs:
        best = log["best"] or dict.fromkeys(NAMES, math.nan)
        loss = min((one["median"] for one in log["trials"] if one["median"] is not None), default=None)
        numbers = [f"{best[name]:g}" for name in NAMES]
        settled = "yes" if log["settled"] else "**no**"
        row = (
            _tuned(log),
            log["size"],
            short(log["budget_tokens"]),
            *numbers,
            _loss(loss),
            _loss(log["trials"][0]["median"]),
            f"{len(log['trials'])}",
            settled,
        )
        rows.append(row)
    head = (
        "phase",
        "size",
        "tokens per run",
        "learning rate",
        "× embedding",
        "× head",
        "loss (nats)",
        "before",
        "trials",
        "settled",
    )
    return table(head, rows)


def _tuned(log: Mapping[str, Any]) -> str:
    branch = f"/{log['branch']}" if log.get("branch") else ""
    recipe = f":{log['recipe']}" if log.get("recipe", "default") != "default" else ""
    return f"phase {log['phase']}{branch}{recipe}"


def learning_rate_table(*logs: Mapping[str, Any]) -> str:
    """Table of older logs of `bench tune`, of the learning rate alone: each with its median loss, the best in bold."""
    rows = []
    for log in logs:
        tried = (f"{one['learning_rate']:g}: {_loss(one['median'])}" for one in log["learning_rates"])
        marked = (
            f"**{text}**" if one["learning_rate"] == log["best"] else text
            for text, one in zip(tried, log["learning_rates"], strict=True)
        )
        rows.append((_tuned(log), log["size"], short(log["budget_tokens"]), ", ".join(marked)))
    return table(
        ("phase", "size", "tokens per run", "learning rate: median of the best validation losses (nats)"), rows
    )


def _loss(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4f}"


def sweep_table(log: Mapping[str, Any]) -> str:
    """Table of a log of `bench sweep`: the fastest setting of each width."""
    rows = []
    for best in log["best"]:
        one = next(one for one in log["settings"] if best.items() <= one.items())
        rate, share = f"{one['tokens_per_second']:,.0f}", f"{one['matmul_share']:.0%}"
        memory = f"{one['peak_bytes']['step'] / 1e9:.2f} GB"
        rows.append((f"{one['d_model']}", f"{one['batch_size']} × {one['seq_len']}", rate, share, memory))
    return table(("width", "fastest batch", "tokens/s", "share of matmul throughput", "peak memory"), rows)


def precision_table(log: Mapping[str, Any]) -> str:
    """Table of a log of `bench precision`: validation loss by dtype, and the largest difference from float32."""
    rows = [
        (one["dtype"], *(f"{loss:.4f}" for loss in one["losses"]), f"{max(one['above'], key=abs):+.2%}")
        for one in log["dtypes"]
    ]
    return table(("dtype", *(f"seed {seed}" for seed in log["seeds"]), "largest difference from float32"), rows)


def length_table(log: Mapping[str, Any]) -> str:
    """Table of a log of `bench length`: nats per token at each length, median and range over the seeds."""
    done = [run for run in log["runs"] if run["status"] == "done"]
    lengths = list(done[0]["losses"])
    rows = [
        (
            name,
            *(tables.spread([run["losses"][n] for run in done if run["name"] == name], ".3f").text for n in lengths),
        )
        for name in dict.fromkeys(run["name"] for run in log["runs"])
    ]
    return table(("variant", *(f"{length} tokens" for length in lengths)), rows)


def longcontext_table(log: Mapping[str, Any]) -> str:
    """Table of a log of `bench sweep` with passes gradients and decode: time and memory by sequence length."""
    rows = []
    for one in log["settings"]:
        cells = [one["status"]] * 3
        if one["status"] == "done":
            seconds, token = (statistics.median(one["pass_seconds"][name]) for name in ("gradients", "decode"))
            cells = [f"{seconds:.3f}", f"{one['peak_bytes']['gradients'] / 1e6:,.0f}", f"{token * 1e3:.2f}"]
        rows.append((f"{one['seq_len']:,}", one["name"], *cells))
    return table(("length", "variant", "forward and backward (s)", "peak memory (MB)", "decoding a token (ms)"), rows)


def machines_table(machines: Sequence[Mapping[str, Any]]) -> str:
    """Table of files of `bench machine`: throughput of phase 1 by machine, fastest first."""
    sizes = ("nano", "small", "base")
    fastest = sorted(machines, key=lambda one: -one["matmul_gflops"])
    rows = [
        (
            f"{one['chip']} ({one['backend']}, {one['memory_bytes'] / 2**30:.0f} GiB)",
            f"{one['matmul_gflops']:,.0f}",
            *(_rate(one["sizes"].get(size)) for size in sizes),
            f"{one['versions']['mlx']}, {one['date']}",
        )
        for one in fastest
    ]
    head = ("machine", "matmul GFLOP/s", *(f"{size}, tokens/s (predicted)" for size in sizes), "MLX, date")
    return table(head, rows) if rows else "None yet."


def _rate(run: Mapping[str, Any] | None) -> str:
    """Format the measured throughput at one size and, in brackets, the prediction of `bench roofline`."""
    if run is None or run["tokens_per_second"] is None:
        return "—"
    predicted = run["predicted_tokens_per_second"]
    return f"{run['tokens_per_second']:,.0f}" + (" ({:,.0f}–{:,.0f})".format(*predicted) if predicted else "")


def describe(result: Mapping[str, Any]) -> str:
    """Describe a run in a few words: phase 1, batch 16 × 128, 600 s, 6.14M tokens."""
    name = f"phase {result['phase']}" + (f"/{result['branch']}" if result["branch"] else "")
    length = result["config"]["seq_len"]
    batch_size = result["recipe"]["batch_tokens"] // length
    return f"{name}, batch {batch_size} × {length}, {result['train_seconds']:.0f} s, {short(result['tokens'])} tokens"


def compare_table(log: Mapping[str, Any]) -> str:
    """Headline, remarks and main tables of a compare.json."""
    remarks = "\n".join(f"- {escaped(remark)}" for remark in summary.remarks(log))
    parts = [escaped(" ".join(summary.headline(log))), remarks]
    for make in tables.ON_A_TERMINAL:
        found = make(log)
        parts += [f"**{found.title}.**", tables.markdown(found)] if found.rows else []
    return "\n\n".join(part for part in parts if part)


_VERDICTS = ("faster", "no difference", "slower", "not reached")


def helped_table(*logs: Mapping[str, Any]) -> str:
    """Table of what helped and what did not, from ablations: a row per baseline and kind of change, by verdict.

    A variant that is in several logs with the same target is shown as the last one measured it.
    """
    groups: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for log in logs:
        key = summary.headline_measure(log)
        for row in summary.ladder(log):
            if (kind := findings.change_of(row["name"])[0]) and "original" not in row["name"]:
                group = (f"{row['over']} {kind} ({log['size']})", f"{row['target_loss']:.3f}")
                groups.setdefault(group, {})[row["name"]] = row[key]
    rows = [(*group, *(_listed(found, verdict) for verdict in _VERDICTS)) for group, found in groups.items()]
    head = ("change", "target (nats)", "faster to the target", "no difference", "slower", "target not reached")
    return table(head, rows)


def _listed(speedups: Mapping[str, Mapping[str, Any]], verdict: str) -> str:
    """List the variants with a verdict, the fastest first."""
    found = [(name, speedup) for name, speedup in speedups.items() if summary.verdict(speedup) == verdict]
    found.sort(key=lambda one: -(one[1]["ratio"] or 0))
    shown = [
        findings.change_of(name)[1]
        + (f" {summary.ratio(speedup).text}" if verdict == "faster" else "")
        + (f" {speedup['ratio']:.2f}×" if verdict == "slower" else "")
        for name, speedup in found
    ]
    return ", ".join(shown) or "—"


def rivals_table(logs: Sequence[Mapping[str, Any]]) -> str:
    """Table of logs of `bench step` or `bench decode`: the range of the speedups over PyTorch by size."""
    rows = []
    for size in _SIZES:
        own = [log for log in logs if log["size"] == size]
        parts = [(log, part) for log in own for part in log.get("batches", [log])]
        for rival in _RIVALS:
            found = [one for _, part in parts for one in part["ratios"] if one["b"] == rival]
            if found:
                values = sorted(one["ratio"] for one in found)
                faster = sum((one["low"] or 0) > 1 for one in found)
                prompts = " and ".join(f"{n}" for n in sorted({part["batch"] for _, part in parts if "batch" in part}))
                what = f"decoding, {prompts} prompts" if prompts else "training step"
                phases = ", ".join(str(phase) for phase in sorted({log["phase"] for log in own}))
                rows.append(
                    (
                        what,
                        size,
                        phases,
                        f"`{rival}`",
                        f"{values[0]:.2f}–{values[-1]:.2f}×",
                        f"{faster} of {len(found)}",
                    )
                )
    return table(("what", "size", "phases", "against", "speedup", "faster"), rows)


def _one_table(make: Callable[[Mapping[str, Any]], tables.Table], log: Mapping[str, Any]) -> str:
    """A single table of a log."""
    return tables.markdown(make(log))


TABLES: dict[str, Callable[..., str]] = {
    "step": step_table,
    "shapes": shapes_table,
    "decode": decode_table,
    "decodes": decodes_table,
    "baselines": baselines_table,
    "helped": helped_table,
    "rivals": rivals_table,
    "apart": apart_table,
    "tune": tune_table,
    "learning_rates": learning_rate_table,
    "sweep": sweep_table,
    "precision": precision_table,
    "length": length_table,
    "longcontext": longcontext_table,
    "machines": machines_table,
    "compare": compare_table,
    "fables": functools.partial(_one_table, floor.table),
    "bindings": functools.partial(_one_table, floor.bindings),
    **rungs.TABLES,
    **{make.__name__: functools.partial(_one_table, make) for make in (*tables.ALL, tables.ideas)},
}
