"""Runs on a task: trained, scored, saved, evaluated, resumed; and what does not go with a task."""

import json

import jsonschema
import pytest

from mlx_transformer import __main__ as entry
from mlx_transformer.data.tasks import TASKS
from mlx_transformer.generate import scoring
from mlx_transformer.nn.patches import Patched
from mlx_transformer.run import task as run_task
from mlx_transformer.run import training
from mlx_transformer.run.ladder import find_phase
from mlx_transformer.run.saved import load, save
from tests.faults.runs import ROOT, assert_bad, assert_same_run, command, merged, result

NUMBERS = {"size": "nano", "d-model": 16, "n-layers": 1, "n-heads": 2, "d-ff": 32, "batch-size": 4, "max-steps": 4}
FLAGS = [*(part for name, value in NUMBERS.items() for part in (f"--{name}", value)), "--eval-every", 2, "--quiet"]


@pytest.fixture(scope="module", autouse=True)
def short(tmp_path_factory):
    """Generate and score a few texts of each task, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_TRANSFORMER_CACHE", str(tmp_path_factory.mktemp("cache")))
        for task in TASKS.values():
            patch.setattr(type(task), "train_examples", 200)
        patch.setattr(run_task, "_SCORED_EXAMPLES", 4)
        patch.setattr(scoring.Scorer.__init__, "__kwdefaults__", {"examples": 4, "trained_only": False})
        patch.setattr(scoring.score, "__kwdefaults__", {"examples": 4})
        yield


def train(phase, *args):
    return command(lambda: training.main(find_phase(phase)), *merged([*FLAGS, *args]))


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    out = tmp_path_factory.mktemp("sums") / "run"
    assert train(5, "--data", "task:sums", "--seq-len", 24, "--out", out).code == 0
    return out


def test_the_score_is_in_every_file_of_a_run(sums):
    found = result(sums)
    schema = json.loads((ROOT / "mlx_transformer" / "run" / "result.schema.json").read_text())
    jsonschema.validate(json.loads((sums / "result.json").read_text()), schema)
    score = found["quality"]["task"]
    levels = score["levels"]
    assert score["task"] == "sums"
    assert [level["level"] for level in levels] == ["2 digits", "3 digits", "4 digits", "5 digits, longer"]
    evaluated = [json.loads(line) for line in (sums / "curve.jsonl").read_text().splitlines() if '"eval"' in line]
    assert len(evaluated) == 2
    assert all(0 <= line["accuracy, 2 digits"] <= 1 and 0 <= line["accuracy"] <= 1 for line in evaluated)
    assert (found["best_valid_bpb"], found["tokenizer"]["kind"], [*found["quality"]]) == (None, "symbols", ["task"])
    report = (sums / "report.md").read_text()
    assert "## Score" in report
    assert "| 4 digits | yes | 16 | 0.0 % |" in report
    assert (sums / "loss.png").stat().st_size > 10_000


def test_evaluate_prints_the_score_by_level(sums):
    shown = command(entry.main, "evaluate", sums, "--data", "task:sums")
    assert shown.code == 0, shown.err
    assert "5 digits, longer" in shown.out
    found = json.loads(command(entry.main, "evaluate", sums, "--data", "task:sums", "--json").out)
    assert found == result(sums)["quality"]["task"]


def test_a_saved_run_generates_and_refuses_words_that_are_no_symbols(sums):
    model, tokenizer = load(sums)
    written = command(entry.main, "generate", sums, "--prompt", "1 2 + 3 4 =", "--max-tokens", 3, "--temperature", 0)
    assert written.out.startswith("1 2 + 3 4 = ")
    assert model.config.vocab_size == tokenizer.vocab_size == 14
    assert_bad(command(entry.main, "generate", sums, "--prompt", "Once"), "'Once' is no symbol of task:sums")


def test_a_stopped_run_resumes_to_the_same_run(sums, tmp_path):
    out = tmp_path / "run"
    flags = ["--data", "task:sums", "--seq-len", 24]
    assert train(5, *flags, "--max-steps", 2, "--out", out).code == 0
    again = command(lambda: training.main(find_phase(5)), "--resume", out, "--max-steps", 4, "--quiet")
    assert again.code == 0, again.err
    assert_same_run(out, sums)


@pytest.mark.parametrize(
    ("phase", "branch", "name"), [(6, ["--branch", "ngram_expert"], "scenes"), (1, [], "calculator"), (3, [], "recall")]
)
def test_other_tasks_train_with_other_phases(phase, branch, name, tmp_path, no_pictures):
    out = tmp_path / "run"
    ended = train(phase, *branch, "--data", f"task:{name}", "--out", out, "--max-steps", 2)
    assert ended.code == 0, ended.err
    assert result(out)["tokens"] == 2 * 4 * 64
    model, tokenizer = load(out)
    assert isinstance(model, Patched) == (name == "scenes")
    save(tmp_path / "saved", model, tokenizer)
    assert type(load(tmp_path / "saved")[0]) is type(model)
    assert "**" in (out / "stories.md").read_text()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--data", "task:sum"], "task:sum is no task: expected one of task:recall, task:copying"),
        (["--data", "task:sums", "--valid", "x.txt"], "--valid x.txt goes with a text; task:sums is generated"),
        (["--data", "task:sums", "--stories", 9], "--stories 9 goes with a text; task:sums is generated"),
        (["--data", "task:sums", "--tokenizer", "word"], "--tokenizer word goes with a text; task:sums has its own"),
        (["--data", "task:sums", "--vocab-size", 99], "--vocab-size 99 goes with a text; task:sums has its own"),
        (["--data", "task:sums", "--seq-len", 12], "--seq-len 12 is too short for an example of task:sums"),
        (["--data", "task:sums", "--branch", "translator"], "task:sums: a translator trains on pairs"),
        (["--data", "task:recall", "--prompt", "Once"], "'Once' is no symbol of task:recall"),
    ],
)
def test_what_does_not_fit_is_one_sentence(args, words, tmp_path):
    assert_bad(train(1, *args, "--out", tmp_path / "run"), words)
    assert not (tmp_path / "run").exists()


def test_a_run_of_a_text_has_no_score_and_starts_no_task(sums, tmp_path, text, no_pictures):
    assert_bad(
        train(5, "--init-from", sums, "--data", "task:recall", "--out", tmp_path / "a"), "a tokenizer of its own"
    )
    assert_bad(command(entry.main, "evaluate", sums, "--data", "task:recall"), "this one was trained on task:sums")
    assert_bad(command(entry.main, "evaluate", sums, "--data", text), "is no symbol of task:sums")
    assert_bad(command(entry.main, "evaluate", sums, "--data", "task:no"), "task:no is no task")
