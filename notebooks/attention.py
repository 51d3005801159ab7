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
# # Attention maps of a trained model
#
# Each head of each layer distributes a weight of 1 over the tokens so far (Vaswani et al. 2017, eq. 1):
#
# $$\mathrm{softmax}\left(\frac{q k^\top}{\sqrt{d_\mathrm{head}}}\right)$$
#
# Below: those weights for one story, and the sinusoids that encode the positions.

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
if model.parallel:
    raise look.NotThere(f"{folder.name} is a translator: see translation.ipynb, or choose another run")
tokens = [tokenizer.eos_id, *tokenizer.encode(STORY)][: model.config.seq_len]
labels = ["¶", *(tokenizer.token(token).replace("▁", "·") for token in tokens[1:])]
maps = look.attention_maps(model, tokens)
if not maps:
    raise look.NotThere(f"{folder.name} has no softmax attention: choose another run")
print(f"{folder.name}: {len(maps)} layers of {len(maps[0])} heads; {len(tokens)} tokens")

# %% [markdown]
# ## All heads
#
# Rows are queries, columns keys. Black is a weight of 1; the shade is the square root of the weight, so that small
# weights are visible. The causal mask leaves nothing right of the diagonal. Typical patterns: a line beside the
# diagonal
# (attention to the previous token), a dark left edge (attention to the document separator ¶, an attention sink), and
# columns (a word that many queries attend to).

# %%
layers, heads = len(maps), len(maps[0])
figure, grid = plt.subplots(
    layers, heads, figsize=(1.6 * heads, 1.7 * layers), sharex=True, sharey=True, squeeze=False, layout="constrained"
)
for layer, row in enumerate(grid):
    for head, axes in enumerate(row):
        axes.imshow(np.sqrt(maps[layer][head]), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"layer {layer}, head {head}", fontsize=8)
figure.supxlabel("key (position)", fontsize=9)
figure.supylabel("query (position)", fontsize=9)
plt.show()

# %% [markdown]
# ## Kinds of heads
#
# The mean weight on the token itself, on the previous token, and on the separator; and the mean distance to the key, in
# tokens. The first row of each map is left out, since it has one key only.

# %%
places = np.arange(len(tokens))
distance = np.maximum(places[:, None] - places, 0)
kinds = {
    "itself": lambda weights: np.diagonal(weights)[1:].mean(),
    "the previous token": lambda weights: np.diagonal(weights, -1).mean(),
    "the separator": lambda weights: weights[1:, 0].mean(),
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
panels[3].set_title("distance (tokens)", fontsize=8)
for at, value in np.ndenumerate(back):
    panels[3].text(*at[::-1], f"{value:.1f}", ha="center", va="center", fontsize=7)
for axes in panels:
    axes.set(xlabel="head", xticks=range(heads), yticks=range(layers))
panels[0].set_ylabel("layer")
plt.show()

# %% [markdown]
# ## One head, word by word
#
# The head with the least weight on the token itself, the previous one and the separator: the most likely one to attend
# by content. Set `LAYER` and `HEAD` to see another.

# %%
elsewhere = [[1 - sum(share(weights) for share in kinds.values()) for weights in layer] for layer in maps]
LAYER, HEAD = np.unravel_index(np.argmax(elsewhere), np.shape(elsewhere))

figure, axes = plt.subplots(figsize=(7.2, 7.2), layout="constrained")
image = axes.imshow(maps[LAYER][HEAD], cmap="Greys", vmin=0)
axes.set_xticks(places, labels, rotation=90, fontsize=7)
axes.set_yticks(places, labels, fontsize=7)
axes.set(xlabel="key", ylabel="query", title=f"Layer {LAYER}, head {HEAD}")
figure.colorbar(image, label="attention weight", shrink=0.6)
plt.show()

# %% [markdown]
# ## Positions: sinusoids
#
# Attention alone does not depend on the order of the tokens. Phase 1 adds to each embedding (Vaswani et al. 2017,
# sec. 3.5)
#
# $$PE(p, 2i) = \sin\left(p / 10000^{2i / d}\right), \quad PE(p, 2i + 1) = \cos\left(p / 10000^{2i / d}\right)$$
#
# The first dimensions oscillate fast and distinguish neighboring positions, the last ones hardly change within a
# context. The product of two encodings depends on their distance alone, so that a head can learn to attend to a fixed
# distance.

# %%
config = model.config
encoding = look.sinusoids(config)
similarity = encoding @ encoding.T / (encoding[0] @ encoding[0])

figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3), layout="constrained")
image = left.imshow(encoding[:, ::2], cmap="cividis", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
left.set(xlabel="i, the sines alone (dimension 2i)", ylabel="position p (tokens)")
figure.colorbar(image, ax=left, label="PE(p, 2i)")
middle = config.seq_len // 2
for place, line in ((middle // 2, "--"), (middle, "-")):
    distances = np.arange(config.seq_len) - place
    right.plot(distances, similarity[place], line, color=plots.BLUE, label=f"from position {place}")
right.set(xlabel="distance (tokens)", ylabel="product, as a share of that with itself")
right.grid(color=plots.RULE, linewidth=0.6)
right.legend()
plt.show()
