"""run compare: what differs between runs, what came of each, and one picture."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from mlx_transformer.run.compare import RunRecord, draw_curves, results_table, settings_table
from mlx_transformer.utils.errors import BadInput
from tests.faults.runs import assert_bad, list_runs


def a_run(folder, d_ff, losses, finished=True):
    folder.mkdir()
    settings = {"phase": 1, "config": {"d_ff": d_ff}, "recipe": {"clip": {"kind": "GlobalNorm", "max": 1}}}
    (folder / "settings.json").write_text(json.dumps({**settings, "flags": {"d_ff": d_ff, "top_k": d_ff, "seed": 1}}))
    result = {"best_valid_loss": min(losses), "tokens": 100, "train_seconds": 2.0, "stopped": "max_steps"}
    if finished:
        (folder / "result.json").write_text(json.dumps(result))
    lines = [
        {"kind": "eval", "step": i, "tokens": 10 * i, "seconds": i, "valid_loss": x} for i, x in enumerate(losses, 1)
    ]
    (folder / "curve.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    return RunRecord.read(folder)


def shown(table):
    out = io.StringIO()
    Console(file=out, width=200).print(table)
    return out.getvalue()


def test_only_what_differs_is_shown_and_the_best_run_comes_first(tmp_path):
    runs = [a_run(tmp_path / "worse[x]", 8, [3.0, 2.5]), a_run(tmp_path / "better", 16, [3.0, 2.0])]
    settings, results = shown(settings_table(runs)), shown(results_table(runs))
    assert "config.d_ff" in settings
    assert not any(same in settings for same in ("recipe.clip", "top_k", "seed", "│ d_ff"))
    assert "worse[x]" in settings
    assert results.index("better") < results.index("worse[x]")
    draw_curves(tmp_path / "out.png", runs)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_run_compares_too(tmp_path):
    runs = [a_run(tmp_path / "a", 8, [3.0]), a_run(tmp_path / "b", 8, [2.0, 1.0], finished=False)]
    assert shown(settings_table(runs)).count("│") == 0
    unfinished, finished = (line for line in shown(results_table(runs)).splitlines() if str(tmp_path) in line)
    assert [cell.strip() for cell in unfinished.split("│")[2:-1]] == ["1.0000", "", "20", "2.0", "", "", "unfinished"]
    assert "max_steps" in finished


def test_no_run_and_no_curve_are_one_sentence_each(tmp_path):
    with pytest.raises(BadInput, match="is no run"):
        RunRecord.read(tmp_path)
    run = a_run(tmp_path / "a", 8, [1.0])
    with pytest.raises(BadInput, match="no curve to draw"):
        draw_curves(tmp_path / "out.png", [replace(run, curve=[])])


def test_the_command_prints_both_tables_and_names_the_picture(tmp_path):
    a_run(tmp_path / "worse[x]", 8, [3.0, 2.5])
    a_run(tmp_path / "better", 16, [3.0, 2.0], finished=False)
    picture = tmp_path / "new" / "curves.png"
    ended = list_runs("compare", tmp_path / "worse[x]", tmp_path / "better", "--out", picture)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.index("config.d_ff") < ended.out.index("2.5000") < ended.out.index(f"picture: {picture}")
    assert ended.out.count(f"{tmp_path}/worse[x]") == 2
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_the_command_cannot_compare(tmp_path):
    a_run(tmp_path / "a", 8, [3.0])
    a_run(tmp_path / "b", 8, [3.0])
    both = ("compare", tmp_path / "a", tmp_path / "b")
    assert_bad(list_runs("compare"), "fewer than two")
    assert_bad(list_runs("compare", tmp_path / "a"), "fewer than two")
    assert_bad(list_runs("compare", tmp_path / "a", tmp_path), "is no run")
    assert_bad(list_runs(*both, "--out", tmp_path / "x.pdf"), ".png")
    assert_bad(list_runs(*both, "--out", tmp_path / "a" / "result.json" / "x.png"), "cannot be written")
    for damaged in ('{"best_valid_loss": "low", "stopped": "plateau"}', "{}", "no JSON"):
        (tmp_path / "b" / "result.json").write_text(damaged)
        assert_bad(list_runs(*both), "is damaged")
