"""The terminal prints text as it is, and tables drop columns rather than cut names."""

import ast
import io

import pytest
from rich.table import Table

from mlx_transformer.utils.terminal import Terminal
from mlx_transformer.utils.text import clock
from tests.test_imports import FILES

NAMES = ["sweep[lr=0.1]", "sweep[bold]", "x[/y]", ":smile:", "100%[red]a[/red]"]


def output(width=80, *, is_terminal=True):
    return Terminal(file=io.StringIO(), width=width, force_terminal=is_terminal, color_system=None)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_printed_as_they_are(name):
    terminal = output()
    terminal.say(name)
    terminal.print(Table(name, title=f"1 {name}", caption=f"2 {name}"))
    table = Table("head")
    table.add_row(f"3 {name}")
    terminal.print(table)
    terminal.print_columns({"run": [f"4 {name}"]}, [])
    shown = terminal.file.getvalue()
    assert shown.count(name) == 6
    assert all(f"{i} {name}" in shown for i in range(1, 5))


def test_every_console_of_the_project_is_this_one():
    for path in FILES:
        if path.parts[-2:] != ("utils", "terminal.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
                module = getattr(node, "module", "") or ""
                assert not module.startswith("rich.console"), f"{path}: use mlx_transformer.utils.terminal"
                assert not {"rich", "rich.console"} & set(names), f"{path}: use mlx_transformer.utils.terminal"


NAME = "phase_1_attention_is_all_you_need_with_a_branch_20250101_120000"
COLUMNS = {"run": [NAME, "b"], "loss": ["3.1", "4.12345"], "bytes": ["1,234,567", ""], "corpus": ["tinystories", "x"]}


@pytest.mark.parametrize(
    ("width", "heads"),
    [(120, ["run", "loss", "bytes", "corpus"]), (90, ["run", "loss", "bytes"]), (80, ["run", "loss"]), (72, ["run"])],
)
def test_a_table_drops_columns_by_worth_and_never_cuts_a_name(width, heads):
    terminal = output(width)
    terminal.print_columns(COLUMNS, ["loss", "bytes", "corpus"])
    shown = terminal.file.getvalue()
    assert NAME in shown
    assert "…" not in shown
    assert [head for head in COLUMNS if head in shown] == heads
    assert max(map(len, shown.splitlines())) <= width


def test_a_pipe_has_every_column():
    terminal = output(20, is_terminal=False)
    terminal.print_columns({**COLUMNS, "run": ["a" * 300, "b"]}, ["loss", "bytes", "corpus"])
    assert "a" * 300 in terminal.file.getvalue()
    assert all(head in terminal.file.getvalue() for head in COLUMNS)


def test_durations():
    assert [clock(seconds) for seconds in (0.4, 8, 754, 3723)] == ["0:00", "0:08", "12:34", "1:02:03"]
