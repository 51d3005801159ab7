"""The schema of result.json, report.md, stories.md, loss.png, and atomic writes."""

import copy
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import numpy as np
import pytest

import mlx_transformer
from mlx_transformer.run.report import draw_lengths, draw_loss, write_report, write_stories
from mlx_transformer.train.trainer import Limits
from mlx_transformer.utils.files import atomic_write, write_json

SCHEMA = json.loads((Path(mlx_transformer.__file__).parent / "run" / "result.schema.json").read_text(encoding="utf-8"))
UNIFORM = math.log(4096)


def a_result(**changes):
    result = {
        "schema_version": 2,
        "code": None,
        "phase": 1,
        "branch": None,
        "recipe_name": None,
        "seed": 0,
        "size": "small",
        "device": {"name": "Apple M1 Max", "backend": "metal", "memory_bytes": 64 * 2**30},
        "versions": {"mlx": "0.32.4", "python": "3.11.4", "project": "0.1.0"},
        "corpus": {
            "name": "fables",
            "sha256": "0" * 64,
            "train_tokens": 1_600_000,
            "valid_tokens": 50_000,
            "train_bytes": 5_400_000,
            "valid_bytes": 170_000,
            "floor_bpb": 0.8,
        },
        "tokenizer": {"kind": "bpe", "vocab_size": 4096, "unknown_rate": 0.0},
        "config": {"d_model": 128, "n_layers": 4, "dropout": 0.1},
        "recipe": {
            "kind": "Recipe",
            "learning_rate": 0.001,
            "schedule": {"kind": "InverseSqrt"},
            "groups": [{"name": "all", "optimizer": {"kind": "AdamW", "eps": 1e-9}, "lr_multiplier": 3.0}],
        },
        "parameters": {"total": 1_842_304, "embedding": 1_048_576, "active": 1_842_304},
        "steps": 400,
        "tokens": 3_276_800,
        "epochs": 2.05,
        "train_seconds": 312.4,
        "compile_seconds": 1.2,
        "eval_seconds": 10.5,
        "tokens_per_second": 10_489.1,
        "best_valid_loss": 2.1,
        "best_valid_bpb": 0.9,
        "final_valid_loss": 2.1,
        "target_loss": None,
        "seconds_to_target": None,
        "tokens_to_target": None,
        "peak_memory_bytes": 512 * 2**20,
        "stopped": "plateau",
        "quality": {
            "distinct_1": 0.4,
            "repetition": 0.01,
            "longest_copied_span": 9,
            "longest_copied_text": "once upon a",
        },
    }
    return result | changes


def a_curve(final=2.1, steps=400):
    losses = final + (UNIFORM - final) * np.exp(-np.arange(10, steps + 1, 10) / 60)
    for number, loss in enumerate(losses, 1):
        at = {"step": 10 * number, "tokens": 81_920 * number, "seconds": 0.02 * number**1.5 + 7.5 * number}
        speed = {"tokens_per_second": 10_489.1, "data_wait_share": 0.001}
        yield {"kind": "log", **at, "loss": float(loss) + 0.1, "learning_rate": 1e-3, "grad_norm": 0.5, **speed}
        if number % 5 == 0:
            yield {"kind": "eval", **at, "valid_loss": float(loss), "valid_bpb": float(loss) * 0.9 / 2.1}


STORIES = [
    {"prompt": "Once upon a time", "text": "Once upon a time, there was a *cat*.\n\n# It sat.\n- 1\n1. It!"},
    {"prompt": "", "text": ""},
]


def report(folder, result, curve=(), stories=()):
    limits = Limits(max_steps=400, max_tokens=3_000_000, max_epochs=0.3, max_seconds=240)
    write_report(folder, result, list(curve), list(stories), "python -m phases.phase1", limits)
    return (folder / "report.md").read_text(encoding="utf-8")


