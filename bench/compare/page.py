"""compare.html: one file with everything in it, that asks no network; tables sort by a click, and the dark is dark."""

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from bench.compare import findings, tables
from bench.compare.findings import Cell, Log
from bench.compare.plots import ROLES, Picture
from bench.compare.tables import Table
from mlx_transformer.utils.files import atomic_write

LONG = 60  # characters: a cell with more is broken into lines


def write_page(path: Path, log: Log, pictures: Sequence[Picture]) -> None:
    """Put the page at path. Raises OSError."""
    figures = {picture.name: _figure(picture) for picture in pictures}
    answer, *further = findings.headline(log)
    remarks = "".join(f"<li>{escape(remark)}</li>" for remark in findings.remarks(log))
    first = "ladder" if "ladder" in figures else "speed"
    page = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{answer} ({findings.setting(log)})"),
        answer=escape(answer),
        further="".join(f"<p>{escape(sentence)}</p>" for sentence in further),
        remarks=f'<ul class="remarks">{remarks}</ul>' if remarks else "",
        where=escape(f"{findings.setting(log)}. {findings.machine(log)}"),
        ladder=figures.pop(first, ""),
        sections="\n".join(_sections(log, figures)),
    )
    atomic_write(path, page)


def _sections(log: Log, figures: Mapping[str, str]) -> list[str]:
    sections = [_section(tables.speedups(log)), _section(tables.targets(log))]
    if "loss_tokens" in figures:
        sections.append(f"<h2>How the loss falls</h2>{_pair(figures, 'loss_tokens', 'loss_seconds')}")
    sections.append(_section(tables.rates(log), _pair(figures, "speed", "memory")))
    rest = (tables.speed, tables.quality, tables.parity, tables.agreement, tables.runs)
    return [*sections, *(_section(make(log)) for make in rest)]


def _section(table: Table, pictures: str = "") -> str:
    body = _table(table) if table.rows else '<p class="note">Not measured.</p>'
    return f"<h2>{escape(table.title)}</h2>{pictures}{body}"


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


def _figure(picture: Picture) -> str:
    """The picture inside the page: its ids its own, its colours the page's, read aloud as what it shows."""
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{picture.name}-", picture.svg())
    for role, colour in ROLES.items():
        svg = svg.replace(colour, f"var(--{role})")
    svg = re.sub(r'^<svg([^>]*?) width="[^"]*" height="[^"]*"', r"<svg\1", svg)
    return f'<figure role="img" aria-label="{escape(picture.shows)}">{svg}</figure>'
