"""Averages of the weights compared: the weights themselves, exponential averages and means of the last snapshots.

`python -m bench averages --phase 1 --branch translator --size nano` trains once from each seed. An average does not
change the training, so that all of them are followed in the same run and evaluated at the same steps: they differ in
nothing else. Each of the given lengths is one of an exponential average and one of the mean of the last 5 snapshots
within it. Of a translator the held-out translations are scored as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten
from rich.table import Table

from bench import logfile
from bench.compare import stats
from bench.compare.runs import RUNS, Run
from bench.compare.variants import DEFAULT, Variant
from bench.options import BUDGETS, SEEDS, TrainFlags, read_numbers
from bench.workers.machine import describe_machine
from mlx_transformer.generate.translation import judge
from mlx_transformer.nn.model import Model
from mlx_transformer.run.flags import File, Text, WholeNumber, parse
from mlx_transformer.run.plan import Plan
from mlx_transformer.train.evaluate import Evaluator, batch_tokens
from mlx_transformer.train.optim import EMA, Average, CheckpointAverage
from mlx_transformer.train.trainer import Eval, RunOptions, Step, Stopped, fit
from mlx_transformer.utils.errors import RunFailed
from mlx_transformer.utils.terminal import Terminal
from mlx_transformer.utils.trees import by_path

WEIGHTS = "weights"  # not averaged
SHARES = (20, 10, 5)  # of the budget: the default lengths of the averages
_JUDGED_PAIRS = 500
_SNAPSHOTS = 5  # of a mean (Vaswani et al. 2017, sec. 6.1)


@dataclass
class Flags(TrainFlags):
    """Compare averages of the weights of one training run per seed."""

    phase: WholeNumber = None
    """phase of the ladder (default: 1)"""
    branch: Text = None
    """one of the phase's branches"""
    recipe: Text = None
    """one of the phase's recipes; its own average is left out"""
    max_tokens: WholeNumber = None
    """tokens of a run (default: 2M at nano, 5M at small, 20M at base)"""
    horizons: Text = None
    """tokens over which the averages reach back, with commas (default: a twentieth, a tenth and a fifth of a run)"""
    seeds: WholeNumber = None
    """runs (default: 5)"""
    out: File = None
    """the JSON log (default: results/bench/averages_phase<n>_<branch>_<size>.json)"""


class Followed:
    """An average of a training run that does not know of it."""

    def __init__(self, average: Average, weights: dict[str, mx.array]) -> None:
        self.average = average
        self.moving, self.snapshots = average.start(weights), average.start_snapshots(weights)

    def step(self, weights: dict[str, mx.array], step_tokens: int, tokens: int) -> None:
        """Take the weights after a step of step_tokens that ended at `tokens`."""
        share = self.average.share(step_tokens, tokens)
        self.moving.update(self.average.after(self.moving, weights, mx.array(share)))
        if self.snapshots and share:
            self.snapshots = self.average.taken(self.snapshots, weights)
        mx.eval(self.moving)

    @property
    def value(self) -> dict[str, mx.array]:
        """The averaged weights; {} before there are any."""
        return self.average.value(self.moving, self.snapshots)


