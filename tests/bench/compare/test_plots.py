"""Plots of a comparison show intervals, markers and names whole."""

import numpy as np
import pytest

from bench.compare import plots
from mlx_transformer.run.plots import drawing
from tests.bench.compare.compare_logs import a_log


def drawn(log):
    """The axes of each plot by its name."""
    return {plot.name: plot.figure.axes[0] for plot in plots.draw(log)}


def test_titles_of_small_panels_do_not_overlap():
    names = [f"phase 6/phase_5_with_value_embeddings_{i}:phase_5" for i in range(9)]
    log = a_log({"phase 5": (2.4, 1e4, None), **dict.fromkeys(names, (2.3, 10000.0, (1.4, 1.2, 1.6)))})
    figure = next(plot.figure for plot in plots.draw(log) if plot.name == "loss_tokens")
    with drawing(plots.STYLE):
        figure.draw_without_rendering()
        boxes = [axes._left_title.get_window_extent() for axes in figure.axes if axes.get_title(loc="left")]
    assert len(boxes) == len(names)
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    assert max(box.x1 for box in boxes) <= figure.bbox.x1


def test_intervals_of_the_throughput_are_drawn_whole():
    log = a_log()
    log["throughput"][0]["tokens_per_second"] |= {"median": 10_000.0, "low": 9_000.0, "high": 30_000.0}
    assert drawn(log)["speed"].get_xlim()[1] > 30_000


@pytest.mark.parametrize(("largest", "unit", "value"), [(2**30 - 1, "MiB", 256), (2**31, "GiB", 0.25)])
def test_memory_has_one_unit(largest, unit, value):
    log = a_log()
    for row, size in zip(log["throughput"], (largest, *[2**28] * 9), strict=False):
        row["memory_bytes"] = size
    axes = drawn(log)["memory"]
    assert axes.get_xlabel().startswith(f"{unit} on ")
    assert axes.patches[1].get_width() == value
    assert f"{value} {unit}" in [text.get_text() for text in axes.texts]


def test_the_last_marker_of_a_curve_is_inside_the_axes():
    for over in ("tokens", "seconds"):
        axes = drawn(a_log())[f"loss_{over}"]
        ends = [line.get_xdata()[-1] for line in axes.get_lines() if len(line.get_xdata()) > 2]
        assert max(ends) * 1.01 < axes.get_xlim()[1]


def test_markers_of_a_curve_do_not_touch():
    """The seeds' evaluations lie close together in time: two of a cluster would be one marker doubled."""
    for over in ("tokens", "seconds"):
        axes = drawn(a_log())[f"loss_{over}"]
        for line in axes.get_lines():
            if line.get_marker() in plots.MARKERS and len(line.get_xdata()) > 2:
                marked = line.get_xdata()[line.get_markevery()]
                assert len(marked) > 5
                assert np.diff(marked).min() > 0.06 * axes.get_xlim()[1]


def test_the_band_over_seeds():
    def run(losses, status="done"):
        evals = [{"tokens": 10 * i, "seconds": 1.0 * i, "valid_loss": loss} for i, loss in enumerate(losses, 1)]
        return {"status": status, "evals": evals}

    x, low, median, high = plots.band([run([4, 3, 2]), run([5, 4, 3]), run([9, 8, 7])], "tokens")
    np.testing.assert_array_equal([x, low, median, high], [[10, 20, 30], [4, 3, 2], [5, 4, 3], [9, 8, 7]])
    x, low, median, high = plots.band([run([4, 3, 2]), run([5, 4, 3]), run([3, 2], "diverged")], "seconds")
    np.testing.assert_array_equal([x, low, median, high], [[1, 2, 3], [3, 2, 2], [4, 3, 3], [5, 4, 3]])
    x, low, median, high = plots.band([run([4, 3]), run([5], "failed")], "tokens")  # of two, the median is no more
    np.testing.assert_array_equal([x, low, median, high], [[10, 20], [4, 3], [4.5, np.nan], [5, 3]])
    x, low, median, high = plots.band([run([4, 3, 2]), run([5]), run([6])], "tokens")  # the others stopped by a plateau
    np.testing.assert_array_equal([x, low, median, high], [[10, 20, 30], [4, 3, 2], [5, 5, 5], [6, 6, 6]])
    late = {"status": "done", "evals": [{"tokens": 10, "seconds": 2.5, "valid_loss": 6}]}
    np.testing.assert_array_equal(plots.band([run([4, 3, 2]), late], "seconds")[:3], [[2.5, 3], [2.5, 2], [4.25, 4]])
    assert len(plots.band([run([])], "tokens")[0]) == 0
