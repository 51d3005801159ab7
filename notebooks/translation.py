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
# # What a translator attends to
#
# The decoder of the 2017 model asks the encoder's output, the memory, for what it needs next (Vaswani et al. 2017,
# sec. 3.2.3): queries from the translation so far, keys and values from the source. The language Velan of the built-in
# pairs puts the verb last and owners and relative clauses before their noun, so that a translation cannot be read off
# from left to right: the maps below show where each token is taken from.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np

from bench.compare import plots
from bench.report import look
from mlx_transformer import load, translate

# %matplotlib inline
plt.style.use(["default", plots.STYLE])

RUN = os.environ.get("MLX_TRANSFORMER_TRANSLATOR")  # the folder of a translator's run; None: the newest
SENTENCES = [
    "the old king will give a red apple to the children",
    "the cat that the teacher saw sleeps in the garden",
    "the third of May nineteen eighty-four",
]

# %%
folder = look.find_run(RUN, holding="model/config.json", branch="translator")
model, tokenizer = load(folder)
found = translate(model, tokenizer, SENTENCES)
print(folder.name)
for one in found:
    print(f"{one.source}\n    {one.text}   (score {one.score:.2f})")

# %% [markdown]
# ## Where each token comes from
#
# Rows are tokens of the translation, columns those of the source; a row is the distribution of the attention with which
# that token is predicted, averaged over the heads and layers of cross-attention. A straight diagonal is a translation
# in order; a jump is a reordering: the last row of a sentence, its verb, looks to the beginning of the source.

# %%
figure, panels = plt.subplots(len(found), 1, figsize=(7.2, 3.2 * len(found)), layout="constrained")
for axes, one in zip(np.atleast_1d(panels), found, strict=True):
    maps, sources, targets = look.cross_attention(model, tokenizer, one)
    axes.imshow(maps.mean((0, 1)), cmap="Greys", vmin=0, aspect="auto")
    axes.set_xticks(range(len(sources)), sources, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(targets)), targets, fontsize=7)
    axes.set_title(one.source, fontsize=8)
plt.show()

# %% [markdown]
# ## The heads of the last layer
#
# Heads share the work: some find the word to translate next, some the number or the case of it.

# %%
maps, sources, targets = look.cross_attention(model, tokenizer, found[0])
heads = maps.shape[1]
figure, panels = plt.subplots(1, heads, figsize=(7.2, 3.4), sharey=True, squeeze=False, layout="constrained")
for head, axes in enumerate(panels[0]):
    axes.imshow(np.sqrt(maps[-1, head]), cmap="Greys", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(sources)), sources, rotation=90, fontsize=6)
    axes.set_title(f"head {head}", fontsize=8)
panels[0, 0].set_yticks(range(len(targets)), targets, fontsize=6)
plt.show()

# %% [markdown]
# ## Exact match by length
#
# Of the run's own figures: translations that equal the reference in every character, by the length of the source. The
# dashed line is the longest sentence of training. Sinusoidal positions beyond it were never seen, and it falls.

# %%
result, _ = look.read_run(folder)
figure, axes = plt.subplots(figsize=(7.2, 3), layout="constrained")
for (name, scores), mark in zip(result["quality"]["translations"].items(), ("o-", "s--"), strict=False):
    words, _, shares = zip(*scores["by_length"], strict=True)
    axes.plot(words, [100 * share for share in shares], mark, label=f"{name}: {100 * scores['exact_match']:.1f} %")
axes.axvline(14.5, color="k", linestyle="--", linewidth=0.8)
axes.set(xlabel="source length (words, classes of four by their first)", ylabel="exact match (%)", ylim=(-3, 103))
axes.grid(color=plots.RULE, linewidth=0.6)
axes.legend()
plt.show()
