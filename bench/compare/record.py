"""A comparison as it was asked for, and what is known of it: the makings of compare.json."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from bench.compare import rates, target
from bench.compare.findings import SETTINGS
from bench.compare.plan import Finished, Run, Variant
from bench.compare.target import Rates


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared with what: the first run's contender is the baseline."""

    families: list[list[Run]]  # a contender in MLX, then its references; runs of the first seed
    seeds: range
    budget: int
    target: float | None  # None: auto
    shares: tuple[float, ...]  # of the budget at which speed-ups are given
    quick: bool
    trunk: Variant | None = None  # of an ablation

    @property
    def runs(self) -> list[Run]:
        """One of each contender."""
        return [run for family in self.families for run in family]

    @property
    def baseline(self) -> Variant:
        return self.families[0][0].variant

    def over(self, variant: Variant) -> Variant:
        """What it is compared with: in an ablation the trunk, but for the trunk itself and for what stands alone."""
        if self.trunk is None or variant == self.trunk or variant.is_alone:
            return self.baseline
        return self.trunk

    def all_runs(self) -> list[Run]:
        """Every run, the contenders in turn for each seed, so that a machine's moods fall on all of them alike."""
        return [run.with_settings(seed=seed) for seed in self.seeds for run in self.runs]

    @property
    def identity(self) -> str:
        """Of everything that decides the results."""
        marks = [*(run.fingerprint for run in self.all_runs()), self.budget, self.target, self.shares, self.quick]
        return hashlib.sha256(repr(marks).encode()).hexdigest()[:20]


@dataclass
class Record:
    """What is known so far."""

    comparison: Comparison
    machine: dict[str, Any]
    corpus: dict[str, Any]
    parameters: dict[str, int]  # by contender
    finished: dict[str, dict[int, Finished]]  # by contender and seed
    groups: list[rates.Group] = field(default_factory=list)
    parity: list[dict[str, Any]] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """compare.json, key by key as the schema has it."""
        own = self.comparison
        measured, plan = rates.read(self.groups), own.runs[0].plan
        aim = own.target if own.target is not None else target.target_of(self._over, own.budget)
        return {
            "schema_version": 1,
            "complete": self.is_complete,
            "quick": own.quick,
            "machine": self.machine,
            "size": plan.size,
            "settings": {name: value for name, value in plan.settings.to_dict().items() if name in SETTINGS},
            "corpus": self.corpus,
            "seeds": list(own.seeds),
            "budget_tokens": own.budget,
            "target": {"loss": aim, "rule": self._rule()},
            "runs": [self._row(run) for run in own.all_runs()],
            "rates": rates.rows(self.groups, self.parameters),
            "speed": rates.speed(self.groups, self._pairs()),
            "time_to_target": [
                target.time_to_target(run.variant, known, aim, measured)
                for run in own.runs
                if (known := self._known(run.variant))
            ],
            "speedups": [row for share in own.shares for row in self._speedups(share, aim, measured)],
            "parity": self.parity,
        }

    @property
    def is_complete(self) -> bool:
        """Whether everything that was planned is there: every run, rate and parity."""
        runs = [self.finished[run.variant.name].get(run.plan.seed) for run in self.comparison.all_runs()]
        made = all(one is not None and one.status in ("done", "diverged") for one in runs)
        return made and bool(self.groups) and not self.without_rates() and not self.without_parity()

    def without_rates(self) -> list[list[Run]]:
        """Groups of contenders that ran whose tokens per second are to be measured; none without the baseline."""
        own = self.comparison
        if not self.has_run(own.baseline):
            return []
        families = [[run for run in family if self.has_run(run.variant)] for family in own.families]
        bases = {own.over(run.variant).name for run in own.runs} | {own.baseline.name}
        groups = rates.grouped([family for family in families if family], self.parameters, bases)
        known = {name for group in self.groups for name in group}
        return [runs for runs in groups if not {run.variant.name for run in runs} <= known]

    def without_parity(self) -> list[Run]:
        """Ours of each phase and branch with a reference to be set against it; a quick comparison goes without."""
        known, found = {(row["phase"], row["branch"]) for row in self.parity}, []
        for ours, *references in [] if self.comparison.quick else self.comparison.families:
            key = (ours.variant.phase, ours.variant.branch)
            if references and key not in known:
                known.add(key)
                found.append(ours)
        return found

    def has_run(self, variant: Variant) -> bool:
        """Whether any of its runs came to something."""
        return any(one.result is not None for one in self._known(variant).values())

    @property
    def _over(self) -> target.Runs:
        return self._known(self.comparison.baseline)

    def _known(self, variant: Variant) -> target.Runs:
        return self.finished[variant.name]

    def _rule(self) -> str:
        own = self.comparison
        if own.target is not None:
            return "as --target says"
        used, given = len(target.best_losses(self._over, own.budget)), len(own.seeds)
        count = "" if used == given else f"{used} of "
        highest = f"the highest over {count}{given} seeds of " if given > 1 else ""
        return f"{highest}{own.baseline.name}'s best validation loss within {own.budget:,} tokens"

    def _row(self, run: Run) -> dict[str, Any]:
        own, found = run.variant, self.finished[run.variant.name].get(run.plan.seed, Finished(status="missing"))
        row = {"name": own.name, "phase": own.phase, "branch": own.branch, "recipe": own.recipe, "backend": own.backend}
        row |= {"seed": run.plan.seed, "status": found.status, "result": found.result, "error": found.error}
        return row | {"evals": list(found.evals)}

    def _pairs(self) -> list[tuple[str, str]]:
        """Which tokens per second are set against each other: with the baseline's, and with the reference's."""
        own = self.comparison
        families = [[run.variant for run in family] for family in own.families]
        pairs = [(ours, own.over(ours)) for ours, *_ in families[1:]]
        pairs += [(ours, reference) for ours, *references in families for reference in references]
        return [(a.name, b.name) for a, b in pairs]

    def _speedups(self, share: float, aim: float | None, measured: Rates) -> list[dict[str, Any]]:
        own = self.comparison
        loss = aim if share == 1 else target.target_of(self._over, share * own.budget)
        if loss is None:
            return []
        pairs = [(run.variant, own.over(run.variant)) for run in own.runs[1:]]
        return [
            target.speedup(one, self._known(one), over, self._known(over), share, loss, measured) for one, over in pairs
        ]
