"""Fill the templates of the pages of results, and the generated parts of hand-written pages.

A template contains no measured number: it names one as `{{LOG: PATH | FORMAT}}`, LOG being a file under
results/published/ (see placeholder.py). Directives:

    {{log: run = base/result.json}}        a short name for a log, for the rest of the page
    {{table: step step.json}}              a table of a kind in TABLES; folder/ is the list of all logs in it
    {{figure: ladder race small.json}}     a picture NAME.png of a kind in FIGURES, drawn from the logs
    {{story: base/stories.md 5}}           one sample of a file of samples
    {{include: parts/ladder.md}}           another template
    {{records: records.json}}              the records of the speed run

A page written by hand has such a line as a comment, `<!-- {{...}} -->`; what stands from there to `<!-- end -->` is
replaced. Links are written relative to the page that is made.
"""

import os
import re
from collections.abc import Callable, Collection
from pathlib import Path, PurePath

from bench.report import records
from bench.report.figures import FIGURES, Figure
from bench.report.placeholder import Logs
from bench.report.tables import TABLES, table
from mlx_transformer.utils.errors import BadInput

TEMPLATES, PAGES, IMAGES, PUBLISHED = "bench/report/templates", "docs/results", "docs/results/img", "results/published"
_PLACEHOLDER = re.compile(r"\{\{(.*?)\}\}")
_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
_MARKED = re.compile(r"^<!-- (\{\{[^\n]*\}\}) -->$.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)


class Page:
    """A page to be made: where it goes, the names of its logs, and the figures that it shows."""

    def __init__(self, root: Path, path: str, others: Collection[str] = ()) -> None:
        """path: of the page, relative to root. others: pages made beside it, which links may name."""
        self.root, self.path, self.others = root, path, others
        self.logs = Logs(root / PUBLISHED)
        self.figures: dict[str, Figure] = {}

    def fill(self, template: Path) -> str:
        """Fill a template. Raises BadInput that names file, line and placeholder."""
        filled = []
        for number, line in enumerate(template.read_text(encoding="utf-8").splitlines(), 1):
            new = self._fill_line(line, f"{template.relative_to(self.root).as_posix()}, line {number}")
            if new or not line:  # a line that only names a log leaves nothing
                filled.append(new)
        return "\n".join(filled).strip() + "\n"

    def fill_marked(self, text: str) -> str:
        """Replace what stands between the markers of a page written by hand. Raises BadInput."""

        def replace(found: re.Match[str]) -> str:
            line = text.count("\n", 0, found.start()) + 1
            filled = self._fill_line(found[1], f"{self.path}, line {line}").strip()
            return f"<!-- {found[1]} -->\n\n{filled}\n\n<!-- end -->"

        return _MARKED.sub(replace, text)

    def _fill_line(self, line: str, place: str) -> str:
        try:
            if "{{" in _PLACEHOLDER.sub("", line):
                raise BadInput("{{ without }} on the same line")
            for link in _LINK.findall(line):
                self._check(link)
            return _PLACEHOLDER.sub(lambda match: self._filled(match[1].strip()), line)
        except BadInput as error:
            raise BadInput(f"{place}: {error}") from error

    def _check(self, link: str) -> None:
        target = os.path.normpath(PurePath(self.path).parent / link)
        if target not in self.others and not (self.root / target).exists():
            raise BadInput(f"the link to '{link}' leads nowhere")

    def _filled(self, text: str) -> str:
        kind, _, rest = text.partition(": ")
        try:
            return DIRECTIVES[kind](self, rest) if kind in DIRECTIVES else self.logs.evaluate(text)
        except BadInput as error:
            raise BadInput(f"{{{{{text}}}}}: {error}") from error

    def name_log(self, rest: str) -> str:
        """Give a log a short name."""
        name, _, path = rest.partition(" = ")
        self.logs.names[name] = path
        self.logs.read(name)
        return ""

    def table(self, rest: str) -> str:
        """Make a table of logs."""
        kind, *names = rest.split()
        if kind not in TABLES:
            raise BadInput(f"'{kind}' is not a kind of table: expected one of {', '.join(TABLES)}")
        try:
            return TABLES[kind](*map(self.logs.read, names))
        except (AttributeError, KeyError, TypeError) as error:
            raise BadInput(f"this log has no table of the kind {kind} ({type(error).__name__}: {error})") from error

    def figure(self, rest: str) -> str:
        """Show a figure, with its finding as its text, and keep it to be drawn."""
        name, kind, *logs = rest.split()
        if kind not in FIGURES:
            raise BadInput(f"'{kind}' is not a kind of figure: expected one of {', '.join(FIGURES)}")
        paths = tuple(self.logs.names.get(log, log) for log in logs)
        try:
            figure = Figure(kind, paths, FIGURES[kind].finding(*map(self.logs.read, logs)))
        except (AttributeError, KeyError, TypeError) as error:
            raise BadInput(f"this log has no figure of the kind {kind} ({type(error).__name__}: {error})") from error
        self.figures[name] = figure
        image = os.path.relpath(f"{IMAGES}/{name}.png", PurePath(self.path).parent)
        return f"![{figure.finding}]({PurePath(image).as_posix()})"

    def story(self, rest: str) -> str:
        """Quote a sample of a file of samples."""
        name, _, number = rest.rpartition(" ")
        _, _, story = self.logs.read(name).partition(f"\n## {number}\n\n")
        if not story:
            raise BadInput(f"the file has no story {number}")
        return story.split("\n\n")[0].strip("\n")

    def include(self, rest: str) -> str:
        """Fill another template, whose links are relative to this page too."""
        template = self.root / TEMPLATES / rest
        if not template.is_file():
            raise BadInput(f"'{rest}' is not a template: expected a file in {TEMPLATES}/")
        return self.fill(template).rstrip("\n")

    def records(self, rest: str) -> str:
        """Make the table of the records."""
        return records.history(records.read_records(self.logs, rest), table)


DIRECTIVES: dict[str, Callable[[Page, str], str]] = {
    "log": Page.name_log,
    "table": Page.table,
    "figure": Page.figure,
    "story": Page.story,
    "include": Page.include,
    "records": Page.records,
}
