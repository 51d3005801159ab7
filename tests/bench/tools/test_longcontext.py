"""The cost of a long context: what is left out is said, the log is shown and drawn."""

import pytest

from bench.tools import longcontext
from mlx_transformer.utils.errors import BadInput


@pytest.fixture(scope="module")
def log():
    """Two lengths; the longer one has room for the branch alone."""
    settings = {"size": "nano", "device": "cpu", "most_bytes": 2**40}
    rows = longcontext.measure(("trunk", "longformer"), 64, 1, settings, lambda text: None)
    done = {**rows[1], "length": 4096}
    rows += [{"name": "trunk", "length": 4096, "status": "out of memory"}, done]
    return {"size": "nano", "branch": "longformer", "machine": {"device": "a machine"}, "rows": rows}


def test_each_contestant_is_measured_after_a_first_round(log):
    for row, name in zip(log["rows"], ("trunk", "longformer"), strict=False):
        assert (row["name"], row["length"], row["status"]) == (name, 64, "done")
        for key in ("pass_seconds", "peak_bytes", "decode_seconds"):
            assert len(row[key]) == 1
            assert row[key][0] > 0


def test_a_length_without_room_is_said(log):
    table = longcontext.show(log)
    assert list(table.columns[2].cells)[2] == "out of memory"
    assert list(table.columns[0].cells) == ["64", "64", "4,096", "4,096"]


def test_no_room_is_found_before_anything_is_measured():
    row = longcontext.Row(branch=None, size="nano", length=512, device="cpu", most_bytes=10**6)
    facts = row.facts()
    assert not facts["fits"]
    assert facts["predicted_bytes"] > 10**6


def test_the_picture_is_drawn(log, tmp_path):
    longcontext.draw(log, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("flag", "value"), [("--longest", "100"), ("--out", "x.png")])
def test_what_cannot_be_measured_or_kept(flag, value, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["longcontext", "--size", "nano", flag, value])
    with pytest.raises(BadInput, match=f"{flag} {value}: expected"):
        longcontext.main()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
