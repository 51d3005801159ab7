"""A comparison, the results so far, and compare.json made of them."""

import functools
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from bench.compare import target, throughput
from bench.compare.runs import MISSING, Finished, Run
from bench.compare.summary import SETTINGS
from bench.compare.target import Throughput
from bench.compare.variants import Variant

_STATED = ("seed", "max_tokens", "size")  # settings that a comparison states itself


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The variants, seeds and budget of a comparison; the first variant is the baseline."""

    by_variant: list[list[Run]]  # each variant in MLX, then in the reference's backends; runs of the first seed
    seeds: range
    budget: int
    target: float | None  # None: auto
    shares: tuple[float, ...]  # of the budget, at which speedups are given
    quick: bool
    ablated: Variant | None = None  # the phase of an ablation

    @property
    def runs(self) -> list[Run]:
        """One run of each variant and backend."""
        return [run for runs in self.by_variant for run in runs]

    @property
    def baseline(self) -> Variant:
        """The variant that the others are compared with."""
        return self.by_variant[0][0].variant

    def over(self, variant: Variant) -> Variant:
        """Return the baseline of a variant: in an ablation the phase, or the previous one for what adds to that."""
        if self.ablated is None or variant == self.ablated or variant.adds_to_previous:
            return self.baseline
        return self.ablated

    def all_runs(self) -> list[Run]:
        """Every run, the variants interleaved within a seed, so that load drift affects all of them alike."""
        return [run.with_settings(seed=seed) for seed in self.seeds for run in self.runs]

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the results, by the name that a person knows it by."""
        plan = self.runs[0].plan
        settings = {name: value for name, value in plan.settings.to_dict().items() if name not in _STATED}
        fingerprints = [run.fingerprint for run in self.all_runs()]
        parts = {
            "variants": [run.variant.name for run in self.runs],
            "seeds": len(self.seeds),
            "budget in tokens": self.budget,
            "target loss": self.target,
            "shares of the budget": list(self.shares),
            "quick": self.quick,
            "size": plan.size,
            **{name.replace("_", " "): value for name, value in settings.items()},
            "text": plan.corpus.sha256,
            "code, machine or versions": hashlib.sha256(repr(fingerprints).encode()).hexdigest()[:20],
        }
        return json.loads(json.dumps(parts, default=str))  # as a file has it


@dataclass
class Record:
    """The results so far."""

    comparison: Comparison
    machine: dict[str, Any]
    corpus: dict[str, Any]
    parameters: dict[str, int]  # by variant
    finished: dict[str, dict[int, Finished]]  # by variant and seed
    groups: list[throughput.Group] = field(default_factory=list)
    parity: list[dict[str, Any]] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Return compare.json, key by key as the schema has it."""
        own = self.comparison
        measured, plan = throughput.read(self.groups), own.runs[0].plan
        aim = own.target if own.target is not None else target.target_of(self._baseline_runs, own.budget)
        return {
            "schema_version": 2,
            "complete": self.is_complete,
            "quick": own.quick,
            "machine": self.machine,
            "size": plan.size,
            "settings": {name: value for name, value in plan.settings.to_dict().items() if name in SETTINGS},
            "corpus": self.corpus,
            "seeds": list(own.seeds),
            "budget_tokens": own.budget,
            "clock_excludes": ["compilation", "validation", "saving"],
            "target": {"loss": aim, "rule": self._rule()},
            "runs": [self._row(run) for run in own.all_runs()],
            "throughput": throughput.rows(self.groups, self.parameters),
            "speed": throughput.speed(self.groups, self._pairs()),
            "time_to_target": [
                target.time_to_target(run.variant, known, aim, measured)
                for run in own.runs
                if (known := self.finished[run.variant.name])
            ],
            "speedups": [row for share in own.shares for row in self._speedups(share, aim, measured)],
            "parity": self.parity,
        }

    @property
    def is_complete(self) -> bool:
        """Whether everything that was planned is there: every run, throughput and parity."""
        found = [self.finished[run.variant.name].get(run.plan.seed) for run in self.comparison.all_runs()]
        made = all(one is not None and one.status in ("done", "diverged") for one in found)
        return made and bool(self.groups) and not self.without_throughput() and not self.without_parity()

    def without_throughput(self) -> list[list[Run]]:
        """Groups of variants with runs whose throughput is to be measured; none without the baseline."""
        own = self.comparison
        if not self.has_run(own.baseline):
            return []
        with_runs = [[run for run in runs if self.has_run(run.variant)] for runs in own.by_variant]
        bases = {own.over(run.variant).name for run in own.runs} | {own.baseline.name}
        groups = throughput.grouped([runs for runs in with_runs if runs], self.parameters, bases)
        known = {name for group in self.groups for name in group}
        return [runs for runs in groups if not {run.variant.name for run in runs} <= known]

    def without_parity(self) -> list[Run]:
        """The run in MLX of each phase and branch with a reference to check; none in a quick comparison."""
        known, missing = {(row["phase"], row["branch"]) for row in self.parity}, []
        for ours, *references in [] if self.comparison.quick else self.comparison.by_variant:
            key = (ours.variant.phase, ours.variant.branch)
            if references and key not in known:
                known.add(key)
                missing.append(ours)
        return missing

    def has_run(self, variant: Variant) -> bool:
        """Whether any of its runs has a result."""
        return any(run.result is not None for run in self.finished[variant.name].values())

    @property
    def _baseline_runs(self) -> target.Runs:
        return self.finished[self.comparison.baseline.name]

    def _rule(self) -> str:
        own = self.comparison
        if own.target is not None:
            return "given by --target"
        used, planned = len(target.best_losses(self._baseline_runs, own.budget)), len(own.seeds)
        count = "" if used == planned else f"{used} of "
        highest = f"the highest over {count}{planned} seeds of " if planned > 1 else ""
        return f"{highest}{own.baseline.name}'s best validation loss within {own.budget:,} tokens"

    def _row(self, run: Run) -> dict[str, Any]:
        finished = self.finished[run.variant.name].get(run.plan.seed, MISSING)
        row = {**run.variant.describe(), "seed": run.plan.seed, "status": finished.status}
        return row | {"result": finished.result, "error": finished.error, "evals": list(finished.evals)}

    def _pairs(self) -> list[tuple[str, str]]:
        """Pairs to compare in throughput: a variant with its baseline, and MLX with each reference."""
        own = self.comparison
        by_variant = [[run.variant for run in runs] for runs in own.by_variant]
        pairs = [(ours, own.over(ours)) for ours, *_ in by_variant[1:]]
        pairs += [(ours, reference) for ours, *references in by_variant for reference in references]
        return [(a.name, b.name) for a, b in pairs]

    def _speedups(self, share: float, aim: float | None, measured: Throughput) -> list[dict[str, Any]]:
        own = self.comparison
        loss = aim if share == 1 else target.target_of(self._baseline_runs, share * own.budget)
        if loss is None:
            return []
        pairs = [(run.variant, own.over(run.variant)) for run in own.runs[1:]]
        return [
            target.speedup(one, self.finished[one.name], over, self.finished[over.name], share, loss, measured)
            for one, over in pairs
        ]
