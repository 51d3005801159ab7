"""What the site does besides MkDocs: code from its source file, links out of docs/, equations, the navigation.

- `<!-- code: PATH NAME ... -->` becomes the definitions with these names, read from PATH. GitHub shows nothing there,
  so the page must have a link to the file too.
- A link to a file outside docs/ leads to a page made of that file; the same link works on GitHub.
- README.md is the home page.
- LaTeX between $ or $$ becomes MathML, which every browser draws without a script or a font.

A missing file or name is a warning, and `mkdocs build --strict` fails.
"""

import ast
import html
import json
import logging
import os
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = {"README.md": "index.md", "RESULTS.md": "results/index.md"}  # file -> its page, where the names differ
PICTURES = {".png", ".svg", ".gif", ".jpg"}
LANGUAGES = {".py": "python", ".cpp": "cpp", ".toml": "toml", ".json": "json", ".yml": "yaml", "": "text"}
LONGEST = 60_000  # characters of a file that is shown whole

log = logging.getLogger("mkdocs.hooks.site")
_CODE = re.compile(r"^<!-- code: (\S+) (.+?) -->$", re.M)
_FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.M | re.S)
_LINK = re.compile(r"(?<=\]\()([^()\s#]+)")
_ATTRIBUTE = re.compile(r'(?<=[\s"]src=")([^"#]+)|(?<=\ssrcset=")([^"#]+)|(?<=\shref=")([^"#]+)')
_COMMENT = re.compile(r"\A(\s*<!--(?! code:).*?-->\s*)+", re.S)  # before the title, which MkDocs then would not find
_MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Read the home page and others from the repository's root, and complete the navigation."""
    config.nav = _existing(config.nav, Path(config.docs_dir))
    return config


def _existing(entries: list, docs: Path) -> list:
    """Leave out pages that do not exist; replace FOLDER/ by the folder's pages that are not named."""
    kept: list = []
    for entry in entries:
        if isinstance(entry, dict):
            ((title, inside),) = entry.items()
            inside = _existing(inside, docs) if isinstance(inside, list) else inside
            if inside and (not isinstance(inside, str) or _file_of(inside).is_file()):
                kept.append({title: inside})
        elif entry.endswith("/"):
            pages = sorted(path.relative_to(docs).as_posix() for path in (docs / entry).glob("*.md"))
            kept += [page for page in pages if page not in entries]
        elif _file_of(entry).is_file():
            kept.append(entry)
    return kept


def _file_of(page: str) -> Path:
    """Return the file of the repository that a page is made of."""
    if page.startswith("source/"):
        return ROOT / page.removeprefix("source/").removesuffix(".md")
    names = {site: file for file, site in PAGES.items()}
    candidates = [ROOT / "docs" / page, ROOT / names.get(page, page)]
    return next((path for path in candidates if path.is_file()), candidates[0])


def _is_code(page: str) -> bool:
    """Whether a page shows a file as it is, in which nothing is a link."""
    return page.startswith("source/") and not page.endswith(".ipynb.md")


