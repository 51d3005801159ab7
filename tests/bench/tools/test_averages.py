"""Averages compared in one run: the losses are those of a run of its own with the average."""

import json
import random
import sys
from dataclasses import replace

import pytest

from bench.compare.runs import Run
from bench.compare.variants import Variant
from bench.tools import averages
from mlx_transformer.run.settings import Settings
from mlx_transformer.train.trainer import Eval, fit
from tests.faults.runs import merged

TOKENS = 4_000


@pytest.mark.usefixtures("on_cpu")
def test_an_average_has_the_losses_of_a_run_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    rows = [draw.choices(("ba", "do", "ki", "mu", "sel"), k=3) for _ in range(400)]
    (tmp_path / "own.tsv").write_text("".join(f"{' '.join(row)}\t{' '.join(reversed(row))}\n" for row in rows))
    data = {"data": str(tmp_path / "own.tsv"), "device": "cpu", "size": "nano"}
    line = ["averages", "--branch", "translator", "--seeds", 1, "--horizons", 1500, "--max-tokens", TOKENS]
    line += [part for name, value in data.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", merged([*line, "--out", "log.json"]))
    averages.main()
    log = json.loads((tmp_path / "log.json").read_text())
    (found,) = log["runs"]
    run = Run.of(Variant(phase=1, branch="translator"), Settings(**data, max_tokens=TOKENS))
    (ema, name), average = averages.averages([1500]), averages.averages([1500])["last 5 over 1,500"]
    plan = replace(run.plan, recipe=replace(run.plan.recipe, average=average))
    events = fit(plan.make_model(), plan.recipe, plan.tokens, seed=plan.seed, limits=plan.limits)
    losses = [event.valid_loss for event in events if isinstance(event, Eval)]
    assert [one["losses"][name] for one in found["evals"]] == pytest.approx(losses, rel=1e-6)
    assert all(0 <= one["exact_match"] <= 1 for one in found["scores"].values())
    assert [row["name"] for row in log["summary"]] == ["weights", ema, name]
    plain, moving, mean = (row["loss"] for row in log["summary"])
    assert mean != plain == pytest.approx(moving), (
        "an exponential average is over at most a tenth of a run: here one step"
    )
