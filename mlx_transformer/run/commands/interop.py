"""`python -m mlx_transformer.interop import DIR RUN | export RUN DIR`: Hugging Face folders to runs and back."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from mlx_transformer.interop import read_model, write_model
from mlx_transformer.nn.model import Model
from mlx_transformer.run.commands import dispatch
from mlx_transformer.run.commands.model import load_model
from mlx_transformer.run.flags import Argument, RunArgument, parse
from mlx_transformer.run.ladder import find_branch, find_phase
from mlx_transformer.run.saved import model_folder, read_config, save_model
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.files import check_new, new_folder

COMMANDS = {
    "import": ("mlx_transformer.run.commands.interop:import_command", "convert a Hugging Face folder to a run"),
    "export": ("mlx_transformer.run.commands.interop:export_command", "convert a run to a Hugging Face folder"),
}


def main(prog: str = "python -m mlx_transformer.interop", args: list[str] | None = None) -> None:
    """Run the command line."""
    dispatch(COMMANDS, prog, args)


@dataclass
class ImportFlags:
    """Convert a GPT-2, Llama, Mistral or Qwen3 from a Hugging Face folder to a run."""

    source: Argument
    """folder with config.json, model.safetensors and tokenizer.json"""
    run: RunArgument
    """run folder to write; new or empty"""


@dataclass
class ExportFlags:
    """Convert a run to a folder for transformers' from_pretrained."""

    run: RunArgument
    """a run folder, or its model/"""
    target: Argument
    """folder to write; new or empty"""


def import_command(prog: str, args: list[str]) -> None:
    """Print what `import_model` returns."""
    flags = parse(ImportFlags, prog, args=args)
    print(import_model(flags.source, flags.run))


def export_command(prog: str, args: list[str]) -> None:
    """Print what `export_model` returns."""
    flags = parse(ExportFlags, prog, args=args)
    print(export_model(flags.run, flags.target))


def import_model(folder: Path, run: Path) -> str:
    """Write a run with the model of a Hugging Face folder; return notes and the command that trains it further.

    Raises BadInput as `read_model` does and if run is not new or empty; RunFailed if it cannot be written.
    """
    check_new(run)
    model = read_model(folder, _find_model)
    with new_folder(run) as temporary:
        save_model(temporary / "model", model.model, model.tokenizer, model.phase, model.branch)
    notes, dropout = list(model.notes), find_phase(model.phase).RECIPE.dropout
    if model.dropout != dropout:
        notes.append(f"note: dropout is {model.dropout} there, and {dropout} in training here without --dropout")
    command = f"python -m phases.phase{model.phase}" + (f" --branch {model.branch}" if model.branch else "")
    notes.append(
        f"phase {model.phase} in '{run}'; train it with: {command} --init-from {shlex.quote(str(run))} --data TEXT"
    )
    return "\n".join(notes)


def export_model(run: Path, folder: Path) -> str:
    """Write a run's model as a Hugging Face folder; return a sentence that says which libraries load it.

    Raises BadInput and RunFailed as `load` and `write_model` do.
    """
    check_new(folder)
    described = read_config(model_folder(run))
    if described.get("code") is not None:
        raise BadInput(f"'{run}' holds a model of your own file, which no library reads: no export to Hugging Face")
    model, tokenizer = load_model(run, None)
    return write_model(model, tokenizer, described["phase"], described.get("branch"), folder)


def _find_model(phase: int, branch: str | None) -> type[Model]:
    return find_branch(find_phase(phase), branch)
