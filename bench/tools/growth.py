"""Growing a trained model against training the large one from scratch, at equal total compute.

`python -m bench growth --size nano` trains, from each seed, the phase's dense model of the size (`dense`) and two
larger ones, one with experts and one twice as deep (`experts`, `deep`), from scratch and grown (`--init-from`: sparse
upcycling, stacked layers). All spend the floating-point operations that `dense` spends on its budget, by the formula of
bench/workers/passes.py; a grown model's count includes its source's. A source is the constant part of a schedule that
decays over the rest, a share of the compute for each of --shares; the grown model then decays to the end. So all train
by one schedule, and only the moment of growing differs. Its optimizer starts anew. It writes growth.json, a plot, and
the logs of each run in runs/; finished runs are reused, so the same command resumes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import logfile
from bench.compare import tables
from bench.compare.runs import RUNS, Finished, Run, execute, keep_logs
from bench.compare.variants import Variant
from bench.options import BUDGETS, SEEDS, Say, TrainFlags, resumable
from bench.tools import growth_plots
from bench.tools.horizon import ending_at
from bench.workers.machine import describe_machine
from bench.workers.passes import flops_per_token
from bench.workers.process import end_as_by_ctrl_c
from mlx_transformer.nn.config import SIZES
from mlx_transformer.run.flags import Folder, Text, WholeNumber, parse
from mlx_transformer.run.settings import Settings
from mlx_transformer.utils.errors import BadInput, RunFailed
from mlx_transformer.utils.terminal import Terminal

LOG = "growth.json"
SAME = ("size", "phase", "budget_tokens", "compute_flops", "shares", "seeds")  # of two logs of one study
SHARES = (0.3, 0.6)  # of the compute, that the sources take; a phase 6 schedule is constant for 0.3
_EVALUATIONS = 12  # of the dense model; the others are evaluated as often by tokens
_DECAY = 0.7  # share of the compute over which those from scratch decay, as phase 6 does


@dataclass
class Flags(TrainFlags):
    """Train a larger model from scratch and grown from a smaller one, at equal total compute."""

    phase: WholeNumber = None
    """phase with a branch `moe` (default: 6)"""
    shares: Text = None
    """of the compute, that the smaller model takes, with commas (default: 0.3,0.6)"""
    seeds: WholeNumber = None
    """runs of each kind (default: 5)"""
    max_tokens: WholeNumber = None
    """tokens of the dense model; the others have its compute (default: 0.8M at nano, 2M at small, 8M at base)"""
    out: Folder = None
    """the folder of the results (default: results/bench/growth_<size>)"""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A model of the study: a variant, and the settings that make it larger."""

    name: str
    variant: Variant
    changes: dict[str, Any]
    flops: int  # of a token

    def tokens(self, compute: float) -> int:
        """Return the tokens that so many operations pay for."""
        return round(compute / self.flops)