def _page_of(path: Path) -> str:
    """Return the site's name for a file of the repository."""
    name = path.relative_to(ROOT).as_posix()
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    if name in PAGES:
        return PAGES[name]
    if path.suffix == ".md" or path.suffix in PICTURES:
        return name
    return f"source/{name}.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside docs/ that the navigation or a page needs, and for what those need."""
    for name in ("README.md", "RESULTS.md", "RECORDS.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        if (ROOT / name).is_file() and files.get_file_from_path(_page_of(ROOT / name)) is None:
            files.append(_made(ROOT / name, config))
    todo = [file for file in files if file.src_uri.endswith(".md")]
    while todo:
        file = todo.pop()
        if _is_code(file.src_uri):
            continue
        for path in _targets(file.content_string, _file_of(file.src_uri)):
            if path.is_file() and files.get_file_from_path(_page_of(path)) is None:
                made = _made(path, config)
                files.append(made)
                todo += [made] if made.src_uri.endswith(".md") else []
    return files


def _made(path: Path, config: MkDocsConfig) -> File:
    name = _page_of(path)
    if path.suffix in PICTURES:
        return File.generated(config, name, abs_src_path=str(path))
    text = path.read_text(encoding="utf-8")
    if name.startswith("source/"):
        text = _notebook(text) if path.suffix == ".ipynb" else _shown(text, path)
    return File.generated(config, name, content=text)


def _shown(text: str, path: Path) -> str:
    """Return the page of a file of code or data."""
    cut = text[:LONGEST]
    note = "" if cut == text else f"\n\nThe first {LONGEST:,} of {len(text):,} characters.\n"
    return f"# {path.relative_to(ROOT)}\n\n```{LANGUAGES.get(path.suffix, 'text')}\n{cut.rstrip()}\n```\n{note}"


def _notebook(text: str) -> str:
    """Return the page of a notebook that was saved without outputs."""
    cells = json.loads(text)["cells"]
    sources = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
    return "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for text, kind in sources) + "\n"


def _targets(markdown: str, source: Path) -> list[Path]:
    """Return the files that a page links to or shows code of."""
    prose = _FENCE.sub("", markdown)
    found = [match[0] for pattern in (_LINK, _ATTRIBUTE) for match in pattern.finditer(prose)]
    paths = [(source.parent / name).resolve() for name in found if ":" not in name]
    paths += [ROOT / match[1] for match in _CODE.finditer(prose)]
    return [path for path in paths if path.is_relative_to(ROOT)]


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to the site's pages and put code where it is asked for."""
    name = page.file.src_uri
    if _is_code(name):
        page.meta["search"] = {"exclude": True}  # else a word's first pages are the files that use it
        return markdown
    source = _file_of(name)
    if name == "index.md":
        page.meta["hide"] = ["navigation"]
    linked = [(source.parent / match[0]).resolve() for match in _LINK.finditer(markdown)]
    for path in {match[1] for match in _CODE.finditer(markdown) if ROOT / match[1] not in linked}:
        log.warning("%s shows code of %s without a link to it: on GitHub nothing else is seen", name, path)
    here = posixpath.dirname(name)
    markdown = _COMMENT.sub("", markdown)

    def link(match: re.Match, *, raw: bool = False) -> str:
        path = (source.parent / match[0]).resolve()
        if ":" in match[0] or not path.is_relative_to(ROOT) or not path.exists():
            return match[0]
        if path.is_dir():
            log.warning("%s links to the folder %s: link to a file in it", name, match[0])
            return match[0]
        target = files.get_file_from_path(_page_of(path))
        if target is None:
            return match[0]
        return get_relative_url(target.url, page.url) if raw else posixpath.relpath(target.src_uri, here or ".")

    def outside_fences(text: str) -> str:
        text = _LINK.sub(link, text)
        text = _ATTRIBUTE.sub(lambda match: link(match, raw=True), text)
        return _CODE.sub(lambda match: _code(match[1], match[2].split(), page), text)

    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [outside_fences(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, outside_fences(markdown[end:])])


def _code(path: str, names: list[str], page: Page) -> str:
    """Return the definitions with these names in a file of the repository."""
    if not (ROOT / path).is_file():
        log.warning("%s shows code of %s, which does not exist", page.file.src_uri, path)
        return ""
    text = (ROOT / path).read_text(encoding="utf-8")
    shown = []
    if path.endswith(".md"):
        block = next((fence[0] for fence in _FENCE.finditer(text) if names[0] in fence[0]), None)
        if block is None:
            log.warning("%s shows the block with %s, which %s does not have", page.file.src_uri, names[0], path)
        return block or ""
    for name in names:
        if (lines := _definition(text, name)) is None:
            log.warning("%s shows %s, which %s does not define", page.file.src_uri, name, path)
        else:
            shown.append("\n".join(lines))
    return "```python\n" + "\n\n\n".join(shown) + "\n```"


def _definition(text: str, name: str) -> list[str] | None:
    """Return the lines of a class, function, method (Class.method) or assignment, dedented."""
    body: list[ast.stmt] = ast.parse(text).body
    found: ast.stmt | None = None
    for part in name.split("."):
        found = next((node for node in body if part in _names(node)), None)
        if found is None:
            return None
        body = getattr(found, "body", [])
    assert found is not None
    first = min([found.lineno, *(decorator.lineno for decorator in getattr(found, "decorator_list", []))])
    lines = text.splitlines()[first - 1 : found.end_lineno]
    return [line[found.col_offset :] for line in lines]


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id] if isinstance(node.target, ast.Name) else []
    return [node.name] if isinstance(node, ast.ClassDef | ast.FunctionDef) else []


def on_page_content(content: str, **_: object) -> str:
    """Replace LaTeX by MathML."""

    def mathml(match: re.Match) -> str:
        latex = html.unescape(match[3]).strip()
        try:
            return convert(latex, display="block" if match[2] == "[" else "inline")
        except Exception as error:
            log.warning("cannot read the equation %s: %s", latex, error)
            return match[0]

    return _MATH.sub(mathml, content)


def on_post_build(config: MkDocsConfig) -> None:
    """Tell GitHub Pages to publish the files as they are."""
    Path(config.site_dir, ".nojekyll").touch()
    assert os.path.isdir(config.site_dir)
