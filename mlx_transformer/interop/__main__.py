"""The command line of `python -m mlx_transformer.interop`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from mlx_transformer.interop import export_model, import_model
from mlx_transformer.run.flags import Argument, parse
from mlx_transformer.utils.errors import exit_cleanly


@dataclass
class Flags:
    """Bring a model in from a folder of Hugging Face's, or a run's out into one."""

    command: Annotated[Literal["import", "export"], tyro.conf.Positional]
    """import DIR RUN, or export RUN DIR"""
    source: Argument
    """import: a folder with config.json, model.safetensors, tokenizer.json; export: a run folder, or its model/"""
    target: Argument
    """a new folder: the run, or what from_pretrained reads"""


def main() -> None:
    """The command line."""
    flags = parse(Flags, "python -m mlx_transformer.interop")
    work = {"import": import_model, "export": export_model}[flags.command]
    print(work(flags.source, flags.target))


if __name__ == "__main__":
    exit_cleanly(main)
