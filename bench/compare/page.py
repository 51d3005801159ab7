"""compare.html: one file without network requests, with sortable tables and a dark mode."""

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from bench.compare import summary, tables
from bench.compare.plots import ROLES, Plot
from bench.compare.summary import Cell, Log
from bench.compare.tables import Table
from mlx_transformer.utils.files import atomic_write

LONG = 60  # characters: the text of a longer cell wraps


def write_page(path: Path, log: Log, plots: Sequence[Plot]) -> None:
    """Write the page. Raises OSError."""
    figures = {plot.name: _figure(plot) for plot in plots}
    answer, *further = summary.headline(log)
    remarks = "".join(f"<li>{escape(remark)}</li>" for remark in summary.remarks(log))
    first = "ladder" if "ladder" in figures else "speed"
    page = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{answer} ({summary.setting(log)})"),
        answer=escape(answer),
        further="".join(f"<p>{escape(sentence)}</p>" for sentence in further),
        remarks=f'<ul class="remarks">{remarks}</ul>' if remarks else "",
        where=escape(f"{summary.setting(log)}. {summary.describe_machine(log)}"),
        ladder=figures.pop(first, ""),
        sections="\n".join(_sections(log, figures)),
    )
    atomic_write(path, page)


def _sections(log: Log, figures: Mapping[str, str]) -> list[str]:
    sections = [_section(tables.final_losses(log)), _section(tables.speedups(log)), _section(tables.targets(log))]
    if "loss_tokens" in figures:
        sections.append(f"<h2>Loss curves</h2>{_pair(figures, 'loss_tokens', 'loss_seconds')}")
    sections.append(_section(tables.throughput(log), _pair(figures, "speed", "memory")))
    rest = (tables.speed, tables.quality, tables.parity, tables.agreement, tables.runs)
    return [*sections, *(_section(make(log)) for make in rest)]


def _section(table: Table, plots: str = "") -> str:
    body = _table(table) if table.rows else '<p class="note">Not measured.</p>'
    return f"<h2>{escape(table.title)}</h2>{plots}{body}"


def _pair(figures: Mapping[str, str], *names: str) -> str:
    return f'<div class="pair">{"".join(figures.get(name, "") for name in names)}</div>'


def _table(table: Table) -> str:
    numeric = table.numeric()
    head = "".join(
        f'<th scope="col"{_number(is_number)}><button type="button">{escape(name)}</button></th>'
        for name, is_number in zip(table.head, numeric, strict=True)
    )
    rows = "".join(f"<tr>{''.join(map(_cell, row, numeric))}</tr>" for row in table.rows)
    body = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f'{body}<p class="note">{escape(table.note)}</p>'


def _number(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _cell(cell: Cell, is_number: bool) -> str:
    if cell.value is None:
        return f"<td{' class=long' if len(cell.text) > LONG else _number(is_number)}>{escape(cell.text)}</td>"
    value = "Infinity" if math.isinf(cell.value) else f"{cell.value!r}"
    return f'<td{_number(is_number)} data-value="{value}">{escape(cell.text)}</td>'


def _figure(plot: Plot) -> str:
    """Return a plot for the page: with unique ids, the page's colors and a description for screen readers."""
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{plot.name}-", plot.svg())
    for role, color in ROLES.items():
        svg = svg.replace(color, f"var(--{role})")
    svg = re.sub(r'^<svg([^>]*?) width="[^"]*" height="[^"]*"', r"<svg\1", svg)
    return f'<figure role="img" aria-label="{escape(plot.description)}">{svg}</figure>'
