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
# # The ladder: does an idea pay?
#
# Reads the `compare.json` of `python -m bench.compare`: the newest one, or that which you name.

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
# How much faster than the baseline does a variant reach the same validation loss? 2× is half the time. Each bar is the
# 95 % interval over seeds of the ratio of medians: **where it crosses the line at 1, the measurement found no
# difference**, wherever the dot stands.

# %%
if summary.ladder(log):
    display(plots.draw_ladder(log).figure)
display(Markdown(tables.markdown(tables.speedups(log))))

# %% [markdown]
# Three measures stand beside each other. *Tokens* asks how much text the idea needs; it is exact for a seed. The
# *clock* asks how long that took here. *Tokens ÷ throughput* divides them by the throughput measured interleaved with
# the others, so that a busy machine does not decide. An idea that needs fewer tokens but makes each slower can lose.

# %% [markdown]
# ## What a token costs
#
# Speed and memory, the reference in PyTorch hatched.

# %%
if log["throughput"]:
    display(plots.draw_speed(log).figure, plots.draw_memory(log).figure)
display(Markdown(tables.markdown(tables.speed(log))))

# %% [markdown]
# ## Does the answer hang on the target?
#
# A target of half the budget is a higher loss, which is reached earlier; one of two budgets a lower one. An idea that
# pays at all of them pays; one that only learns faster at first has a line that falls.

# %%
key = summary.headline_measure(log)
figure, axes = plt.subplots(figsize=(plots.WIDTH, 3.2), layout="constrained")
names = list(dict.fromkeys(one["name"] for one in log["speedups"]))
for i, name in enumerate(names):
    rows = [one for one in log["speedups"] if one["name"] == name and one[key] and one[key]["ratio"]]
    look_of = {"color": plots.COLOURS[i % len(plots.COLOURS)], "marker": plots.MARKERS[i % len(plots.MARKERS)]}
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