def errors_of(result):
    return [error.json_path for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(result)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"branch": "rope", "recipe_name": "original", "stopped": "max_seconds"},
        {"steps": 9, "tokens_per_second": None, "stopped": "max_steps"},
        {"target_loss": 2.5, "stopped": "max_tokens"},
        {"target_loss": 2.5, "seconds_to_target": 100.5, "tokens_to_target": 1_000_000, "stopped": "target"},
        {"best_valid_loss": None, "best_valid_bpb": None, "final_valid_loss": None, "stopped": "diverged"},
        {"tokenizer": {"kind": "word", "vocab_size": 8192, "unknown_rate": 0.02}, "best_valid_bpb": None},
    ],
)
def test_the_schema_accepts_possible_results(changes):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert errors_of(a_result(**changes)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"stopped": "tired"},
        {"surprise": 1},
        {"schema_version": 1},
        {"phase": 7},
        {"seed": "0"},
        {"size": "huge"},
        {"tokens": 1.5},
        {"best_valid_loss": "2.1"},
        {"tokens_per_second": None},
        {"steps": 9},
        {"target_loss": None, "seconds_to_target": 3.0},
        {"target_loss": 2.5, "stopped": "target"},
        {"tokenizer": {"kind": "word", "vocab_size": 8192, "unknown_rate": 0.02}},
        {"corpus": a_result()["corpus"] | {"sha256": "none"}},
        {"corpus": a_result()["corpus"] | {"floor_bpb": "unknown"}},
        {"device": {"name": "Apple M1 Max", "backend": "metal"}},
    ],
)
def test_the_schema_refuses_impossible_results(changes):
    assert errors_of(a_result(**changes)) != []


@pytest.mark.parametrize("key", sorted(a_result()))
def test_every_key_is_required(key):
    result = a_result()
    del result[key]
    assert errors_of(result) == ["$"]


def test_the_report_has_the_figures(tmp_path):
    text = report(tmp_path, a_result(), a_curve(), STORIES)
    for expected in [
        "Phase 1 on fables",
        "1.84M parameters",
        "Apple M1 Max",
        "5 min 12 s",
        "2.100 nats per token",
        "0.900 bits per byte",
        "perplexity 8.2",
        "ln 4,096 = 8.318",
        "12.5 % above",
        "(loss.png)",
        "| parameters | 1,842,304 (1,048,576 in embeddings) |",
        "d_model 128",
        "learning_rate 0.001",
        "| optimizer groups | all: AdamW (eps 1e-09), learning rate × 3 |",
        f"python -m mlx_transformer.generate {tmp_path} --prompt",
    ]:
        assert expected in text
    assert "--resume" not in text
    assert all(line.count("|") == 3 for line in text.splitlines() if line.startswith("|"))


def test_the_report_of_a_model_of_one_s_own(tmp_path):
    code = {"file": "my_idea.py", "sha256": "0" * 64, "files": {}}
    text = report(tmp_path, a_result(code=code, phase=None), a_curve())
    assert "my_idea.py on fables" in text
    assert "None" not in text.split("## Figures")[0]
    assert "--code kept" in text


def test_a_model_worse_than_a_uniform_guess_is_named(tmp_path):
    curve = list(a_curve(final=8.4))
    worse = report(tmp_path, a_result(best_valid_loss=8.4, best_valid_bpb=3.0, final_valid_loss=8.4), curve)
    assert "learned nothing" in worse
    assert "learned nothing" not in report(tmp_path, a_result(), curve)


@pytest.mark.parametrize(
    ("stopped", "command"),
    [
        ("max_steps", "--max-steps 800"),
        ("max_tokens", "--max-tokens 6000000"),
        ("max_epochs", "--max-epochs 0.6"),
        ("max_seconds", "--max-seconds 480"),
        ("interrupted", "--resume"),
    ],
)
def test_a_run_that_stopped_at_a_limit_can_be_resumed_to_twice_its_length(tmp_path, stopped, command):
    folder = tmp_path / "a run"
    folder.mkdir()
    text = report(folder, a_result(stopped=stopped), a_curve())
    assert "its loss still falling" in text
    assert re.search(rf"python -m phases\.phase1 --resume '{folder}'.*", text)[0].count(command) == 1


def test_remarks_name_overfitting_copying_repetition_waiting_and_divergence(tmp_path):
    curve = [
        {"kind": "eval", "step": 5, "tokens": 5, "seconds": 1, "valid_loss": 4.0, "valid_bpb": None},
        {"kind": "log", "step": 10, "tokens": 10, "seconds": 2, "loss": 1.0, "data_wait_share": 0.5},
        {"kind": "log", "step": 11, "tokens": 11, "seconds": 3, "loss": None, "data_wait_share": None},
    ]
    quality = {"longest_copied_span": 30, "longest_copied_text": "once upon", "repetition": 0.5}
    text = report(tmp_path, a_result(stopped="diverged", quality=quality), curve)
    for expected in ["It overfits", "30 words", "repeat themselves", "50.0 % of the training time", "It diverged"]:
        assert expected in text


