"""Private words of the project's past stay out of the tree; the field's words stand for them."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Written apart, so that this file does not hold them itself.
OLD = ("conten-ders?", "contes-tants?", "hei-rs?", "times as- soon", "le-nt", "led-ger", "mo-ods")
WORDS = re.compile("|".join(rf"\b{word.replace('-', '')}\b" for word in OLD), re.IGNORECASE)
# Raw logs keep the keys they were written with, which one module reads; in the fables somebody lends a thing.
EXEMPT = (
    "results/published/",
    "bench/report/logs.py",
    "tests/bench/report/test_logs.py",
    "mlx_transformer/data/fables/plots/",
)
SUFFIXES = {".py", ".md", ".html", ".json", ".toml", ".yml", ".cpp", ".ipynb", ""}


def test_no_private_word_is_left():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    assert "README.md" in listed
    found = [
        f"{name}:{number}: {match[0]}"
        for name in filter(None, listed)
        if not name.startswith(EXEMPT) and Path(name).suffix in SUFFIXES and (ROOT / name).is_file()
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        if (match := WORDS.search(line))
    ]
    assert not found, "\n".join(found)
