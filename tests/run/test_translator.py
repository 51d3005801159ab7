"""A translator is trained, resumed, saved, asked and evaluated by the commands of every model."""

import json
import random
from pathlib import Path

import jsonschema
import pytest

import mlx_transformer as mt
from mlx_transformer.data.pairs import corpus
from mlx_transformer.run import result
from mlx_transformer.run.commands import evaluate as evaluate_command
from mlx_transformer.utils.errors import BadInput, exit_cleanly
from tests.faults.runs import ON_CPU, assert_bad, assert_same_run, command, generate, train

FLAGS = [*ON_CPU, "--branch", "translator", "--batch-size", 8, "--eval-every", 10, "--learning-rate", 0.01]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Three words in the other order."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("pairs") / "own.tsv"
    rows = [draw.choices(("ba", "do", "ki", "mu", "sel"), k=3) for _ in range(300)]
    path.write_text("".join(f"{' '.join(row)}\t{' '.join(reversed(row))}\n" for row in rows) + "no tab\n")
    return path


@pytest.fixture(scope="module")
def finished(pairs, no_pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    ended = train(*FLAGS, "--vocab-size", 280, "--data", pairs, "--max-steps", 30, "--out", out, "--prompt", "ba do ki")
    assert ended.code == 0, ended.err
    assert "left out: 1 line without a tab" in ended.out
    return out


def test_its_files(finished):
    found = json.loads((finished / "result.json").read_text())
    jsonschema.validate(found, json.loads(Path(result.__file__).with_name("result.schema.json").read_text()))
    assert (found["branch"], found["recipe_name"], found["recipe"]["label_smoothing"]) == ("translator", None, 0.1)
    held_out = found["quality"]["translations"]["held out"]
    assert held_out.keys() >= {"pairs", "exact_match", "chrf", "bleu", "greedy", "by_length"}
    assert held_out["score"] >= held_out["greedy"]["score"]
    assert "exact match, held out" in (finished / "report.md").read_text()
    assert "**ba do ki**" in (finished / "stories.md").read_text()


def test_a_resumed_run_is_the_same(finished, pairs, no_pictures, tmp_path):
    flags = [*FLAGS, "--vocab-size", 280, "--data", pairs, "--out", tmp_path / "run", "--prompt", "ba do ki"]
    assert train(*flags, "--max-steps", 17).code == 0
    assert train("--resume", tmp_path / "run", "--max-steps", 30).code == 0
    assert_same_run(tmp_path / "run", finished)


def test_it_translates(finished):
    model, tokenizer = mt.load(finished)
    asked = generate(finished, "--prompt", "ba do ki", "--prompt", "mu sel ba", "--device", "cpu")
    assert asked.out.splitlines() == [one.text for one in mt.translate(model, tokenizer, ["ba do ki", "mu sel ba"])]
    greedy = generate(finished, "--prompt", "ba do ki", "--beam", 1, "--max-tokens", 2, "--device", "cpu")
    (one,) = mt.translate(model, tokenizer, "ba do ki", beam=1, max_tokens=2)
    assert greedy.out.splitlines() == [one.text]
    long = generate(finished, "--prompt", "ba", "--prompt", "ba do " * 30, "--max-tokens", 2, "--device", "cpu")
    assert long.err == "note: 1 of 2 sentences has more than 24 tokens, the most in training: expect mistakes\n"
    with pytest.raises(BadInput, match="translates and does not continue text"):
        mt.generate(model, tokenizer, "ba")
    with pytest.raises(BadInput, match="has no loss over a text"):
        mt.evaluate(model, tokenizer, __file__)


def test_it_is_evaluated_on_other_pairs(finished, pairs, tmp_path):
    def evaluate(*args):
        return command(lambda: exit_cleanly(evaluate_command.main), finished, "--device", "cpu", *args)

    path = tmp_path / "few.tsv"
    path.write_text("".join(pairs.open().readlines()[:40]))
    ended = evaluate("--data", path, "--json")
    found = json.loads(ended.out)
    assert found["pairs"] == 40
    assert found["tokens"] > 40 * 4
    assert 0 < found["nats_per_token"] < 7
    assert "exact match" in evaluate("--data", path).out
    path.write_text("no tab\n")
    assert_bad(evaluate("--data", path), "has 0 pairs to use (1 line without a tab)", "at least one such line")


def test_it_is_evaluated_on_the_tests_of_the_built_in_pairs(finished, monkeypatch):
    monkeypatch.setattr(corpus, "HELD_OUT", {"valid": 2, "test": 30, "longer": 9})
    monkeypatch.setattr(corpus, "TRAINING_PAIRS", 9)
    main = lambda: exit_cleanly(evaluate_command.main)  # noqa: E731
    ended = command(main, finished, "--device", "cpu", "--data", "pairs", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found.keys() == {"held out", "longer"}
    for pairs, scores in zip((30, 9), found.values(), strict=True):
        for one in (scores, scores["greedy"]):
            assert sum(count for _, count, _ in one["by_length"]) == pairs
            assert sum(kind["pairs"] for kind in one["by_kind"].values()) == pairs
            for kind in one["by_kind"].values():
                assert sum(count for _, count, _ in kind["by_length"]) == kind["pairs"]
    assert found["longer"]["by_kind"].keys() <= {"sentences", "sums"}
    assert (found["longer"]["tokens"], found["longer"]["nats_per_token"]) == (0, None), "all are too long for it"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data", "fables"), "--data fables has no translations"),
        (("--text-column", "x"), "--text-column x goes with .jsonl and .csv"),
        (("--temperature", 0.5), "--temperature 0.5: a translator searches and does not sample"),
        (("--prompt", " "), "prompt ' ' is empty"),
        (("--seq-len", 2), "no training pair has at most 2 tokens on each side"),
    ],
)
def test_bad_input(flags, words, pairs, tmp_path):
    assert_bad(train(*FLAGS, "--vocab-size", 280, "--data", pairs, "--out", tmp_path / "run", *flags), words)
    assert not (tmp_path / "run").exists()


def test_flags_of_the_other_kind(finished):
    assert_bad(generate(finished, "--prompt", "ba", "--top-k", 3), "--top-k 3: a translator searches")
    assert_bad(generate(finished, "--prompt", "ba", "--stream"), "--stream: a translation is searched as a whole")
    assert_bad(generate(finished, "--prompt", " "), "sentence ' ' is empty")
