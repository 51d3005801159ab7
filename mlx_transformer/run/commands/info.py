"""`python -m mlx_transformer info [RUN]`: the device and versions, or a saved model."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from mlx_transformer.backend import matmul_gflops, report, use_device
from mlx_transformer.run.commands.model import load_model
from mlx_transformer.run.flags import Folder, Place, parse
from mlx_transformer.run.saved import model_folder, read_config
from mlx_transformer.utils.errors import BadInput


@dataclass
class Flags:
    """Print what MLX computes on here and how fast; with RUN a saved model's parameters and configuration."""

    run: Annotated[Folder, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = None
    """a run folder, or its model/"""
    code: Place = None
    """file that defines the model, for a model of your own; kept: the copy in the run folder"""
    device: str = "auto"
    """auto, gpu or cpu"""
    seconds: float = 2.0
    """duration of the matmul measurement"""


def main(prog: str = "python -m mlx_transformer info", args: list[str] | None = None) -> None:
    """Run the command line."""
    flags = parse(Flags, prog, args=args)
    if not flags.seconds > 0:
        raise BadInput(f"--seconds {flags.seconds}: expected a number above 0")
    use_device(flags.device)
    if flags.run is None:
        print("\n".join(report()))
        print(f"matmul     {matmul_gflops(flags.seconds):.0f} GFLOP/s (float32, 2048 x 2048)")
        return
    described = read_config(model_folder(flags.run))
    model, tokenizer = load_model(flags.run, flags.code)
    rows = {
        "phase": described["phase"] or "none",
        "branch": described.get("branch") or "none",
        "code": (described.get("code") or {}).get("file", "none"),
        "parameters": f"{model.count_parameters()['total']:,}",
        "tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens",
        **model.config.to_dict(),
    }
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))
