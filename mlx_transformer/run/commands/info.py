"""`python -m mlx_transformer info [RUN]`: the installation, or a saved model."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from mlx_transformer.backend import device_info, versions
from mlx_transformer.run.flags import Folder, parse
from mlx_transformer.run.saved import load, model_folder, read_config


@dataclass
class Flags:
    """Print versions and device; with RUN also a saved model's phase, parameters, tokenizer and configuration."""

    run: Annotated[Folder, tyro.conf.Positional] = None
    """a run folder, or its model/"""


def main(prog: str = "python -m mlx_transformer info", args: list[str] | None = None) -> None:
    """Run the command line."""
    flags = parse(Flags, prog, args=args)
    rows = {**versions(), "device": device_info().describe()}
    if flags.run is not None:
        described = read_config(model_folder(flags.run))
        model, tokenizer = load(flags.run)
        rows |= {
            "phase": described["phase"],
            "branch": described.get("branch") or "none",
            "parameters": f"{model.count_parameters()['total']:,}",
            "tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens",
            **model.config.to_dict(),
        }
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))
