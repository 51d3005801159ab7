"""Plot every learning-rate schedule and the batch warm-up, from the classes that training uses.

`python -m bench schedules` writes docs/schedules.png.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_transformer.run.flags import parse
from mlx_transformer.run.plots import drawing, short, write_png
from mlx_transformer.train.optim.schedules import (
    WSD,
    BatchWarmup,
    Constant,
    Cosine,
    CosineRestarts,
    InverseSqrt,
    Linear,
    Schedule,
)

TOKENS = 5_000_000
_WARMUP = {"warmup_tokens": 400_000}
SHOWN: dict[str, Schedule] = {
    "constant": Constant(**_WARMUP),
    "inverse square root": InverseSqrt(**_WARMUP),
    "linear": Linear(**_WARMUP, total_tokens=TOKENS),
    "cosine, to a tenth": Cosine(**_WARMUP, total_tokens=TOKENS, final=0.1),
    "cosine with restarts": CosineRestarts(**_WARMUP, cycle_tokens=700_000, growth=2),
    "warm-up, stable, decay": WSD(**_WARMUP, decay_tokens=2_000_000, total_tokens=TOKENS),
}
BATCH = BatchWarmup(tokens=1_500_000, doublings=2)
_COLORS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe & Ito 2008
_LINES = ("-", "--", "-", "-.", ":", "--")


@dataclass
class Flags:
    """Plot every learning-rate schedule."""

    out: Path = Path("docs/schedules.png")
    """the PNG file"""


@drawing()
def draw(path: Path) -> None:
    """Write the picture as a PNG. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.4), dpi=110, layout="constrained")
    rates, batch = figure.subplots(2, height_ratios=(3, 1), sharex=True)
    tokens = np.linspace(1, 1.1 * TOKENS, 2000)
    for (name, schedule), color, line in zip(SHOWN.items(), _COLORS, _LINES, strict=True):
        rates.plot(tokens, [schedule(t) for t in tokens], line, color=color, linewidth=1.8, label=name)
    rates.set_ylabel("share of the peak learning rate")
    figure.legend(loc="outside lower center", ncols=len(SHOWN) // 2, edgecolor="none", fontsize=9)
    batch.step(tokens, [BATCH.batch_size(64, int(t)) for t in tokens], where="post", color=_COLORS[0], linewidth=1.8)
    batch.set_ylabel("batch size")
    batch.set_yticks([16, 32, 64])
    batch.set_ylim(0, 70)
    batch.set_xlabel("training tokens")
    batch.xaxis.set_major_formatter(lambda t, _: short(t))
    for axes in (rates, batch):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    write_png(figure, path)


def main(prog: str = "python -m bench schedules", args: list[str] | None = None) -> None:
    """Run the command line."""
    flags = parse(Flags, prog, args=args)
    draw(flags.out)
    print(f"written: {flags.out}")
