"""Numbers of ranks measured on this machine, and the scaling predicted from it."""

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from bench.tools import ranks, scaling, step
from bench.tools.scaling import Compute, Job, Link, all_reduce, curve, predict, speedup
from mlx_transformer.utils.errors import BadInput

ROOT = Path(__file__).parent.parent.parent.parent
SCHEMA = Path(ranks.__file__).with_name("ranks.schema.json")
PUBLISHED = sorted((ROOT / "results" / "published" / "distributed").glob("ranks_*.json"))
PREDICTED = sorted((ROOT / "results" / "published" / "distributed").glob("scaling_*.json"))
DOCS = ROOT / "docs" / "distributed.md"
JOB = Job("a job", 64, 128, (8_000_000, 8_000_000, 4_000_000), Compute(0.0, 0.01, "made up"))
LINK = Link("a link", 1e9, 1e-3, "made up")


def test_ranks_are_measured_from_end_to_end(tmp_path, capsys):
    out = tmp_path / "ranks.json"
    line = ["--size", "nano", "--phase", "5", "--batch-size", "4", "--seq-len", "16", "--rounds", "4", "--steps", "1"]
    line += ["--device", "cpu", "--ranks", "1,2"]
    step.main(args=[*line, "--out", str(out)])
    log = json.loads(out.read_text())
    jsonschema.validate(log, json.loads(SCHEMA.read_text()))
    assert list(log["workers"]) == ["1 process", "2 ranks", "1 process, batch / 2"]
    np.testing.assert_allclose(log["losses"]["2 ranks"], log["losses"]["1 process"], rtol=1e-4)
    two = log["workers"]["2 ranks"]
    assert len(two["memory_bytes"]) == 2
    assert two["facts"]["threads"] == 1
    assert two["communication"]["bytes"] > 4 * log["parameters"]
    assert "% of a step" in capsys.readouterr().out
    job = scaling.measured(out)
    assert sum(job.messages) == 4 * log["parameters"]
    with pytest.raises(BadInput, match="is no log of bench step --ranks"):
        scaling.measured(SCHEMA)


def test_numbers_of_ranks_that_cannot_be_measured_are_refused():
    with pytest.raises(BadInput, match="--ranks 3: a batch of 4 sequences cannot be divided"):
        step.main(args=["--size", "nano", "--batch-size", "4", "--device", "cpu", "--ranks", "1,3"])
    with pytest.raises(BadInput, match="--against torch and --ranks 1,2 exclude each other"):
        step.main(args=["--against", "torch", "--ranks", "1,2"])


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_published_logs_fit_the_schema(path):
    jsonschema.validate(json.loads(path.read_text()), json.loads(SCHEMA.read_text()))


def test_the_arithmetic_of_a_prediction():
    assert all_reduce(1e9, LINK, 1) == 0
    assert all_reduce(1e9, LINK, 4) == pytest.approx(1.5 + 6e-3)
    two = predict(JOB, LINK, 2, 32)
    assert two.compute == pytest.approx(0.32)
    assert two.exchange == pytest.approx(0.020 + 3 * 2e-3)
    assert two.exposed == pytest.approx(0.004 + 2e-3)  # the last message alone: the others overlap
    assert speedup(JOB, two) == pytest.approx(0.64 / 0.326)
    assert speedup(JOB, two, overlap=False) == pytest.approx(0.64 / 0.346)
    slow = predict(JOB, Link("slow", 1e6, 0.0, ""), 2, 32)
    first = (1 / 3 + 2 / 3 * 0.4) * 0.32  # the first message is ready, and all travel from then on
    assert slow.exposed == pytest.approx(first + slow.exchange - 0.32)
    assert Compute.through((8, 1.0), (64, 4.5), "") == Compute(0.5, 0.0625, "")


@pytest.mark.parametrize("path", PREDICTED, ids=lambda path: path.name)
def test_the_tables_of_the_docs_are_those_of_the_tool(path):
    log = json.loads(path.read_text())
    job = scaling.job_of(log)
    for network in log["networks"]:
        link = scaling.LINKS[network["name"]]
        assert scaling.markdown(job, link) in DOCS.read_text(encoding="utf-8"), scaling.markdown(job, link)
        assert network["same_batch"][1]["speedup"] == pytest.approx(
            speedup(job, predict(job, link, 2, job.batch_size / 2))
        )
    if (measured := PUBLISHED[0]).stem.replace("ranks_", "scaling_") == path.stem:
        assert scaling.measured(measured).compute.seconds(64) == pytest.approx(job.compute.seconds(64))


def test_no_machine_makes_more_than_itself():
    for same_batch in (True, False):
        for link in scaling.LINKS.values():
            found = [speedup(JOB, one) / one.machines for one in curve(JOB, link, same_batch=same_batch)]
            assert found[0] == pytest.approx(1)
            assert found == sorted(found, reverse=True)
    assert [one.machines for one in curve(Job("", 24, 1, (1,), JOB.compute), LINK, same_batch=True)] == [1, 2, 4, 8]


def test_bandwidths_are_names_or_numbers():
    assert [link.name for link in scaling.read_links("jaccl, 0.5")] == ["jaccl", "0.5 GB/s"]
    for text in ("wifi", "0", "-1", "nan", "thunderbolt,"):
        with pytest.raises(BadInput, match=r"--bandwidth .*: expected some of jaccl, thunderbolt"):
            scaling.read_links(text)


def test_a_prediction_is_marked_and_drawn(tmp_path, capsys):
    out = tmp_path / "scaling.json"
    scaling.main(args=["--phase", "5", "--size", "nano", "--bandwidth", "gigabit", "--out", str(out)])
    text = capsys.readouterr().out
    assert "predicted: phase 5, nano" in text
    assert "predicted for m4-max" in text
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert json.loads(out.read_text())["networks"][0]["same_batch"][0]["speedup"] == pytest.approx(1)
