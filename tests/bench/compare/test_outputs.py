"""What bench.compare shows, from made-up logs: nothing is dropped, and nothing said that the log does not hold."""

import copy
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from bench.compare import outputs, plots, summary, tables
from mlx_transformer.run.plots import drawing
from tests.bench.compare.compare_logs import BUDGET, ODD, a_hard_log, a_log, a_run, an_ablation, found, middle

LOGS = {"usual": a_log, "hard": a_hard_log, "ablation": an_ablation}
ONE_TO_ONE = {"phase 1": (2.4, 1e4, None), "phase 2": (2.3, 1e4, (1.4, 1.2, 1.6))}


class Page(HTMLParser):
    """What a browser would see: words, attributes, the cells of tables."""

    def __init__(self, text):
        super().__init__()
        self.words, self.attributes, self.rows, self._raw = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, key, value or "") for key, value in attributes]
        self._raw = tag if tag in ("style", "script") else None
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append(dict(attributes).get("data-value"))

    def handle_endtag(self, tag):
        self._raw = None

    def handle_data(self, data):
        if not self._raw:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """By log: what compare.html and compare.md say, and the folder."""
    folders = {name: tmp_path_factory.mktemp(name) for name in LOGS}
    for name, folder in folders.items():
        outputs.write_all(LOGS[name](), folder)
    return folders


@pytest.mark.parametrize("name", LOGS)
def test_the_made_up_logs_are_such_as_are_written(name):
    schema = json.loads((Path(outputs.__file__).parent / "compare.schema.json").read_text())
    jsonschema.validate(json.loads(json.dumps(LOGS[name]())), schema)


def on_terminal(log, width=200):
    console = Console(file=io.StringIO(), width=width)
    outputs.show(log, console)
    return console.file.getvalue()


@pytest.mark.parametrize("name", LOGS)
def test_every_variant_is_in_everything(written, name):
    page = Page((written[name] / "compare.html").read_text()).text
    markdown = (written[name] / "compare.md").read_text().replace("\\", "")
    for variant in summary.variants(LOGS[name]()):
        for where in (page, markdown, on_terminal(LOGS[name]())):
            assert variant in where


@pytest.mark.parametrize("name", LOGS)
def test_the_page_stands_alone(written, name):
    page = Page((written[name] / "compare.html").read_text())
    tags = {tag for tag, _, _ in page.attributes}
    assert not tags & {"img", "iframe", "object", "embed", "image", "base"}
    names = [value for _, key, value in page.attributes if key == "id"]
    assert len(names) == len(set(names)), "two pictures share an id"
    for tag, key, value in page.attributes:
        assert not key.startswith("on")
        if key in ("src", "srcset", "data", "poster"):
            pytest.fail(f"<{tag} {key}={value}>")
        if key in ("href", "xlink:href"):
            assert value.removeprefix("#") in names
        for link in re.findall(r"url\(([^)]*)\)", value):
            assert link.removeprefix("#") in names
        if "://" in value:
            assert key.startswith("xmlns")


def test_the_dark_page_has_no_color_of_the_light(written):
    for figure in re.findall("<figure.*?</figure>", (written["hard"] / "compare.html").read_text(), re.DOTALL):
        assert not re.findall("#[0-9a-f]{6}", figure)
        assert "var(--ink)" in figure


def test_a_name_cannot_become_markup(written):
    text = (written["hard"] / "compare.html").read_text()
    assert ODD not in text
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;&quot;$x$_|*" in text
    rows = [line for line in (written["hard"] / "compare.md").read_text().splitlines() if line.startswith("| phase 4")]
    assert len(rows) == 10
    assert all(re.search(r"\\<b\\>\\&\"\$x\$\\_\\\|\\\*", row) for row in rows)


