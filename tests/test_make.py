"""The Makefile and .ci/run as a new Mac has them: which Python they choose, GNU make 3.81, bash 3.2."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INTEL = 'platform.system, platform.machine = lambda: "Darwin", lambda: "x86_64"'
NATIVE = 'platform.system, platform.machine = lambda: "Darwin", lambda: "arm64"'
VERSIONS = {"old": "sys.version_info = (3, 9, 6)", "intel": INTEL, "native": NATIVE}
NEWER_MAKE = (
    *(r"^\w+\s*!=", "::=", r"\$\(file ", r"\$\(let ", r"\$\(intcmp ", r"\.ONESHELL", r"\.EXTRA_PREREQS", r"&:"),
    *("undefine", r"^\s*private ", r"\$\(guile "),
)
NEWER_BASH = (
    *("declare -A", "local -A", "mapfile", "readarray", "coproc", "wait -n", r"\|&", "&>>", ";;?&", r"\[\[ -v"),
    *(r"\$\{\w+(\[@\])?(\^|,|@)", r"\$\{\w+\[-", r"printf .*%\(", r"read -t 0?\.\d", "shopt -s (globstar|lastpipe)"),
)


@pytest.fixture
def machine(tmp_path):
    """A folder with the Makefile, on a machine with the named Pythons; their kind is "old", "intel" or "native"."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "make", "uname", "true"):
        (tools / name).symlink_to(shutil.which(name))
    shutil.copy(ROOT / "Makefile", tmp_path)

    def make(**pythons):
        for name, kind in pythons.items():
            path = tools / name.replace("_", ".")
            code = f"import platform, sys; {VERSIONS[kind]}; exec(sys.argv[1])"
            path.write_text(f"""#!/bin/sh
[ "$1" = -c ] && exec {sys.executable} -c '{code}' "$2"
echo "$0 $*"
""")
            path.chmod(0o755)
        done = subprocess.run(
            [tools / "make", "--no-print-directory", ".venv/bin/python"],
            cwd=tmp_path,
            env={"PATH": str(tools)},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    return make


def test_the_newest_python_that_suits_is_chosen(machine):
    code, out, _ = machine(python3="old", python3_10="native", python3_12="native", python3_13="intel")
    assert code == 0
    assert out.splitlines()[-1].endswith("python3.12 -m venv .venv")


def test_python3_is_the_last_choice(machine):
    assert machine(python3="native", python3_12="intel")[1].splitlines()[-1].endswith("python3 -m venv .venv")


@pytest.mark.parametrize("pythons", [{}, {"python3": "old"}, {"python3": "old", "python3_12": "intel"}])
def test_none_or_an_old_one_ends_in_one_sentence_that_names_the_command(machine, pythons):
    code, _, err = machine(**pythons)
    assert code == 2
    (sentence,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "brew install python@3.12" in sentence
    assert "python.org" in sentence


def test_an_intel_python_ends_in_one_sentence(machine):
    code, _, err = machine(python3="intel")
    assert code == 2
    (sentence,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Intel" in sentence
    assert "brew install python@3.12" in sentence


def found(patterns, text):
    lines = [re.sub(r"(^|\s)#.*", "", line) for line in text.splitlines()]
    return {pattern: line for pattern in patterns for line in lines if re.search(pattern, line)}


def test_nothing_is_newer_than_gnu_make_3_81_and_bash_3_2():
    makefile = (ROOT / "Makefile").read_text()
    assert not found(NEWER_MAKE + NEWER_BASH, makefile)
    assert not found(NEWER_BASH, (ROOT / ".ci" / "run").read_text())
    assert len(found(NEWER_MAKE, "A != ls\nB ::= 1\n.ONESHELL:\na b &: c")) == 4
    assert len(found(NEWER_BASH, "declare -A x\necho ${x^^} ${x[-1]}\na |& b")) == 4


def test_the_hosted_mac_trains_nano_and_the_reference_on_the_cpu():
    """Its virtual GPU is refused by PyTorch, and base, a GPU's default size, would take minutes there."""
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    job = workflow[workflow.index("macos:") :]
    assert "BENCH_TORCH_DEVICE: cpu" in job
    assert re.search(r"run: bash \.ci/run --size nano$", job, re.MULTILINE)
    assert 'ARGS="--out $scratch/first $*"' in (ROOT / ".ci" / "run").read_text()
