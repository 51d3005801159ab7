"""Every code block of README and docs runs, or the flags of its commands are checked against their parser.

Python blocks run as they stand, those of a page in order. A command runs if no rule of NOT_RUN names it: trainings with
a tiny model and three steps, everything else as it stands. tests/test_readme.py runs the code of README itself.
"""

import contextlib
import io
import re
import runpy
import shlex
from importlib import import_module
from pathlib import Path
from unittest import mock

import mlx.core as mx
import pytest

from bench.compare.variants import read_variants
from mlx_transformer.run import training
from mlx_transformer.run.ladder import Experiment, find_phase
from mlx_transformer.run.settings import settings_type
from mlx_transformer.utils.errors import BadInput
from tests.faults.runs import ROOT, TINY, command, merged, write_text

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "results").glob("*.md")])
MACHINE, RANKS = "sets up a machine: .ci/run does it on a clean clone", "starts ranks: tests/train/ranks does it"
NOT_RUN = {  # what a command looks like -> why it is not run; the first that fits; the flags of ours are checked
    r"(make|source|cd|git|caffeinate|jupyter|apt|dnf|brew|pip|\.venv/bin/pip|ssh-copy-id) ": MACHINE,
    r"python -m (pytest|http\.server) ": MACHINE,
    r"mlx\.": RANKS,
    r"\S+\.py ": "a file of one's own: tests/test_readme.py runs it",
    r".*--code ": "a file of one's own: tests/test_readme.py runs it",
    r"python -m bench(\.| \w)": "minutes: tests/bench runs each tool with small models",
    r"python -m phases\.phase\d(?!.* --size nano .*--out )": "minutes: runs with --size nano and --out are made",
    r"python -m mlx_transformer serve": "runs until Ctrl-C: tests/run has its own test",
    r"python -m mlx_transformer\S* (import|export)": "tests/interop converts models of both kinds, in both directions",
}
SMALL = [*TINY, "--max-steps", "3", "--quiet"]
DROPPED = {"--max-seconds", "--max-tokens", "--max-epochs", "--size", "--prompt"}  # of a training that is made small

_PYTHON = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
_SHELL = re.compile(r"^```(?:bash|sh|shell|console)\n(.*?)^```", re.M | re.S)
_INDENTED = re.compile(r"(?:^ {4,}\S.*\n|(?<=\n)\n(?= {4}))+", re.M)
_PROGRAMS = r"python3?|make|source|cd|git|pip|apt|dnf|brew|caffeinate|jupyter|ssh-copy-id|mlx\.\w+|\.venv/bin/\w+"
_COMMAND = re.compile(rf"([A-Z_]+=\S+ )*({_PROGRAMS})( |$)")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def commands(text):
    """Return the commands of a page: the lines of its shell blocks, without what only a person reads."""
    text = re.sub(r"^```(?!bash|sh|shell|console).*?^```", "", text, flags=re.M | re.S)
    blocks = [match[1] for match in _SHELL.finditer(text)]
    blocks += [match[0] for match in _INDENTED.finditer(_SHELL.sub("", text))]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        if _COMMAND.match(line) and "->" not in line:
            line = re.sub(r"^([A-Z_]+=\S+ +)+", "", re.split(r" +#| {3,}(?=[^\s-])", line)[0])
            yield from (part.strip() for part in line.split("&&"))


def words_of(line):
    """Return the words behind `python`; none where that is not the program."""
    words = shlex.split(line.replace("<", "").replace(">", "").replace(" ... ", " "))
    return words[words.index("python") + 1 :] if "python" in words else []


class Parsed(BaseException):
    """Raised in place of what a command does once its flags are read."""


