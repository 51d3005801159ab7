"""The commands of `python -m mlx_transformer` and their module forms."""

import subprocess
import sys

import pytest

from mlx_transformer import __main__ as entry
from tests.faults.runs import ROOT, assert_bad, command


def call(*args):
    return command(entry.main, *args)


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_the_commands_are_listed(args):
    ended = call(*args)
    assert (ended.code, ended.err) == (0, "")
    for name, (_, line) in entry.COMMANDS.items():
        assert any(row.split()[:1] == [name] and row.endswith(line) for row in ended.out.splitlines()), name


@pytest.mark.parametrize("name", entry.COMMANDS)
def test_every_command_has_help_under_the_name_that_was_called(name):
    ended = call(name, "--help")
    assert ended.code == 0
    assert f"usage: command {name}" in ended.out


@pytest.mark.parametrize("args", [["nosuch"], ["runs", "nosuch"], ["--quiet"]])
def test_an_unknown_command(args):
    assert_bad(call(*args), f"command '{args[-1]}' is unknown: expected ")


def test_a_bad_flag_names_the_form_that_was_called():
    assert_bad(call("generate", "x", "--length", "5"), "see command generate --help")


@pytest.mark.parametrize("form", ["", ".generate", ".interop", ".run"])
def test_module_forms(form):
    ended = subprocess.run(
        [sys.executable, "-m", f"mlx_transformer{form}", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"usage: python -m mlx_transformer{form}" in ended.stdout


def test_info():
    ended = call("info", "--seconds", 0.05)
    assert (ended.code, ended.err) == (0, "")
    assert {line.split()[0] for line in ended.out.splitlines()} >= {"device", "versions", "cache", "matmul"}
    assert_bad(call("info", "--device", "tpu"), "'tpu'")
    assert_bad(call("info", "--seconds", 0), "--seconds 0")
