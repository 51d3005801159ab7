"""Make RESULTS.md, RECORDS.md, docs/results/ and the generated parts of README.md and docs/ from the published logs.

`python -m bench report` writes them; `--check` says which are not up to date. The text comes from the templates in
bench/report/templates/ (see pages.py): RESULTS.md and RECORDS.md from their own, docs/results/TOPIC.md from TOPIC.md.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.report.figures import Figure
from bench.report.pages import IMAGES, PAGES, TEMPLATES, Page
from bench.workers.machine import ROOT
from mlx_transformer.run.flags import Switch, parse
from mlx_transformer.utils.errors import BadInput, RunFailed
from mlx_transformer.utils.files import atomic_write

RESULTS, INDEX = "RESULTS.md", f"{PAGES}/index.md"
_AT_ROOT = ("RESULTS", "RECORDS")
_HEAD = "<!-- Made by `python -m bench report` from {} and the raw logs in results/published/: edit those. -->\n\n"
_TO_PAGES = re.compile(rf"\]\({PAGES}/")
_TO_DOCS = re.compile(r"\]\(docs/")
_TO_ROOT = re.compile(r"\]\((?=[A-Z]+\.md)")


def make_report(root: Path) -> tuple[dict[str, str], dict[str, Figure]]:
    """Return the text of every page by its path, and every figure by its name. Raises BadInput (see pages.py)."""
    sources = {path.stem: path for path in sorted((root / TEMPLATES).glob("*.md"))}
    if not sources:
        raise BadInput(f"'{root / TEMPLATES}' has no template: expected the pages of results as *.md")
    targets = {name: f"{name}.md" if name in _AT_ROOT else f"{PAGES}/{name}.md" for name in sources}
    texts: dict[str, str] = {}
    figures: dict[str, Figure] = {}
    for name, path in targets.items():
        page = Page(root, path, {*targets.values(), INDEX})
        texts[path] = _HEAD.format(f"{TEMPLATES}/{name}.md") + page.fill(sources[name])
        figures |= page.figures
    for path, text in _hand_written(root):
        page = Page(root, path, {*targets.values(), INDEX})
        texts[path] = page.fill_marked(text)
        figures |= page.figures
    if RESULTS in texts:
        texts[INDEX] = _TO_DOCS.sub("](../", _TO_PAGES.sub("](", _TO_ROOT.sub("](../../", texts[RESULTS])))
    return texts, figures


def _hand_written(root: Path) -> Iterator[tuple[str, str]]:
    """Yield README.md and the pages of docs/ that have generated parts, each with its text."""
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        if path.is_file() and "<!-- {{" in (text := path.read_text(encoding="utf-8")):
            yield path.relative_to(root).as_posix(), text


def stale(root: Path, texts: Mapping[str, str], figures: Mapping[str, Figure]) -> list[str]:
    """Return the paths of pages and pictures that are missing, out of date or no longer made."""
    made = {*texts, *(f"{IMAGES}/{name}.png" for name in figures)}
    there = {path.relative_to(root).as_posix() for path in (root / PAGES).rglob("*") if path.is_file()}
    old = [path for path, text in texts.items() if not _has(root / path, text)]
    old += [f"{IMAGES}/{name}.png" for name in figures if not figures[name].is_at(root / IMAGES / f"{name}.png", root)]
    return old + sorted(there - made)


def _has(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


@dataclass
class Flags:
    """Make RESULTS.md, docs/results/ and the generated parts of README.md and docs/ from the published logs."""

    check: Switch = False
    """write nothing; exit code 1 if anything is out of date"""


def main(prog: str = "python -m bench report", args: list[str] | None = None) -> None:
    """Run the command line."""
    flags = parse(Flags, prog, args=args)
    texts, figures = make_report(ROOT)
    old = stale(ROOT, texts, figures)
    if flags.check:
        if old:
            verb = "is" if len(old) == 1 else "are"
            raise RunFailed(f"{', '.join(old)} {verb} out of date: run python -m bench report")
        return
    for path in old:
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        if path in texts:
            atomic_write(ROOT / path, texts[path])
        elif (figure := figures.get(Path(path).stem)) and path.startswith(IMAGES):
            figure.write(ROOT / path, ROOT)
        else:
            (ROOT / path).unlink()
