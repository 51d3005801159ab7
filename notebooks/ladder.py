# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A comparison of variants
#
# Reads the `compare.json` of `python -m bench.compare`: the newest, or the one named below.

# %%
import os

import matplotlib.pyplot as plt
from IPython.display import Markdown, display

from bench.compare import plots, summary, tables
from bench.report import look
from bench.report.logs import read_log

# %matplotlib inline
plt.style.use(["default", plots.STYLE])

COMPARISON = os.environ.get("MLX_TRANSFORMER_COMPARISON")  # a compare.json

# %%
log = read_log(look.find_comparison(COMPARISON))
for sentence in (*summary.headline(log), summary.setting(log), summary.describe_machine(log), *summary.remarks(log)):
    print(sentence)

# %% [markdown]
# ## Speedup to the target loss
#
# How much faster a variant reaches the target loss than the baseline; 2× is half the time. Each bar is the 95 %
# interval over seeds of the ratio of medians: **an interval that contains 1 is no difference**.

# %%
if summary.ladder(log):
    display(plots.draw_ladder(log).figure)
display(Markdown(tables.markdown(tables.speedups(log))))

# %% [markdown]
# Three measures: *tokens* to the target, exact for a seed; the training *clock*; and *tokens ÷ throughput*, with the
# throughput that was measured interleaved, so that load on the machine does not matter. A variant that needs fewer
# tokens but has a lower throughput can be slower.

# %% [markdown]
# ## Throughput and memory
#
# The PyTorch reference is hatched.

# %%
if log["throughput"]:
    display(plots.draw_speed(log).figure, plots.draw_memory(log).figure)
display(Markdown(tables.markdown(tables.speed(log))))

# %% [markdown]
# ## Dependence on the target loss
#
# The target after half the budget is a higher loss, the one after two budgets a lower one. The line of a variant that
# is faster only at first falls.

# %%
key = summary.headline_measure(log)
figure, axes = plt.subplots(figsize=(plots.WIDTH, 3.2), layout="constrained")
names = list(dict.fromkeys(one["name"] for one in log["speedups"]))
for i, name in enumerate(names):
    rows = [one for one in log["speedups"] if one["name"] == name and one[key] and one[key]["ratio"]]
    look_of = {"color": plots.COLORS[i % len(plots.COLORS)], "marker": plots.MARKERS[i % len(plots.MARKERS)]}
    x = [one["share_of_budget"] * 1.03 ** (i - len(names) / 2) for one in rows]  # beside each other
    for at, one in zip(x, rows, strict=True):
        low, high = one[key]["low"], one[key]["high"]
        if low and high:
            axes.plot([at, at], [low, high], color=look_of["color"], linewidth=1)
    axes.plot(x, [one[key]["ratio"] for one in rows], linewidth=0.8, label=name, **look_of)
axes.axhline(1, color=plots.INK, linewidth=0.8)
axes.set_xscale("log", base=2)
axes.set_xticks([0.5, 1, 2], ["½", "1", "2"])
axes.set_yscale("log")
plots.mark_ratios(axes.yaxis, *axes.get_ylim())
axes.set(xlabel="target: phase 1's loss after so many budgets", ylabel=f"speedup by {summary.MEASURES[key]}")
axes.grid(axis="y", color=plots.RULE, linewidth=0.6)
figure.legend(loc="outside upper left", ncols=3)
plt.show()
