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
# # Curves of a run, and of a comparison
#
# The log of a training run (`curve.jsonl`), and a comparison of several phases over several seeds (`compare.json`). By
# default the newest run and the newest comparison, else published ones.

# %%
import math
import os

import matplotlib.pyplot as plt
from IPython.display import display

from bench.compare import plots, summary
from bench.report import look
from bench.report.logs import read_log
from mlx_transformer.run.plots import series, short, title

# %matplotlib inline
plt.style.use(["default", plots.STYLE])

RUN = os.environ.get("MLX_TRANSFORMER_RUN")  # the folder of a run, such as results/phases/phase_1_...
COMPARISON = os.environ.get("MLX_TRANSFORMER_COMPARISON")  # a compare.json

# %%
folder = look.find_run(RUN)
result, curve = look.read_run(folder)
print(f"{folder.name}: {title(result)}, {short(result['parameters']['total'])} parameters, {result['device']['name']}")

# %% [markdown]
# ## Loss
#
# In nats per token; a loss of $\ell$ is a perplexity of $e^\ell$. The dashed line is the uniform guess; where the
# entropy of the text is known, a dotted line shows it, the lower bound. A growing gap between training and validation
# loss is overfitting. The training loss is noisier, since each point is one batch, and dropout increases it.

# %%
uniform = math.log(result["tokenizer"]["vocab_size"])
bits, loss = result["best_valid_bpb"], result["best_valid_loss"]
floor = result["corpus"]["floor_bpb"]

figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.2), sharey=True, layout="constrained")
for axes, over in zip(panels, ("tokens", "seconds"), strict=True):
    for kind, key, look_of in (
        ("log", "loss", {"color": "#e69f00", "linewidth": 0.9, "label": "training"}),
        ("eval", "valid_loss", {"color": plots.BLUE, "marker": "o", "markersize": 3, "label": "validation"}),
    ):
        axes.plot(series(curve, kind, over)[1], series(curve, kind, key)[1], **look_of)
    axes.axhline(uniform, color=plots.MUTED, linestyle="--", linewidth=1, label="uniform guess")
    if floor and bits:
        axes.axhline(floor * loss / bits, color="#009e73", linestyle=":", linewidth=1.6, label="entropy of the text")
    axes.grid(color=plots.RULE, linewidth=0.6)
panels[0].set(xlabel="training tokens", ylabel="loss (nats per token)")
panels[0].xaxis.set_major_formatter(lambda tokens, _: short(tokens))
panels[1].set(xlabel="training time (s), without validation and saving")
panels[0].legend()
plt.show()

# %% [markdown]
# ## Behind the loss
#
# The learning-rate schedule; the gradient norm before clipping, which rises sharply before a run diverges; and the
# throughput, which other programs on the machine reduce.

# %%
figure, panels = plt.subplots(1, 3, figsize=(7.2, 2.4), layout="constrained")
for axes, (key, label) in zip(
    panels,
    (("learning_rate", "learning rate"), ("grad_norm", "norm of the gradient"), ("tokens_per_second", "tokens/s")),
    strict=True,
):
    axes.plot(*series(curve, "log", key), color=plots.BLUE, linewidth=1)
    axes.set(xlabel="training tokens", ylabel=label, ylim=(0, None))
    axes.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
    axes.grid(color=plots.RULE, linewidth=0.6)

# %% [markdown]
# ## A comparison
#
# Validation loss over tokens (sample efficiency) and over training time (on this machine). Lines are medians over
# seeds, bands the range over seeds: where bands overlap, other seeds could reverse the order.

# %%
log = read_log(look.find_comparison(COMPARISON))
print(summary.setting(log))
for remark in summary.remarks(log):
    print("-", remark)

# %%
for over in ("tokens", "seconds"):
    display(plots.draw_loss(log, over).figure)
