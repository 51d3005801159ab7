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
# # What attention looks at
#
# Each head of each layer spreads a weight of 1 over the pieces so far (Vaswani et al. 2017, eq. 1):
#
# $$\mathrm{softmax}\left(\frac{q k^\top}{\sqrt{d_\mathrm{head}}}\right)$$
#
# Here are those weights for one story, and the sinusoids that tell the model where a piece stands.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np

from bench.compare import plots
from bench.report import look
from mlx_transformer import load

# %matplotlib inline
plt.style.use(["default", plots.STYLE])

RUN = os.environ.get("MLX_TRANSFORMER_RUN")  # the folder of a run with its model; None: the newest
STORY = "Once upon a time, there was a girl named Lily. Lily had a red ball. One day, Lily lost her ball in the park."

# %%
folder = look.find_run(RUN, holding="model/config.json")
model, tokenizer = load(folder)
tokens = [tokenizer.eos_id, *tokenizer.encode(STORY)][: model.config.seq_len]
pieces = ["¶", *(tokenizer.token(token).replace("▁", "·") for token in tokens[1:])]
maps = look.attention_maps(model, tokens)
if not maps:
    raise look.NotThere(f"{folder.name} has no softmax attention: choose another run")
print(f"{folder.name}: {len(maps)} layers of {len(maps[0])} heads; {len(tokens)} pieces")

# %% [markdown]
# ## All heads
#
# A row is the piece that looks, a column the piece that is looked at; black is all of the weight, and the shade is the
# square root of the weight, so that small shares are seen. Nothing is right of the diagonal: no piece sees what comes
# after it. Look for a line beside the diagonal (the piece before), a dark left edge (the boundary ¶, where a head looks
# that has nothing to say), and columns (a word that many come back to).

# %%
layers, heads = len(maps), len(maps[0])
figure, grid = plt.subplots(
    layers, heads, figsize=(1.6 * heads, 1.7 * layers), sharex=True, sharey=True, squeeze=False, layout="constrained"
)
for layer, row in enumerate(grid):
    for head, axes in enumerate(row):
        axes.imshow(np.sqrt(maps[layer][head]), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"layer {layer}, head {head}", fontsize=8)
figure.supxlabel("looked at (place of the piece)", fontsize=9)
figure.supylabel("looking (place of the piece)", fontsize=9)
plt.show()

# %% [markdown]
# ## What kind of head is it?
#
# The mean share of the weight that goes to the piece itself, to the one before, and to the boundary; and the mean
# distance, in pieces, that a head looks back. The first row of each map is left out, since it has no choice.

# %%
places = np.arange(len(tokens))
distance = np.maximum(places[:, None] - places, 0)
kinds = {
    "itself": lambda weights: np.diagonal(weights)[1:].mean(),
    "the piece before": lambda weights: np.diagonal(weights, -1).mean(),
    "the boundary": lambda weights: weights[1:, 0].mean(),
}
figure, panels = plt.subplots(1, 4, figsize=(7.2, 0.8 + 0.45 * layers), layout="constrained")
for axes, (name, share) in zip(panels, kinds.items(), strict=False):
    shares = np.array([[share(weights) for weights in layer] for layer in maps])
    axes.imshow(shares, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    axes.set_title(f"share of {name}", fontsize=8)
    for at, value in np.ndenumerate(shares):
        axes.text(*at[::-1], f"{value:.2f}", ha="center", va="center", fontsize=7, color="w" if value > 0.5 else "k")
back = np.array([[(weights * distance)[1:].sum(-1).mean() for weights in layer] for layer in maps])
panels[3].imshow(back, cmap="Greys", vmin=0, vmax=2 * back.max(), aspect="auto")
panels[3].set_title("distance (pieces)", fontsize=8)
for at, value in np.ndenumerate(back):
    panels[3].text(*at[::-1], f"{value:.1f}", ha="center", va="center", fontsize=7)
for axes in panels:
    axes.set(xlabel="head", xticks=range(heads), yticks=range(layers))
panels[0].set_ylabel("layer")
plt.show()

# %% [markdown]
# ## One head, word by word
#
# The head that looks least at the piece itself, the one before and the boundary: what is left is the most likely to be
# about the story. Put in another `LAYER` and `HEAD` to see another.

# %%
elsewhere = [[1 - sum(share(weights) for share in kinds.values()) for weights in layer] for layer in maps]
LAYER, HEAD = np.unravel_index(np.argmax(elsewhere), np.shape(elsewhere))

figure, axes = plt.subplots(figsize=(7.2, 7.2), layout="constrained")
image = axes.imshow(maps[LAYER][HEAD], cmap="Greys", vmin=0)
axes.set_xticks(places, pieces, rotation=90, fontsize=7)
axes.set_yticks(places, pieces, fontsize=7)
axes.set(xlabel="looked at", ylabel="looking", title=f"Layer {LAYER}, head {HEAD}")
figure.colorbar(image, label="share of the weight", shrink=0.6)
plt.show()

# %% [markdown]
# ## Where a piece stands: sinusoids
#
# Attention by itself sees a set, not a sequence. Phase 1 adds to each embedding (Vaswani et al. 2017, sec. 3.5)
#
# $$PE(p, 2i) = \sin\left(p / 10000^{2i / d}\right), \quad PE(p, 2i + 1) = \cos\left(p / 10000^{2i / d}\right)$$
#
# The first dimensions turn fast and tell neighbours apart, the last ones hardly move within a context. The product of
# two places depends on their distance alone, so that a head can learn to look so many pieces back.

# %%
config = model.config
encoding = look.sinusoids(config)
similarity = encoding @ encoding.T / (encoding[0] @ encoding[0])

figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3), layout="constrained")
image = left.imshow(encoding[:, ::2], cmap="cividis", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
left.set(xlabel="i, the sines alone (dimension 2i)", ylabel="position p (pieces)")
figure.colorbar(image, ax=left, label="PE(p, 2i)")
middle = config.seq_len // 2
for place, line in ((middle // 2, "--"), (middle, "-")):
    distances = np.arange(config.seq_len) - place
    right.plot(distances, similarity[place], line, color=plots.BLUE, label=f"from place {place}")
right.set(xlabel="distance (pieces)", ylabel="product, as a share of that with itself")
right.grid(color=plots.RULE, linewidth=0.6)
right.legend()
plt.show()