def check_flags(words):
    """Read the flags of one of our commands by its own parser. Raises BadInput where it has no such flag or name."""
    if words[0].endswith(".py"):
        return _check_training(Experiment.of_file(Path(words[0]).name), words[1:])
    module, rest = words[1], words[2:]
    if not rest or {"--help", "--help-all"} & set(rest):
        return None
    if phase := re.fullmatch(r"phases\.phase(\d)", module):
        return _check_training(Experiment.of_phase(int(phase[1])), rest)
    tyro_cli = import_module("tyro").cli

    def stop(*args, **options):
        raise Parsed(tyro_cli(*args, **options))

    ended = None
    with mock.patch("tyro.cli", stop):
        try:
            ended = command(main_of(module), *rest)
        except Parsed as parsed:
            (flags,) = parsed.args
            variants = map(str, getattr(flags, "phases", None) or ())
            if named := [one for one in variants if not re.fullmatch("[A-Z]+", one)]:  # NEW stands for a variant
                read_variants(tuple(named))
            return None
    raise BadInput(f"{ended}")


def _check_training(experiment, rest):
    from mlx_transformer.run.flags import parse

    settings = parse(settings_type(experiment), experiment.command, args=rest)
    experiment.find_branch(settings.branch)
    if settings.recipe:
        experiment.find_recipe(settings.recipe)


def main_of(module):
    """Return the body of `python -m MODULE`."""
    if phase := re.fullmatch(r"phases\.phase(\d)", module):
        return lambda: training.main(find_phase(int(phase[1])))
    return lambda: runpy.run_module(module, run_name="__main__")


def made_small(words, folder):
    """Return the words of a training with a tiny model and a small text."""
    rest, kept = iter(words[2:]), []
    for word in rest:
        if word in DROPPED:
            next(rest)
        else:
            kept.append(word)
    text = "pairs.tsv" if "translator" in kept else "text.txt"
    return [*words[:2], *merged([*kept, *SMALL, "--data", str(folder / text)])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder with the files that the commands name."""
    folder = tmp_path_factory.mktemp("blocks")
    write_text(folder / "text.txt")
    (folder / "pairs.tsv").write_text("".join(f"one {i}\t{i} un\n" for i in range(100)))
    (folder / "results").mkdir()
    (folder / "held_out.txt").write_text("Once upon a time there was a fox.\n<|endoftext|>\nThe end.\n")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = [text for text in _PYTHON.findall(readme) if "mt.main(__name__)" in text]
    (folder / "my_idea.py").write_text(block)
    return folder


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "README.md" and _PYTHON.search(page.read_text())], ids=name_of
)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, names = io.StringIO(), {"__name__": "block"}
    with contextlib.redirect_stdout(out):
        for block in _PYTHON.findall(page.read_text(encoding="utf-8")):
            exec(compile(block, str(page), "exec"), names)
    assert out.getvalue().strip(), "the blocks of a page print something"


def test_commands_run_or_their_flags_are_checked(folder, monkeypatch, no_pictures):
    monkeypatch.chdir(folder)
    found = [(name_of(page), line) for page in PAGES for line in commands(page.read_text(encoding="utf-8"))]
    assert len(found) > 50
    seen, wrong = set(), []
    for page, line in found:
        if line in seen:
            continue
        seen.add(line)
        why = next((why for pattern, why in NOT_RUN.items() if re.match(pattern, f"{line} ")), None)
        words = words_of(line)
        if not words or why == MACHINE:
            assert why, f"{page}: {line}: no rule says what this is"
            continue
        try:
            check_flags(words)
            if why is None and _can_run(words, folder):
                trains = words[1].startswith("phases.phase") and "--help" not in words
                small = made_small(words, folder) if trains else words
                ended = command(main_of(small[1]), *small[2:])
                mx.clear_cache()
                assert ended.code == 0, ended.err
        except (AssertionError, BadInput) as error:
            wrong.append(f"{page}: {line}\n    {error}")
    assert not wrong, "\n".join(wrong)


def _can_run(words, folder):
    """Whether a command names no run, or runs that an earlier command has made."""
    if words[1].startswith("phases."):
        return True
    runs = [word for word in words if (word.startswith("results/") and not word.endswith(".png")) or word == "RUN"]
    return all((folder / run).exists() for run in runs)