def test_problems_are_in_every_output(written):
    log = a_hard_log()
    for text in (
        Page((written["hard"] / "compare.html").read_text()).text,
        (written["hard"] / "compare.md").read_text().replace("\\", ""),
        " ".join(on_terminal(log).split()),
    ):
        assert "Rough, from a quick run" in text
        assert "Incomplete: 2 of 25 runs are missing or failed" in text
        assert "phase 2: 3 done, 1 diverged, 1 failed; 3 of 5 seeds reach the target" in text
        assert "phase 5: 5 diverged; 0 of 5 seeds" in text
        assert "2M (1.5M to > 5M)" in text
        assert "no difference" in text
        assert "No PyTorch reference" in text
    assert "out of memory <at> step 12" in Page((written["hard"] / "compare.html").read_text()).text


def test_pictures_say_that_they_are_rough():
    for picture in plots.draw(a_hard_log()):
        assert "rough, from a quick run" in picture.svg()
    for picture in plots.draw(a_log(ONE_TO_ONE)):
        assert "rough, from a quick run" not in picture.svg()


def test_the_final_losses_with_their_intervals_come_first():
    log = a_log()
    found = {name.text: loss for name, loss, *_ in tables.final_losses(log).rows}
    for name, cell in found.items():
        losses = [run["evals"][-1]["valid_loss"] for run in log["runs"] if run["name"] == name]
        assert cell.value == pytest.approx(np.median(losses))
        assert cell.text == f"{np.median(losses):.4f} ({min(losses):.4f}–{max(losses):.4f})"
    assert tables.ON_A_TERMINAL[0] is tables.ALL[0] is tables.final_losses
    ((_, loss, *_), *_) = tables.final_losses(a_log(seeds=2)).rows
    assert "(" not in loss.text, "two seeds have no interval"
    ((_, loss, *_), *_) = tables.final_losses(a_log(seeds=3)).rows
    assert "(" in loss.text


def test_the_accuracy_of_a_task_stands_beside_the_losses():
    log = a_log(seeds=3)
    assert not any("accuracy" in head for head in tables.final_losses(log).head)
    for run in log["runs"]:
        if run["name"] == "phase 2" and run["result"]:
            run["result"] = {**run["result"], "quality": {"task": {"accuracy": 0.25 * run["seed"]}}}
    table = tables.final_losses(log)
    column = table.head.index("accuracy (%)")
    shown = {row[0].text: row[column] for row in table.rows}
    assert (shown["phase 2"].text, shown["phase 2"].value) == ("25.0 (0.0–50.0)", 25.0)
    assert shown["phase 1"].text == "not measured"


def test_final_losses_are_compared_seed_by_seed():
    log = a_log()
    for run in log["runs"]:
        seed_effect, gain = 0.1 * run["seed"], 0.02 * (run["name"] == "phase 2")
        run["evals"][-1]["valid_loss"] = 3 + seed_effect - gain + 1e-4 * run["seed"] * (run["name"] == "phase 2")
    mean, low, high = summary.loss_difference(log, "phase 2", "phase 1")
    assert -0.0202 < low < mean < high < -0.0194  # though the seeds themselves differ by 0.4
    row = next(row for row in tables.final_losses(log).rows if row[0].text == "phase 2")
    assert row[2].text == f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"
    next(run for run in log["runs"] if run["name"] == "phase 2")["status"] = "diverged"
    assert summary.loss_difference(log, "phase 2", "phase 1") is None


def test_a_diverged_run_has_the_highest_final_loss():
    rows = {name.text: loss.text for name, loss, *_ in tables.final_losses(a_hard_log()).rows}
    assert rows["phase 5"] == "diverged"
    assert rows["phase 2"].endswith(" to diverged)")


def test_the_same_log_gives_the_same_bytes(written, tmp_path):
    paths = outputs.write_all(a_log(), tmp_path)
    assert sorted(paths) == sorted(tmp_path.iterdir())
    for path in paths:
        assert path.read_bytes() == (written["usual"] / path.name).read_bytes()


