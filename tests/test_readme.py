"""README's code runs as it stands: the library tour, and the idea in a file of one's own outside the repository."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.runs import write_text

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


def run(folder, *command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_library_tour(tmp_path):
    (block,) = [text for text in BLOCKS if "mt.fit" in text]
    shorter = block.replace("stories=2000", "stories=200").replace("max_steps=100", "max_steps=10")
    out = run(tmp_path, "-c", shorter)
    assert "nats per token" in out
    assert "Evaluation(tokens=" in out
    assert "Once upon a time" in out


@pytest.fixture(scope="module")
def idea(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idea")
    (block,) = [text for text in BLOCKS if "mt.main(__name__)" in text]
    (folder / "my_idea.py").write_text(block)
    write_text(folder / "text.txt")
    run(
        folder,
        "my_idea.py",
        *["--size", "nano", "--floor", "0.2", "--max-steps", "12", "--data", "text.txt", "--out", "run"],
    )
    return folder


def test_your_idea_trains_and_generates(idea):
    line = ["-m", "mlx_transformer", "generate", "run", "--prompt", "Once", "--max-tokens", "5", "--code"]
    assert run(idea, *line, "my_idea.py").startswith("Once")
    assert run(idea, *line, "kept").startswith("Once")


def test_your_idea_is_shown_against_its_phase(idea):
    shown = run(idea, *["-m", "phases.show", "--diff", "5", "my_idea.py"])
    assert "FlooredGLU" in shown
    assert "floor" in shown
