"""What compare.json says of how a comparison was asked for."""

from dataclasses import fields
from types import SimpleNamespace

import pytest

from bench.compare import command, summary
from bench.compare.record import Comparison, Record
from bench.compare.runs import Finished
from bench.compare.variants import Variant

RECORDED_ELSEWHERE = {"phases", "ablate", "vary", "reference", "seeds", "target", "size", "data", "valid", "device"}
RECORDED_ELSEWHERE |= {"text_column", "max_tokens", "two_budgets", "quick"}
DECIDES_NOTHING = {"plan", "out"}


def a_record(finished, settings, seeds=5, aim=None):
    plan = SimpleNamespace(size="nano", seed=0, settings=SimpleNamespace(to_dict=lambda: settings))
    run = SimpleNamespace(variant=Variant(phase=1), plan=plan)
    run.with_settings = lambda seed: SimpleNamespace(variant=run.variant, plan=SimpleNamespace(seed=seed))
    comparison = Comparison(by_variant=[[run]], seeds=range(seeds), budget=1000, target=aim, shares=(1.0,), quick=False)
    return Record(
        comparison=comparison, machine={}, corpus={}, parameters={}, finished={"phase 1": dict(enumerate(finished))}
    )


def run(status):
    evals = ({"tokens": 1000, "seconds": 1.0, "valid_loss": 2.0},)
    return Finished(
        status=status,
        result={"steps": 1, "tokens": 1000, "recipe": {"batch_tokens": 1000}, "config": {"seq_len": 10}},
        evals=evals,
    )


def document(*statuses, settings=None, **about):
    return a_record([run(status) for status in statuses], settings or {}, **about).document()


def test_the_settings_that_were_given_are_recorded():
    given = {"size": "nano", "data": "text.txt", "seed": 0, "dropout": 0.0, "n_layers": 8, "eval_every": 4}
    assert document(settings=given)["settings"] == {"dropout": 0.0, "n_layers": 8}


def test_every_flag_that_changes_the_experiment_is_in_the_log():
    assert {field.name for field in fields(command.Flags)} - RECORDED_ELSEWHERE - DECIDES_NOTHING == set(
        summary.SETTINGS
    )


@pytest.mark.parametrize(
    ("statuses", "said"),
    [
        (["done"] * 5, "the highest over 5 seeds of phase 1's best"),
        (["done", "diverged", "done", "done", "done"], "the highest over 4 of 5 seeds of phase 1's best"),
        (["done", "done"], "the highest over 2 of 5 seeds of phase 1's best"),
    ],
)
def test_the_rule_counts_the_seeds_that_count(statuses, said):
    assert document(*statuses)["target"]["rule"] == f"{said} validation loss within 1,000 tokens"


def test_the_rule_of_one_seed_and_of_a_target_given():
    assert document("done", seeds=1)["target"]["rule"] == "phase 1's best validation loss within 1,000 tokens"
    assert document("done", aim=2.5)["target"] == {"loss": 2.5, "rule": "given by --target"}
