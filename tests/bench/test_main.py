"""`python -m bench TOOL`: the list of tools, and the dispatch to each."""

import importlib.util
import sys

import pytest

from bench import __main__ as entry
from bench.tools import stopping
from mlx_transformer.utils.errors import BadInput


def test_every_tool_is_listed_and_present(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench"])
    entry.run_tool()
    listed = capsys.readouterr().out
    for tool, (module, purpose) in entry.TOOLS.items():
        assert importlib.util.find_spec(module) is not None
        assert f"  {tool} " in listed
        assert purpose in listed


def test_a_tool_gets_the_rest_of_the_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr(stopping, "main", lambda: seen.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["bench", "stopping", "results/a", "--help"])
    entry.run_tool()
    assert seen == [["results/a", "--help"]]


def test_an_unknown_tool_is_bad_input(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "stepp"])
    with pytest.raises(BadInput, match="'stepp' is no tool: expected one of compare"):
        entry.run_tool()
