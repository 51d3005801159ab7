"""Records of the speed run: the product of ratios, and what `bench.record_check` accepts."""

import json
import shutil

import pytest

from bench import record_check
from bench.report import records, tables
from bench.report.placeholder import Logs
from mlx_transformer.utils.errors import exit_cleanly
from tests.bench.compare.compare_logs import a_log
from tests.faults.runs import command

LADDER = {"phase 1": (2.45, 10_000.0, None), "phase 2": (2.2, 9_800.0, (2.0, 1.9, 2.1))}
CLAIM = {"phase 2": (2.2, 9_800.0, None), "phase 6": (2.0, 9_000.0, (1.5, 1.2, 1.8))}


def claimed(**changes):
    log = a_log(CLAIM, **changes)
    for run in log["runs"]:
        run["result"]["preparation_seconds"] = 2.0 if run["name"] == "phase 6" else 0.0
    return log


@pytest.fixture
def published(tmp_path, monkeypatch):
    monkeypatch.setattr(record_check, "PUBLISHED", tmp_path)
    write(tmp_path / "small", a_log(LADDER))
    write(tmp_path / "new", claimed())
    rows = [("phase 1", "small"), ("phase 2", "small")]
    lines = [{"date": "2026-11-27", "idea": f"idea of {name}", "name": name, "log": log} for name, log in rows]
    (tmp_path / records.RECORDS).write_text(json.dumps(lines))
    return tmp_path


def write(folder, log):
    folder.mkdir(exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(log))


def judged(folder):
    return command(lambda: exit_cleanly(record_check.main), folder)


def test_a_record_is_accepted_and_its_ratio_over_the_first_is_a_product(published):
    ended = judged(published / "new")
    assert ended.code == 0, ended
    assert "phase 6 is a record" in ended.out
    history = records.read_records(Logs(published))
    log = json.loads((published / "new/compare.json").read_text())
    history.append(records.Record("2026-11-30", "more", "phase 6", log, "new"))
    _, second, third = records.ratios(history)
    assert second.over_last.value == second.over_first.value == 2.0
    assert (third.over_last.value, third.over_last.low) == (1.5, 1.2)
    assert third.over_first.value == pytest.approx(3.0)
    assert 1.9 * 1.2 < third.over_first.low < third.over_first.high < 2.1 * 1.8
    *_, row = records.history(history, tables.table).splitlines()
    assert all(text in row for text in ("2026-11-30", "`phase 6`", "1.50× (1.20–1.80)", "3.00× (", "2.0 s"))


def test_a_record_of_the_history_is_judged_by_those_before_it(published, monkeypatch):
    rows = json.loads((published / records.RECORDS).read_text())
    rows.append({"date": "2026-11-30", "idea": "more", "name": "phase 6", "log": "new"})
    later = shutil.copytree(published, published / "later")
    (later / records.RECORDS).write_text(json.dumps(rows))
    monkeypatch.setattr(record_check, "PUBLISHED", later)
    assert "phase 6 is a record" in judged(later / "new").out


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"complete": False}, "finished"),
        ({"quick": True}, "finished"),
        ({"size": "nano"}, "size, text"),
        ({"corpus": {"sha256": "1" * 64, "valid_tokens": 51_977, "valid_bytes": 204_416}}, "size, text"),
        ({"settings": {"dropout": 0.0}}, "nothing but the variant"),
        ({"target": {"loss": 3.1, "rule": "given"}}, "first record's target"),
        ({"seeds": 3}, "5 seeds"),
    ],
)
def test_what_a_record_must_meet(change, rule, published):
    write(published / "new", claimed(**change))
    ended = judged(published / "new")
    assert ended.code == 1, ended
    assert "phase 6 is not a record: not met" in ended.err
    assert rule in ended.err


def test_chance_preparation_and_throughput(published):
    log = claimed()
    log["speedups"][-1]["tokens_over_throughput"] |= {"low": 0.9}
    del log["runs"][-1]["result"]["preparation_seconds"]
    log["throughput"] = log["throughput"][:1]
    write(published / "new", log)
    error = judged(published / "new").err
    assert all(text in error for text in ("excludes 1", "preparation is part", "measured interleaved"))


def test_bad_input(published):
    write(published / "other", a_log(LADDER))
    for folder, text in (
        (published / "none", "no compare.json"),
        (published / "other", "nothing with the last record"),
    ):
        ended = judged(folder)
        assert ended.code == 2, ended
        assert text in ended.err