def test_plots_that_cannot_be_drawn_are_one_warning(tmp_path, monkeypatch, capsys):
    def fail(log):
        raise RuntimeError("no font")

    monkeypatch.setattr(plots, "draw", fail)
    assert [path.name for path in outputs.write_all(a_log(), tmp_path)] == ["compare.html", "compare.md"]
    assert capsys.readouterr().err == "warning: no plots were drawn (RuntimeError: no font)\n"


def test_absolute_figures_come_with_the_machine():
    log = a_log()
    for make in (tables.targets, tables.throughput, tables.runs):
        assert "Test chip" in tables.markdown(make(log))
    for picture in plots.draw(log):
        if picture.name in ("loss_seconds", "speed", "memory"):
            assert "Test chip" in picture.svg()


def test_a_table_has_as_many_cells_in_each_row():
    for make in tables.ALL:
        for log in (a_log(), a_hard_log()):
            lines = [line for line in tables.markdown(make(log)).splitlines() if line.startswith("|")]
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) <= 1


def test_our_losses_are_set_against_the_references_seed_by_seed():
    log = a_log({"phase 1": (2.45, 10_220.0, None), "phase 1 · torch": (2.45, 10_010.0, None)}, seeds=2)
    theirs = [run for run in log["runs"] if run["backend"] == "torch"]
    for run, by in zip(theirs, (0.25, -0.75), strict=True):
        ours = next(one for one in log["runs"] if one["seed"] == run["seed"])
        run["evals"] = [{**one, "valid_loss": one["valid_loss"] - by} for one in ours["evals"][:3]]
    ((name, count, largest, mean),) = tables.agreement(log).rows
    assert (name.text, count.text, largest.text, mean.text) == ("phase 1 · torch", "6", "0.7500", "-0.2500")


def cut_short(log, name, share):
    """The runs of a variant as they are where a rule stopped them after a share of the budget."""
    for run in summary.runs_of(log, name):
        run["evals"] = [one for one in run["evals"] if one["tokens"] <= share * BUDGET]


@pytest.mark.parametrize(("share", "said"), [(1, "> 5M"), (0.75, "> 3.75M"), (0.5, "> 2.5M")])
def test_what_was_not_reached_is_cut_where_its_runs_ended(share, said):
    log, nothing = a_log(ONE_TO_ONE), middle(None)
    cut_short(log, "phase 2", share)
    log["time_to_target"][1] |= {"clock": nothing, "tokens": nothing, "tokens_over_throughput": nothing}
    _, _, over_throughput, clock, tokens, _ = tables.targets(log).rows[1]
    assert tokens.text == said
    assert over_throughput.text == f"> {share * BUDGET / 1e4:,.0f}"
    assert clock.text == f"> {min(run['evals'][-1]['seconds'] for run in log['runs'][5:]):,.0f}"


def test_the_cut_is_of_a_run_that_missed_the_target():
    log = a_log(ONE_TO_ONE)
    slowest = max(summary.runs_of(log, "phase 2"), key=lambda run: run["evals"][-1]["seconds"])
    slowest["evals"] = [{**one, "valid_loss": 9.0} for one in slowest["evals"]]
    log["time_to_target"][1]["clock"] = middle(300.0, 250.0, None)
    assert tables.targets(log).rows[1][3].text == f"300 (250 to > {slowest['evals'][-1]['seconds']:,.0f})"


def test_a_bound_below_the_median_is_not_shown():
    log = a_log(ONE_TO_ONE)
    cut_short(log, "phase 2", 0.25)
    log["time_to_target"][1]["tokens"] = middle(1_500_000, 1_000_000, None)
    assert tables.targets(log).rows[1][4].text == "1.5M (1M to not reached)"


def test_a_parity_that_is_no_number_is_not_measured():
    log = a_log()
    log["parity"][0]["max_difference"] = None
    assert "| phase 1 | not measured | 200 |" in tables.markdown(tables.parity(log))


