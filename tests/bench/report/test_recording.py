"""The recording of a run: what a terminal showed, and when, becomes a small animated GIF."""

import json

import pytest

from bench.report import recording
from mlx_transformer.utils.errors import RunFailed
from tests.faults.runs import ROOT

pytest.importorskip("pyte", reason="the extra docs is not installed")
PRINTING = "print(f'\\r\\033[32mstep {i}\\033[0m', end='', flush=True)"
COUNT = f'python -c "import time; [({PRINTING}, time.sleep(0.7)) for i in range(3)]"'


def text(lines):
    return ["".join(letter for letter, _ in line).rstrip() for line in lines]


def test_a_command_is_recorded_and_drawn(tmp_path):
    head, *events = cast = recording.record(COUNT)
    assert (head["version"], head["title"]) == (2, COUNT)
    assert [one for _, _, one in events][-1].endswith("step 2\033[0m")
    assert 0.5 < events[-1][0] < 60
    stays, screens = zip(*recording.screens(cast), strict=True)
    assert text(screens[-1])[0].startswith("$ python -c")
    assert "step 2" in text(screens[-1])
    assert all(recording._SHORTEST <= stay <= recording.LAST_STAYS for stay in stays)
    recording.draw(json.loads(json.dumps(cast)), tmp_path / "run.gif")
    assert (tmp_path / "run.gif").read_bytes().startswith(b"GIF89a")
    with pytest.raises(RunFailed, match="exit code 3"):
        recording.record('python -c "raise SystemExit(3)"')


def test_the_published_recording_is_small():
    assert 20_000 < (ROOT / "docs/img/run.gif").stat().st_size < 500_000