def test_a_run_that_never_evaluated_can_be_reported(tmp_path):
    nothing = {"best_valid_loss": None, "best_valid_bpb": None, "final_valid_loss": None, "tokens_per_second": None}
    result = a_result(stopped="interrupted", steps=0, tokens=0, epochs=0, train_seconds=0, quality={}, **nothing)
    assert "no finite validation loss" in report(tmp_path, result)
    draw_loss(tmp_path / "loss.png", result, [])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_generated_text_is_escaped(tmp_path):
    figures = {"distinct_1": 0.5, "repetition": None, "longest_copied_span": 2, "longest_copied_text": "a cat"}
    write_stories(tmp_path, STORIES, figures)
    text = (tmp_path / "stories.md").read_text(encoding="utf-8")
    assert "> **Once upon a time**, there was a \\*cat\\*." in text
    assert "> \\# It sat." in text
    assert "> \\- 1" in text
    assert "> 1\\. It!" in text
    assert "> (nothing)" in text
    assert "| distinct words | 50.0 % |" in text
    assert "| longest copied span | 2 words | a cat |" in text


@pytest.mark.parametrize("changes", [{}, {"best_valid_bpb": None}, {"best_valid_loss": 20.0}])
def test_the_picture_is_the_same_each_time_and_in_threads(tmp_path, changes):
    result, curve = (
        a_result(**changes),
        [*a_curve(), {"kind": "log", "step": 401, "tokens": 3_300_000, "loss": math.nan}],
    )
    before = copy.deepcopy(curve)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda path: draw_loss(path, result, curve), paths))
    assert len({path.read_bytes() for path in paths}) == 1
    assert curve == before


def test_a_file_name_with_dollars_is_no_formula(tmp_path):
    result = a_result()
    result["corpus"]["name"] = r"$\costs$.csv"
    draw_loss(tmp_path / "loss.png", result, list(a_curve()))
    assert (tmp_path / "loss.png").stat().st_size


def test_the_picture_shows_the_curve(tmp_path):
    draw_loss(tmp_path / "a.png", a_result(), list(a_curve()))
    draw_loss(tmp_path / "b.png", a_result(), list(a_curve(final=3.0)))
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_the_exact_match_of_a_translator_is_drawn_by_length(tmp_path):
    scores = {"pairs": 9, "exact_match": 0.5, "chrf": None, "bleu": None, "by_length": [[1, 4, 1.0], [5, 5, 0.2]]}
    one = {**scores, "greedy": {**scores, "exact_match": 0.4}}
    quality = {"beam": 4, "translations": {"held out": one, "longer": {**one, "by_length": [[13, 9, 0.1]]}}}
    assert "](lengths.png)" in report(tmp_path, a_result(quality=quality))
    assert "](lengths.png)" not in report(tmp_path, a_result())
    draw_lengths(tmp_path / "lengths.png", a_result(quality=quality))
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_write_json_turns_nan_and_infinity_into_null(tmp_path):
    write_json(tmp_path / "a.json", {"loss": math.nan, "all": [1.5, math.inf, (None, "ä")]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {
        "loss": None,
        "all": [1.5, None, [None, "ä"]],
    }


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = tmp_path / "result.json"
    atomic_write(path, "old\r\n")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, b"new")
    assert os.listdir(tmp_path) == ["result.json"]
    assert path.read_bytes() == b"old\r\n"


def test_atomic_write_replaces_whole(tmp_path):
    path = tmp_path / "a"
    atomic_write(path, b"long before")
    atomic_write(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    assert os.listdir(tmp_path) == ["a"]


def test_the_last_training_loss_is_the_mean_since_the_second_last_evaluation(tmp_path):
    logs = [{"kind": "log", "step": n, "tokens": 100 * n, "seconds": n, "loss": 8.0 - n} for n in range(1, 7)]
    evaluated = [(2, 5.0), (4, 4.0), (6, 4.5)]
    curve = logs + [
        {"kind": "eval", "step": n, "tokens": 100 * n, "seconds": n, "valid_loss": loss, "valid_bpb": None}
        for n, loss in evaluated
    ]
    text = report(tmp_path, a_result(best_valid_loss=4.0, final_valid_loss=4.5), curve)
    assert "2.500 nats in training at the end, 4.500 in validation" in text
    assert "the saved model and the texts are of the best one" in text
    assert "--resume" not in text