def test_settings_that_change_the_experiment_are_said(tmp_path):
    log = a_log(ONE_TO_ONE, settings={"dropout": 0.0, "n_layers": 8, "stories": 2000})
    outputs.write_all(log, tmp_path)
    for said in ((tmp_path / "compare.html").read_text(), (tmp_path / "compare.md").read_text(), on_terminal(log)):
        assert "5M tokens a run, dropout 0, 8 layers, 2,000 stories" in said
    del log["settings"]
    assert summary.setting(log).endswith("5M tokens a run"), "older logs hold none"


def test_numbers_are_sorted_as_numbers_and_what_was_not_reached_last(written):
    rows = [row for row in Page((written["hard"] / "compare.html").read_text()).rows if row]
    finals, speedups, targets = rows[:5], rows[5:9], rows[9:14]
    assert finals[4][1] == "Infinity", "every run of phase 5 diverged"
    assert [row[3] for row in speedups] == ["1.4", "0.0", "Infinity", "0.0"]
    assert [row[4] for row in targets] == ["1500000", "2000000", "Infinity", "1500000", "Infinity"]
    values = [value for row in rows for value in row if value is not None]
    assert all(np.isfinite(float(value)) or value == "Infinity" for value in values)


def test_an_ablation_is_a_ladder_of_all_its_rows():
    log = an_ablation()
    log["speedups"].reverse()
    ladder, tokens, *_ = plots.draw(log)
    (axes,) = ladder.figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"phase 3/{name[8:]}" for name in summary.variants(log)[1:]]  # the soonest first
    panels = [axes.get_title(loc="left") for axes in tokens.figure.axes if axes.get_visible()]
    assert panels == labels
    assert any("by chance alone" in remark for remark in summary.remarks(log))


def one_to_one(fate, **changes):
    log = a_log(ONE_TO_ONE, **changes)
    for row in log["speedups"]:
        row.update(dict.fromkeys(summary.MEASURES, fate))
    return log


SPEEDUP = "the speedup of phase 2 over phase 1 is"
TO, SLOWER = "faster to the target loss than phase 1", "No: phase 2 is 2.00× slower to the target loss than phase 1"


@pytest.mark.parametrize(
    ("fate", "said"),
    [
        (found(2.31, 1.9, 2.8), f"Yes: phase 2 is 2.31× {TO} (95 % interval 1.90–2.80)."),
        (found(0.5, 0.4, 0.8), f"{SLOWER} (95 % interval 1.25–2.50)."),
        (found(0.5, None, 0.8, "slower"), f"{SLOWER} (95 % interval > 1.25)."),
        (
            found(1.04, 0.93, 1.12),
            "No difference: the speedup of phase 2 over phase 1 is 1.04× (95 % interval 0.93–1.12)",
        ),
        (found(1.4, None, None), "Undecided: the speedup of phase 2 over phase 1 is 1.40×, with no interval"),
        (found(None, 1.7, None), f"Yes: phase 2 is more than 1.70× {TO}."),
        (found(None, None, 0.9), "No: phase 2 reaches the target loss with 5 of 5 seeds, phase 1 with 5 of 5 seeds."),
        (None, "Not known yet"),
    ],
)
def test_the_answer(fate, said):
    answer, *_ = summary.headline(one_to_one(fate))
    assert answer.replace("\u00a0", " ").startswith(said)


def test_the_answer_of_many():
    answer, counted, *_ = summary.headline(an_ablation())
    assert answer.startswith("Phase 3/rope pays most: it is 1.50× faster to the target loss than phase 3")
    assert counted == "Of 20 variants: 9 faster, 8 slower, 3 no difference."
    losing = an_ablation()
    losing["speedups"] = losing["speedups"][-8:]
    assert summary.headline(losing)[0].startswith("No: none of 8 variants")


def test_the_answer_where_only_the_reference_is_there_to_beat():
    log = a_log({"phase 1": (2.4, 1e4, None), "phase 1 · torch": (2.4, 1e4, (1.0, 0.9, 1.1))})
    (answer,) = summary.headline(log)
    assert answer == "Phase 1 has 1.02× (0.99–1.05) the throughput of PyTorch (no difference)."


