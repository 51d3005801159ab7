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
# # Train a model here, and watch it
#
# A model of size `nano` learns the built-in fables in about a minute on two cores, with a curve that is drawn while it
# trains. Stop it at any time and run the cell again: it continues from the step where it was. Then it writes, and shows
# what it attends to. At the end: how near each phase of the ladder comes to the entropy of the fables, which is known
# exactly.

# %%
import math
import os
import tempfile
import threading
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

import mlx_transformer as mt  # before mlx.core
from bench.compare import plots
from bench.report import look
from bench.report.logs import read_log
from bench.tools import floor as fables
from mlx_transformer.run.ladder import find_phase
from mlx_transformer.run.training import stop_on_signal

# %matplotlib inline
plt.style.use(["default", plots.STYLE])

PHASE = 6  # of the ladder, 1 to 6
SECONDS = float(os.environ.get("MLX_TRANSFORMER_SECONDS", 60))  # of training, for each time the cell below is run
TEXT = os.environ.get("MLX_TRANSFORMER_DATA", "fables")  # or a text of yours
SIZE = {"d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 256, "seq_len": 64}

# %% [markdown]
# ## The text and the model
#
# A token is a frequent piece of text (byte-pair encoding); the loss is the mean of $-\ln p$ of each token of the
# validation text, in nats. A uniform guess among $V$ tokens has a loss of $\ln V$. For the fables the lowest possible
# loss is known too, since a program wrote them and says with which probability.

# %%
data = mt.data.load(TEXT, vocab_size=1024 if TEXT == "fables" else None)
phase = find_phase(PHASE)
model = phase.Model(phase.Config(vocab_size=data.tokenizer.vocab_size, **SIZE), seed=0)
recipe = phase.RECIPE.at("nano")
entropy = None if data.floor_bits is None else data.floor_bits * math.log(2) / data.valid_tokens
checkpoints = tempfile.TemporaryDirectory()  # gone when the kernel ends
curve = look.LiveCurve(entropy)
trained = 0.0  # seconds that the cell below has been given

print(f"{data.epoch_tokens:,} training tokens of {TEXT}; {model.count_parameters()['total']:,} parameters")
print(f"a uniform guess has a loss of {math.log(data.tokenizer.vocab_size):.2f} nats per token")
print("the entropy of this text is not known" if entropy is None else f"the lowest possible loss is {entropy:.2f}")

# %% [markdown]
# ## Train
#
# `mt.fit` yields events (`Step`, `Eval`, `Saved`, `Stopped`): the curve is one of those who read them. *Interrupt* (the
# square button) ends the loop after the step at hand and saves; the cell continues from there, exactly, each time that
# it is run.

# %%
trained += SECONDS
stop = threading.Event()
limits = mt.train.Limits(max_seconds=trained)
curve.begin()
with stop_on_signal(stop):
    options = mt.train.RunOptions(checkpoints=Path(checkpoints.name), should_stop=stop.is_set)
    for event in mt.fit(model, recipe, data, limits=limits, options=options):
        curve.add(event)
progress = event.progress  # of Stopped, the last one
best, speed = progress.best_valid_loss, progress.tokens_per_second or 0
print(
    f"{event.why}: step {progress.step}, {progress.tokens:,} tokens, {speed:,.0f} tokens/s, best loss {best:.3f} nats"
)

# %% [markdown]
# ## What it writes
#
# With a lower temperature it takes fewer risks.

# %%
for temperature in (0.3, 0.8, 1.2):
    (story,) = mt.generate(model, data.tokenizer, "One day", temperature=temperature, max_tokens=60, seed=1)
    print(f"temperature {temperature}:", story.text.replace("\n", " "), end="\n\n")

# %% [markdown]
# ## What it attends to
#
# Rows are queries, columns keys, each row distributes a weight of 1 over the tokens so far; the shade is its square
# root. More of this in [attention.ipynb](attention.ipynb), and in the page of `python -m mlx_transformer serve RUN`.

# %%
(story,) = mt.generate(model, data.tokenizer, "One day", temperature=0.3, max_tokens=30, seed=1)
tokens = [data.tokenizer.bos_id, *data.tokenizer.encode("One day"), *story.tokens][: SIZE["seq_len"]]
maps = look.attention_maps(model, tokens)
figure, grid = plt.subplots(
    len(maps), SIZE["n_heads"], figsize=(7.2, 1.95 * len(maps)), sharex=True, sharey=True, layout="constrained"
)
for layer, row in enumerate(grid):
    for head, axes in enumerate(row):
        axes.imshow(np.sqrt(maps[layer][head]), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"layer {layer}, head {head}", fontsize=8)
figure.supxlabel("key (position)", fontsize=9)
figure.supylabel("query (position)", fontsize=9)
print(story.text)
plt.show()

# %% [markdown]
# ## The ladder, against the entropy
#
# The published runs of all phases on the fables (`python -m bench fables`): bits per byte as a multiple of the entropy,
# after equally many tokens and after equal time; and how many sentences the corpus's own parser finds consistent.
# How much faster each phase reaches a loss is in [ladder.ipynb](ladder.ipynb).

# %%
published = Path(look.ROOT) / "results" / "published" / "fables_nano" / "fables.json"
display(fables.draw(read_log(published)).figure)
if entropy is not None:
    print(f"yours: {best / entropy:.2f} times the entropy after {progress.tokens:,} tokens")
