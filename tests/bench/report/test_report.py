"""The pages of results and the placeholders that they are made of: every number comes from a log."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from bench.compare import tables
from bench.report import drawings, pages, report
from bench.report.placeholder import Logs, values_at
from mlx_transformer.run.plots import drawing
from mlx_transformer.utils.errors import BadInput, exit_cleanly
from tests.bench.compare.compare_logs import a_log
from tests.faults.runs import ROOT, command

RUN = {"tokens": 6_135_808, "bpb": 1.07158, "floor": None, "corpus": {"name": "fables", "tokens": 1_422_681}}
STEP = {
    "ratios": [
        {"b": "torch", "ratio": 1.004, "low": 0.99, "high": 1.02},
        {"b": "torch-compile", "ratio": 1.13, "low": 1.11, "high": 1.15},
        {"b": "plain", "ratio": 40.0, "low": None, "high": None},
    ]
}
CURVE = [{"kind": "log", "loss": 3.0}, {"kind": "eval", "loss": 9.0}, {"kind": "log", "loss": 2.0}]
TEXT = "6,751 training and 253 validation\n5-gram    3.2848   1.2050\n\nreal\t5m22.773s\n"


@pytest.fixture
def root(tmp_path):
    """A checkout of which only the logs and the pages matter."""
    (tmp_path / pages.TEMPLATES).mkdir(parents=True)
    logs = tmp_path / pages.PUBLISHED
    (logs / "run").mkdir(parents=True)
    (logs / "run/result.json").write_text(json.dumps(RUN))
    (logs / "step.json").write_text(json.dumps(STEP))
    (logs / "curve.jsonl").write_text("\n".join(map(json.dumps, CURVE)))
    (logs / "counts.txt").write_text(TEXT)
    (logs / "stories.md").write_text("# Stories\n\n## 1\n\n> One\n\n## 2\n\n> **Two**  \n> and more\n")
    (logs / "bad.json").write_text("{")
    (logs / "compare.json").write_text(json.dumps(a_log()))
    return tmp_path


def page(root, text):
    """The one page, filled."""
    path = root / pages.TEMPLATES / "page.md"
    path.write_text(text)
    return pages.Page(root, "docs/results/page.md").fill(path)


@pytest.mark.parametrize(
    ("placeholder", "expected"),
    [
        ("run/result.json: tokens", "6135808"),
        ("run/result.json: tokens | ,", "6,135,808"),
        ("run/result.json: tokens | short", "6.14M"),
        ("run/result.json: corpus.name", "fables"),
        ("run/result.json: bpb | .3f", "1.072"),
        ("run/result.json: bpb | .1%", "107.2 %"),
        ("run/result.json: tokens / corpus.tokens | .1f", "4.3"),
        ("run/result.json: bpb / counts.txt: 5-gram * # | .3f", "0.889"),
        ("step.json: ratios[b=torch].low | .2f", "0.99"),
        ("step.json: ratios[-1].ratio | .0f", "40"),
        ("step.json: ratios[b=torch] | ratio", "1.00× (0.99–1.02): no difference"),
        ("step.json: ratios[b=torch-compile] | ratio", "1.13× (1.11–1.15)"),
        ("step.json: ratios[b=plain, low=null] | ratio", "40.00×"),
        ("step.json: ratios[].ratio | max | .2f", "40.00"),
        ("step.json: ratios[] | count", "3"),
        ("curve.jsonl: [kind=log].loss | mean | .1f", "2.5"),
        ("curve.jsonl: [kind=eval].loss | .1f", "9.0"),
        ("counts.txt: # training and | ,", "6,751"),
        ("counts.txt: 5-gram # | .4f", "3.2848"),
        ("counts.txt: real # | .0f", "323"),
        ("story: stories.md 2", "> **Two**  \n> and more"),
    ],
)
def test_a_placeholder_is_filled_from_its_log(root, placeholder, expected):
    assert page(root, f"It is {{{{{placeholder}}}}}.") == f"It is {expected}.\n"


def test_a_log_can_have_a_short_name_on_its_page(root):
    assert (
        page(root, "# A\n\n{{log: r = run/result.json}}\n{{r: bpb | .1f}} and {{r: bpb | .2f}}\n")
        == "# A\n\n1.1 and 1.07\n"
    )
    with pytest.raises(BadInput, match="'r' is not a log"):
        Logs(root / pages.PUBLISHED).evaluate("r: bpb | .1f")


@pytest.mark.parametrize(
    ("placeholder", "sentence"),
    [
        ("none.json: a", "'none.json' is not a log: expected a file in published/"),
        ("log: r = none.json", "'r' is not a log"),
        ("run/result.json: corpus.bytes", "nothing is at bytes; there is name, tokens"),
        ("run/result.json: corpus[0]", "nothing is at [0]; there is name, tokens"),
        ("step.json: ratios[b=jax].low", "nothing is at [b=jax]"),
        ("step.json: ratios[3].low", "nothing is at [3]"),
        ("step.json: ratios[].low | .2f", "that is 3 values: expected one"),
        ("run/result.json: bpb", "1.07158 needs a format"),
        ("run/result.json: bpb | .2q", "1.07158 cannot be written as '.2q'"),
        ("run/result.json: corpus | ratio", "cannot be written as 'ratio'"),
        ("run/result.json: floor | .2f", "the log has null there"),
        ("run/result.json: bpb / floor | .2f", "cannot be divided"),
        ("run/result.json", "expected LOG: PATH"),
        ("counts.txt: 7-gram #", "the text does not have '7-gram #'"),
        ("counts.txt: 5-gram", "one of them # for the number"),
        ("bad.json: a", "'bad.json' is not valid JSON"),
        ("story: stories.md 3", "the file has no story 3"),
        ("table: pie step.json", "'pie' is not a kind of table: expected one of step, shapes"),
        ("table: step run/result.json", "this log has no table of the kind step"),
    ],
)
def test_what_cannot_be_filled_is_named_with_file_line_and_placeholder(root, placeholder, sentence):
    with pytest.raises(BadInput) as error:
        page(root, f"# Title\n\nA {{{{{placeholder}}}}}\n")
    assert str(error.value).startswith(f"{pages.TEMPLATES}/page.md, line 3: {{{{{placeholder}}}}}: ")
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{{run/result.json: bpb |\n.2f}}", "line 1: {{ without }} on the same line"),
        ("\n![loss](results/published/loss.png)", "line 2: the link to 'results/published/loss.png' leads nowhere"),
    ],
)
def test_what_would_break_the_page_is_refused(root, text, sentence):
    with pytest.raises(BadInput, match=re.escape(sentence)):
        page(root, text)


JSON = st.recursive(
    st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3)
        | st.dictionaries(st.from_regex(r"[\w-]{1,4}", fullmatch=True), inner, min_size=1, max_size=3)
    ),
)


def leaves(value, path=""):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{i}]")
    else:
        yield path, value


@given(JSON)
def test_every_value_of_a_log_has_a_path(log):
    for path, value in leaves(log):
        assert values_at(log, path) == [value]


@pytest.mark.parametrize("kind", ["compare", "ideas", *(make.__name__ for make in tables.ALL)])
def test_a_comparison_makes_every_table(root, kind):
    text = page(root, f"{{{{table: {kind} compare.json}}}}")
    assert re.search(r"^\| .* \|\n\| ---", text, re.MULTILINE)


def test_the_table_of_a_comparison_gives_its_answer(root):
    text = page(root, "{{table: compare compare.json}}")
    assert "2.31×" in text.split("\n")[0]
    assert "| phase 2 | 2.8200 (1) | faster | 2.31× (1.90–2.80) |" in text


def test_an_ablation_has_a_row_per_variant(root):
    lines = page(root, "{{table: ideas compare.json}}").splitlines()
    assert lines[2].startswith("| phase 1 | — | — | — | 1.5M (1.25M–1.75M) | 10,220 (10,016–10,527) |")
    row = [line for line in lines if line.startswith("| phase 2 |")]
    assert len(row) == 1
    assert row[0].startswith("| phase 2 | phase 1 | faster | 2.31× (1.90–2.80) | 1.5M (1.25M–1.75M) | 9,800 (")
    assert "| 286 MiB | 1,841,664 | " in row[0]


def run_report(monkeypatch, root, *args):
    monkeypatch.setattr(report, "ROOT", root)
    return command(lambda: exit_cleanly(report.main), *args)


def test_check_names_every_page_that_is_out_of_date(root, monkeypatch):
    template = "It is {{run/result.json: bpb | .2f}}, [so](../notes.md): {{figure: curve loss compare.json}}"
    (root / pages.TEMPLATES / "page.md").write_text(template)
    (root / pages.TEMPLATES / "RESULTS.md").write_text(
        "See [page](docs/results/page.md), [notes](docs/notes.md), [me](RESULTS.md).\n"
    )
    (root / "docs").mkdir()
    marked = "<!-- {{run/result.json: tokens | ,}} -->\nold\n<!-- end -->\n"
    (root / "docs/notes.md").write_text(f"Now <!-- {{{{no}}}} -->\n\n{marked}End\n{marked}")
    old = run_report(monkeypatch, root, "--check")
    names = (
        "RESULTS.md",
        "docs/results/page.md",
        "docs/notes.md",
        "docs/results/index.md",
        "docs/results/img/curve.png",
    )
    assert (old.code, old.err) == (1, f"error: {', '.join(names)} are out of date: run python -m bench report\n")
    assert not (root / "RESULTS.md").exists()
    assert run_report(monkeypatch, root).code == 0
    text = (root / "docs/results/page.md").read_text()
    assert re.search(r"It is 1.07, \[so\]\(../notes.md\): !\[MLX and PyTorch end within .+\]\(img/curve.png\)\n$", text)
    assert (
        "See [page](page.md), [notes](../notes.md), [me](../../RESULTS.md)."
        in (root / "docs/results/index.md").read_text()
    )
    new = "<!-- {{run/result.json: tokens | ,}} -->\n\n6,135,808\n\n<!-- end -->\n"
    assert (root / "docs/notes.md").read_text() == f"Now <!-- {{{{no}}}} -->\n\n{new}End\n{new}"
    assert (root / "docs/results/img/curve.png").read_bytes().startswith(b"\x89PNG")
    assert run_report(monkeypatch, root, "--check").code == 0

    (root / "docs/results/gone.md").write_text("no longer made")
    (root / pages.PUBLISHED / "compare.json").write_text(json.dumps(a_log() | {"complete": True}, indent=1))
    changed = run_report(monkeypatch, root, "--check")
    assert changed.err.startswith("error: docs/results/img/curve.png, docs/results/gone.md are out of date")
    assert run_report(monkeypatch, root).code == 0
    assert not (root / "docs/results/gone.md").exists()
    (root / pages.PUBLISHED / "run/result.json").unlink()
    missing = run_report(monkeypatch, root, "--check")
    assert missing.code == 2
    assert missing.err.startswith(f"error: {pages.TEMPLATES}/page.md, line 1: {{{{run/result.json: bpb | .2f}}}}: ")


def test_the_published_pages_are_up_to_date(monkeypatch):
    outcome = run_report(monkeypatch, ROOT, "--check")
    assert (outcome.code, outcome.err) == (0, "")


def test_every_kind_of_figure_is_readable_at_400_pixels():
    """Letters of at least 9 pixels, nothing cut off at the edges."""
    _, figures = report.make_report(ROOT)
    for figure in {figure.kind: figure for figure in figures.values()}.values():
        with drawing(drawings.STYLE):
            drawn = figure.drawn(ROOT)
            FigureCanvasAgg(drawn).draw()
            texts = [*drawn.texts, *(text for legend in drawn.legends for text in legend.get_texts())]
            for axes in drawn.axes:
                texts += [axes.xaxis.label, axes.yaxis.label, *axes.texts, *axes.get_yticklabels()]
            width = drawn.get_figwidth() * drawn.get_dpi()
            for text in (text for text in texts if text.get_text()):
                box = text.get_window_extent()
                assert box.x0 >= 0, text
                assert box.x1 <= width, text
                assert text.get_size() / 72 * 400 / drawn.get_figwidth() >= 9, text


def test_the_summary_is_short():
    assert len((ROOT / "RESULTS.md").read_text().splitlines()) <= 150


NOUNS = "ms|s|min|h|nats?|bits?|bytes?|tokens?|steps?|stories|rounds|parameters"
UNITS = rf"%|×(?! ?\d)|x\b|[kMGT]i?B?\b|[GT]FLOP|(?:{NOUNS})\b"
TYPED = re.compile(rf"\d+[.,]\d+|\d+\s?-?(?:{UNITS})")
ALLOWED = ("95 %",)  # of an interval


def typed_numbers(text):
    """Numbers with a decimal or a unit, outside of placeholders, code and the targets of links."""
    for left_out in (r"\{\{.*?\}\}", r"`[^`]*`", r"\]\([^)]*\)", r"(?m)^ {4}.*$", *map(re.escape, ALLOWED)):
        text = re.sub(left_out, " ", text)
    return TYPED.findall(text)


@pytest.mark.parametrize("path", sorted((ROOT / pages.TEMPLATES).rglob("*.md")), ids=lambda path: path.name)
def test_no_number_is_typed_into_a_page(path):
    assert typed_numbers(path.read_text()) == [], "write a placeholder: see bench/report/placeholder.py"


@pytest.mark.parametrize(
    "text", ["2.9", "10,220 tokens", "1.13x", "2×", "48 %", "600 s", "5 min", "1.84M", "7M", "100 stories"]
)
def test_a_typed_number_is_found(text):
    assert typed_numbers(f"It is {text}, they say.")


@pytest.mark.parametrize(
    "text",
    ["Phase 1", "in 2017", "16 × 128", "a 95 % interval", "a 5-gram", "`--max-seconds 600 s`", "{{a: b | .2f}} s"],
)
def test_a_setting_is_no_typed_number(text):
    assert not typed_numbers(f"It is {text}, they say.")