def test_a_comparison_that_has_only_begun(tmp_path):
    log = a_log(ONE_TO_ONE, complete=False, throughput=[], speed=[], time_to_target=[], speedups=[], parity=[])
    log["runs"] = [a_run(run["name"], run["seed"], status="missing") for run in log["runs"]]
    log["target"]["loss"] = None
    outputs.write_all(log, tmp_path)
    text = Page((tmp_path / "compare.html").read_text()).text
    assert "Incomplete: nothing to compare has been measured yet." in text
    assert "Incomplete: 10 of 10 runs are missing" in text
    assert "There is no target loss" in text
    assert "phase 2 not measured" in text
    assert not list(tmp_path.glob("*.png"))


def test_a_narrow_terminal_cuts_nothing():
    for log in (a_log(), a_hard_log()):
        assert "…" not in on_terminal(log, 80).replace("A B A B …", "")


def test_one_seed_has_no_interval(tmp_path):
    log = one_to_one(found(1.4, None, None), seeds=1)
    assert "no interval" in tables.markdown(tables.speedups(log))
    assert "no difference" not in tables.markdown(tables.speedups(log)).split("\n\n")[0]
    assert any("Only one seed" in remark for remark in summary.remarks(log))
    assert all("seeds" not in picture.svg() for picture in plots.draw(log))


def test_colors_are_of_the_page():
    assert set(plots.COLORS) <= set(plots.ROLES.values())
    page = (Path(plots.__file__).parent / "page.html").read_text()
    light, dark = page.split("@media (prefers-color-scheme: dark)")
    for role, color in plots.ROLES.items():
        assert f"--{role}: {color};" in light
        assert f"--{role}: #" in dark


def in_a_log(bounds):
    """Low, value and high as bench.compare writes them: 0 and infinity are null."""
    low, value, high = (bound if 0 < bound < np.inf else None for bound in sorted(bounds))
    return value, low, high


intervals = st.lists(st.floats(1e-3, 1e3) | st.sampled_from([0.0, np.inf]), min_size=3, max_size=3).map(in_a_log)
fates = st.none() | intervals.map(lambda interval: found(*interval))
amounts = st.none() | intervals.map(lambda interval: middle(*interval))


@settings(max_examples=60)
@given(data=st.data())
def test_whatever_is_missing_can_be_said(data):
    log = a_log(ONE_TO_ONE)
    for row in log["speedups"]:
        row.update({key: data.draw(fates) for key in summary.MEASURES})
    for row in log["time_to_target"]:
        row.update({key: data.draw(amounts) for key in summary.MEASURES}, reached=data.draw(st.integers(0, 5)))
    statuses = st.sampled_from(["done", "diverged", "failed", "missing"])
    log["runs"] = [a_run(run["name"], run["seed"], status=data.draw(statuses)) for run in log["runs"]]
    before = copy.deepcopy(log)
    text = " ".join(
        [*summary.headline(log), *summary.remarks(log), *(tables.markdown(make(log)) for make in tables.ALL)]
    )
    assert not re.search(r"\b(nan|None|inf|Infinity)\b", text)
    assert log == before
    with drawing(plots.STYLE):
        plots.draw_ladder(log).figure.draw_without_rendering()


def test_a_target_that_says_nothing_is_told():
    met = a_log()
    met["target"]["loss"] = 1e9
    said = summary.remarks(met)
    assert "phase 2 reaches the target at its first evaluation: give a lower --target." in said
    assert not any("first evaluation" in remark for remark in summary.remarks(a_log()))
    missed = a_log({"phase 1": (2.45, 10_220.0, None), "phase 2": (2.2, 9_800.0, (None, None, None))})
    for row in missed["time_to_target"]:
        row["reached"] = 0
    assert summary.headline(missed)[0].startswith("Undecided: neither phase 2 nor phase 1 reaches the target loss")