@dataclass(frozen=True, kw_only=True)
class Study:
    """The models, the compute that each may spend, and the text."""

    kinds: dict[str, Kind]
    settings: Settings
    budget: int
    compute: float
    shares: tuple[float, ...]
    seeds: range

    @classmethod
    def read(cls, flags: Flags, say: Say) -> "Study":
        """Read the flags. Raises BadInput for what cannot be trained."""
        shares, size = _shares(flags.shares), flags.choose()
        budget = flags.max_tokens or 2 * BUDGETS[size] // 5
        dense = Variant.read(str(flags.phase or 6))
        settings = flags.settings(size, max_tokens=budget, seed=0)
        kinds: dict[str, Kind] = {}
        larger: tuple[tuple[str, Variant, dict[str, Any]], ...] = (
            ("dense", dense, {}),
            ("experts", Variant.read(f"{dense.phase}/moe"), {}),
            ("deep", dense, {"n_layers": 2 * SIZES[size]["n_layers"]}),
        )
        for name, variant, changes in larger:
            ending_at(variant, size, budget, _DECAY)  # checks the recipe
            run = Run.of(variant, replace(settings, **changes), say if not kinds else lambda text: None)
            flops = flops_per_token(run.plan.make_model())
            settings = replace(settings, eval_every=max(1, budget // _EVALUATIONS // run.step_tokens))
            kinds[name] = Kind(name=name, variant=variant, changes=changes, flops=flops)
        return cls(
            kinds=kinds,
            settings=settings,
            budget=budget,
            compute=float(budget * kinds["dense"].flops),
            shares=shares,
            seeds=range(flags.seeds or SEEDS),
        )

    def plan(
        self, kind: Kind, seed: int, compute: float, decay: float, *, end: int | None = None, source: Path | None = None
    ) -> Run:
        """Return a run that spends so much compute, with the decay over its last share; end: tokens that cut it off."""
        tokens = kind.tokens(compute)
        variant = ending_at(kind.variant, self.settings.size or "", tokens, decay)
        changes: dict[str, Any] = {"seed": seed, "max_tokens": end or tokens, "init_from": source, **kind.changes}
        return Run.of(variant, replace(self.settings, **changes))


def _shares(text: str | None) -> tuple[float, ...]:
    try:
        shares = SHARES if text is None else tuple(float(word) for word in text.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0 < share < 1 for share in shares):
        raise BadInput(f"--shares {text!r}: expected numbers between 0 and 1, with commas, such as 0.3,0.6")
    return shares


def train_seed(study: Study, seed: int, say: Say) -> Iterator[dict[str, Any]]:
    """Train, or find, every run of a seed; yield their rows. Raises RunFailed for a run without a result."""
    for kind in study.kinds.values():
        finished = _train(run := study.plan(kind, seed, study.compute, _DECAY), say)
        yield _row(kind, run, finished, share=None, source=None)
    dense = study.kinds["dense"]
    for share in study.shares:
        cut = round(share * study.budget)
        finished = _train(run := study.plan(dense, seed, study.compute, 1 - share, end=cut), say)
        spent = finished.result["tokens"] * dense.flops if finished.result else 0
        yield _row(dense, run, finished, share=share, source=None)
        for name in ("experts", "deep"):
            kind, folder = study.kinds[name], finished.folder
            grown = study.plan(kind, seed, study.compute - spent, 1.0, source=folder)
            yield _row(kind, grown, _train(grown, say), share=share, source=spent)


def _train(run: Run, say: Say) -> Finished:
    finished = execute(run, say=say)
    if finished.result is None or finished.folder is None:
        raise RunFailed(f"{run.variant.name}, seed {run.plan.seed}: {finished.error}; the same command tries again")
    return finished


def _row(kind: Kind, run: Run, finished: Finished, share: float | None, source: int | None) -> dict[str, Any]:
    """Return a run as the log records it. share: of the compute before growing; source: what was spent by then.

    A source has a share and no `source` itself: the row of a dense model that is grown next.
    """
    assert finished.result is not None
    assert finished.folder is not None
    lines = (finished.folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()
    evals = [one for line in lines if (one := json.loads(line))["kind"] == "eval"]
    return {
        "kind": kind.name,
        "share": share,
        "grown": source is not None,
        "seed": run.plan.seed,
        "status": finished.status,
        "fingerprint": run.fingerprint,
        "flops_per_token": kind.flops,
        "tokens": finished.result["tokens"],
        "spent_before": source or 0,
        "evals": [{key: one[key] for key in ("tokens", "valid_loss")} for one in evals],
    }


def record(study: Study, machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the log."""
    per_seed = len(study.kinds) + 3 * len(study.shares)
    return {
        "schema_version": 2,
        "measures": "growth",
        "complete": len(rows) == per_seed * len(study.seeds),
        "machine": machine,
        "size": study.settings.size,
        "phase": study.kinds["dense"].variant.phase,
        "budget_tokens": study.budget,
        "compute_flops": study.compute,
        "shares": list(study.shares),
        "seeds": list(study.seeds),
        "runs": list(rows),
    }


def main(prog: str = "python -m bench growth", args: list[str] | None = None) -> None:
    """Run the command line."""
    end_as_by_ctrl_c()
    flags = parse(Flags, prog, args=args)
    terminal = Terminal(width=120)
    study = Study.read(flags, terminal.say)
    folder = flags.out or RUNS.parent / f"growth_{study.settings.size}"
    own = record(study, {}, [])
    logfile.check_folder(folder, LOG, {name: own[name] for name in SAME})
    machine, rows = describe_machine(), list[dict[str, Any]]()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with resumable():
            for seed in study.seeds:
                for row in train_seed(study, seed, terminal.say):
                    rows.append(row)
                    logfile.write_log(folder / LOG, log := record(study, machine, rows))
                    label = growth_plots.label(row)
                    keep_logs(
                        Finished(status="done", folder=RUNS / row["fingerprint"]), folder / "runs", f"{label} {seed}"
                    )
                    terminal.say(f"{label}, seed {seed}: {row['evals'][-1]['valid_loss']:.4f}")
        growth_plots.draw(log).write(folder)
    except OSError as error:
        raise RunFailed(f"could not write to '{folder}': {error}; the same command resumes") from error
    terminal.print(tables.on_terminal(growth_plots.table(log)))
    terminal.say(f"written: {folder}")
