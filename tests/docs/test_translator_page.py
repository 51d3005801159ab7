"""The figures of docs/translator.md are those of the published logs."""

import json

from tests.faults.runs import ROOT

LOGS, PAGE = ROOT / "results/published/translator_nano", (ROOT / "docs/translator.md").read_text(encoding="utf-8")


def share(value):
    return f"{100 * value:.1f} %"


def row(*cells):
    return f"| {' | '.join(cells)} |"


def test_the_tables_are_those_of_the_logs():
    scores, result = (json.loads((LOGS / name).read_text()) for name in ("scores.json", "result.json"))
    for test, one in scores.items():
        greedy = one["greedy"]
        figures = [share(one["exact_match"]), share(greedy["exact_match"]), f"{one['chrf']:.2f}", f"{one['bleu']:.2f}"]
        assert row(test, *figures, f"{one['score']:.4f}", f"{greedy['score']:.4f}") in PAGE
        assert one["score"] >= greedy["score"]
        for kind, own in one["by_kind"].items():
            own_greedy = greedy["by_kind"][kind]["exact_match"]
            assert row(test, kind, f"{own['pairs']:,}", share(own["exact_match"]), share(own_greedy)) in PAGE
        for words, pairs, right in one["by_kind"]["sentences"]["by_length"]:
            assert row(test, f"{words}-{words + 3}", f"{pairs:,}", share(right)) in PAGE
    assert scores["held out"]["exact_match"] >= 0.98
    assert f"{result['tokens']:,} tokens" in PAGE
    assert f"{result['train_seconds']:.0f} s" in PAGE
    assert f"{result['tokens_per_second']:,.0f} tokens/s" in PAGE
    assert f"{result['parameters']['total']:,} parameters" in PAGE


def test_the_table_of_averages_is_that_of_the_log():
    log = json.loads((LOGS / "averages.json").read_text())
    for one in log["summary"]:
        ratio = one["ratio"]
        of_weights = "" if ratio is None else f"{ratio['value']:.4f} ({ratio['low']:.4f} to {ratio['high']:.4f})"
        assert (
            row(one["name"], f"{one['loss']:.4f}", of_weights, share(one["exact_match"]), share(one["greedy"])) in PAGE
        )
