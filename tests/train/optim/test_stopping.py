"""Rules that end a run early, on curves for which the answer is plain."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.tools.stopping import judge, read
from mlx_transformer.train.optim.stopping import GeneralizationLoss, NoStop, Plateau, SuccessiveRises
from mlx_transformer.utils.errors import BadInput

FALLING = [5.0, 4.0, 3.5, 3.2, 3.1]
OVERFITTING = [5.0, 4.0, 3.0, 3.1, 3.2, 3.4, 3.7]
NOISY = [5.0, 4.0, 4.1, 3.9, 4.05, 3.85, 4.02]
RULES = {
    "plateau": Plateau(patience=3, min_improvement=0.0),
    "generalization loss": GeneralizationLoss(percent=10),
    "rises": SuccessiveRises(times=3),
    "never": NoStop(),
}


def stops_at(rule, losses):
    """The evaluation after which it stops, from 1; None: it does not."""
    return next((n for n in range(1, len(losses) + 1) if rule(losses[:n])), None)


@pytest.mark.parametrize("name", RULES)
def test_each_stops_an_overfitting_run_and_no_other(name):
    found = [stops_at(RULES[name], losses) for losses in (FALLING, OVERFITTING, NOISY)]
    assert found == [None, None if name == "never" else 6, None]


def test_their_numbers_decide():
    assert stops_at(Plateau(patience=2, min_improvement=0.0), OVERFITTING) == 5
    assert stops_at(GeneralizationLoss(percent=4), OVERFITTING) == 5
    assert stops_at(SuccessiveRises(times=1), NOISY) == 3


def test_a_plateau_counts_small_gains_together():
    """Patience counts from the best loss there is, not from the last one that counted."""
    rule = Plateau(patience=5, min_improvement=0.1)
    assert stops_at(rule, [3.0, 2.95, 2.91, 2.85, 2.84, 2.83]) == 6
    assert stops_at(rule, [3.0, 2.95, 2.91, 2.8, 2.84, 2.83]) is None


@given(st.lists(st.floats(0.1, 10), min_size=1), st.sampled_from(list(RULES.values())))
def test_a_new_best_never_stops_but_at_a_plateau(losses, rule):
    losses = [*losses, min(losses) - 0.05]
    assert not rule(losses)


def test_a_rule_is_judged_on_a_whole_curve(tmp_path):
    tokens = [100 * n for n in range(1, 8)]
    lines = [{"kind": "log", "tokens": 50, "loss": 6.0}]
    lines += [{"kind": "eval", "tokens": t, "valid_loss": v} for t, v in zip(tokens, NOISY, strict=True)]
    (tmp_path / "curve.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = read(tmp_path)
    assert curve == (tokens, NOISY)
    early, late = judge(SuccessiveRises(times=1), *curve), judge(NoStop(), *curve)
    assert (early.tokens, early.stopped, early.best) == (300, True, 4.0)
    assert early.given_up == pytest.approx(0.15)
    assert (late.tokens, late.stopped, late.best, late.given_up) == (700, False, 3.85, 0)


@pytest.mark.parametrize("text", [None, "", "{", '{"kind": "log", "tokens": 1}', '{"kind": "eval"}', "[]"])
def test_no_curve_is_bad_input(text, tmp_path):
    if text is not None:
        (tmp_path / "curve.jsonl").write_text(text)
    with pytest.raises(BadInput, match=r"curve\.jsonl"):
        read(tmp_path)
