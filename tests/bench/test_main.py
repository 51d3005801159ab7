"""`python -m bench TOOL`: the list of tools, and the dispatch to each."""

import pkgutil

from bench import __main__ as entry
from bench.tools import stopping
from tests.faults.runs import assert_bad, command


def test_every_tool_is_listed_and_present():
    listed = command(entry.main).out
    for tool, (function, purpose) in entry.TOOLS.items():
        assert callable(pkgutil.resolve_name(function))
        assert f"  {tool} " in listed
        assert purpose in listed


def test_a_tool_gets_the_rest_of_the_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr(stopping, "main", lambda *given: seen.append(given))
    assert command(entry.main, "stopping", "results/a", "--help").code == 0
    assert seen == [("python -m bench stopping", ["results/a", "--help"])]


def test_an_unknown_tool_is_bad_input():
    assert_bad(command(entry.main, "stepp"), "'stepp'", "expected compare")