def averages(horizons: Sequence[int]) -> dict[str, Average]:
    """Return the averages by name."""
    found: dict[str, Average] = {f"EMA over {tokens:,}": EMA(horizon_tokens=tokens) for tokens in horizons}
    for tokens in horizons:
        every = max(1, tokens // _SNAPSHOTS)
        found[f"last {_SNAPSHOTS} over {tokens:,}"] = CheckpointAverage(last=_SNAPSHOTS, every_tokens=every)
    return found


def train(plan: Plan, compared: Mapping[str, Average]) -> dict[str, Any]:
    """Train once; return the losses of the weights and of each average at every evaluation, and their scores.

    Raises RunFailed for a run that diverges.
    """
    model = plan.make_model()
    start = by_path(model.trainable_parameters())
    followed = {name: Followed(average, start) for name, average in compared.items()}
    evaluate = Evaluator(model, plan.tokens.validation(plan.config.seq_len, batch_tokens()))
    options, tokens, evals = RunOptions(eval_every=plan.settings.eval_every), 0, []
    weights = start
    recipe = replace(plan.recipe, average=None)
    for event in fit(model, recipe, plan.tokens, seed=plan.seed, limits=plan.limits, options=options):
        if isinstance(event, Step):
            weights = by_path(model.trainable_parameters())
            for one in followed.values():
                one.step(weights, event.tokens - tokens, event.tokens)
            tokens = event.tokens
        elif isinstance(event, Eval):
            losses = {WEIGHTS: event.valid_loss}
            for name, one in followed.items():
                model.update(_tree(one.value or weights))
                losses[name] = evaluate()
            model.update(_tree(weights))
            evals.append({"tokens": event.tokens, "losses": losses})
        elif isinstance(event, Stopped) and event.why == "diverged":
            raise RunFailed(f"seed {plan.seed}: {event.message}")
    values = {WEIGHTS: weights, **{name: one.value or weights for name, one in followed.items()}}
    return {"seed": plan.seed, "evals": evals, "scores": _scores(plan, model, values) if model.parallel else None}


def _tree(weights: dict[str, mx.array]) -> dict[str, Any]:
    return tree_unflatten(list(weights.items()))


def _scores(plan: Plan, model: Model, values: Mapping[str, dict[str, mx.array]]) -> dict[str, dict[str, float]]:
    """Return the exact match of held-out translations, by beam search and greedy."""
    pairs, found = plan.tokens.tests["held out"][:_JUDGED_PAIRS], {}
    for name, weights in values.items():
        model.update(_tree(weights))
        judged = judge(model, plan.tokenizer, pairs)
        found[name] = {"exact_match": judged["exact_match"], "greedy": judged["greedy"]["exact_match"]}
    return found


def record(run: Run, horizons: Sequence[int], machine: Mapping[str, Any], runs: Sequence[Any]) -> dict[str, Any]:
    """Return the log."""
    plan = run.plan
    return {
        "schema_version": 1,
        "measures": "averages",
        "machine": machine,
        "variant": run.variant.name,
        "size": plan.size,
        "corpus": {"name": plan.corpus.name, "sha256": plan.corpus.sha256},
        "max_tokens": plan.limits.max_tokens,
        "horizons": list(horizons),
        "judged_pairs": _JUDGED_PAIRS if plan.kind.parallel else None,
        "runs": list(runs),
        "summary": summarize(runs),
    }


def summarize(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per average: its last losses, their ratio to those of the weights, the median of its scores."""
    last = [run["evals"][-1]["losses"] for run in runs]
    plain, rows = [losses[WEIGHTS] for losses in last], []
    for name in last[0]:
        own, ratio = [losses[name] for losses in last], None
        if name != WEIGHTS and len(runs) >= stats.FEWEST_ROUNDS:
            ratio = vars(stats.ratio_of_medians(np.array(own), np.array(plain)))
        row = {"name": name, "loss": median(own), "ratio": ratio}
        if runs[0]["scores"]:
            row |= {key: median(run["scores"][name][key] for run in runs) for key in ("exact_match", "greedy")}
        rows.append(row)
    return rows


def show(log: Mapping[str, Any]) -> Table:
    """Return a table for people, one row per average."""
    scored = "exact_match" in log["summary"][0]
    title = f"{log['variant']}, {log['size']}, {log['max_tokens']:,} tokens, seeds: {len(log['runs'])}"
    heads = ("average", "loss", "of the weights' loss", *(("exact match", "greedy") if scored else ()))
    table = Table(*heads, title=title, caption="medians; loss: validation, nats per token, at the last evaluation")
    for one in log["summary"]:
        ratio = one["ratio"]
        shown = "" if ratio is None else f"{ratio['value']:.4f} ({ratio['low']:.4f} to {ratio['high']:.4f})"
        scores = [f"{100 * one[key]:.1f} %" for key in ("exact_match", "greedy") if scored]
        table.add_row(one["name"], f"{one['loss']:.4f}", shown, *scores)
    return table


def main(prog: str = "python -m bench averages", args: list[str] | None = None) -> None:
    """Run the command line."""
    flags = parse(Flags, prog, args=args)
    terminal, size = Terminal(width=120), flags.choose("nano")
    budget = flags.max_tokens or BUDGETS[size]
    horizons = read_numbers("--horizons", flags.horizons) or [budget // share for share in SHARES]
    variant = Variant(phase=flags.phase or 1, branch=flags.branch, recipe=flags.recipe or DEFAULT)
    run = Run.of(variant, flags.settings(size, max_tokens=budget), terminal.say)
    name = "_".join(filter(None, (f"phase{variant.phase}", flags.branch, size)))
    out = flags.out or RUNS.parent / f"averages_{name}.json"
    if flags.out is None:
        out.parent.mkdir(parents=True, exist_ok=True)  # an old log of this name is replaced
    else:
        logfile.check_out(out)
    made: list[dict[str, Any]] = []
    for seed in range(flags.seeds or SEEDS):
        made.append(one := train(run.with_settings(seed=seed).plan, averages(horizons)))
        logfile.write_log(out, log := record(run, horizons, describe_machine(), made))
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in one["evals"][-1]["losses"].items())
        terminal.say(f"seed {seed}: {losses}")
    terminal.print(show(log))
    terminal.say(f"written: {out}")
