"""A trained model on disk: model/model.safetensors, config.json and the tokenizer's files."""

import json
from pathlib import Path
from typing import Any

from mlx_transformer.data.tokenizer import Tokenizer, load_tokenizer
from mlx_transformer.nn.model import Model
from mlx_transformer.nn.weights import WEIGHTS, check_depth, put_weights, read_weights, save_arrays
from mlx_transformer.run.ladder import find_branch, find_phase
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.files import usable, write_json
from mlx_transformer.utils.trees import by_path


def load(run: str | Path) -> tuple[Model, Tokenizer]:
    """A run folder, or its model/ -> the model in evaluation mode, and its tokenizer.

    model(tokens) maps (B, L) int32 to logits (B, L, V). Raises BadInput where the folder holds no model that fits.
    """
    folder = model_folder(run)
    described = read_config(folder)
    phase, branch = described["phase"], described.get("branch")
    module = find_phase(phase)
    kind = find_branch(module, branch)
    config = read_numbers(kind, described, folder)
    arrays = read_weights(folder)
    check_depth(config.n_layers, arrays, folder)
    model = kind(config)
    put_weights(model, arrays, folder)
    model.eval()
    tokenizer = load_tokenizer(folder)
    spare = config.vocab_size - tokenizer.vocab_size  # rows that an imported model may have and no piece uses
    if spare < 0 or (spare > 0 and tokenizer.kind != "hf"):
        raise BadInput(
            f"'{folder}' has a model of {config.vocab_size} pieces and a tokenizer of {tokenizer.vocab_size}: "
            "they do not belong together"
        )
    return model, tokenizer


def save_model(folder: Path, model: Model, tokenizer: Tokenizer, phase: int | None, branch: str | None) -> None:
    """Write weights, numbers and tokenizer; the same model gives the same bytes. Raises OSError if the disk refuses."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".model.safetensors"
    save_arrays(temporary, by_path(model.parameters()))
    temporary.replace(folder / WEIGHTS)
    tokenizer.save(folder)
    write_json(folder / "config.json", {"phase": phase, "branch": branch, "config": model.config.to_dict()})


def model_folder(run: str | Path) -> Path:
    """RUN or RUN/model, whichever holds config.json. Raises BadInput if neither does."""
    for folder in (Path(run) / "model", Path(run)):
        with usable(folder):
            if (folder / "config.json").is_file():
                return folder
    raise BadInput(f"'{run}' holds no model: expected a run folder, or its model/, with a config.json")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dictionary with phase, branch and config. Raises BadInput if it is not that."""
    path = folder / "config.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"'{path}' cannot be read ({error}): expected the JSON that a run writes") from error
    if not isinstance(described, dict) or not isinstance(described.get("config"), dict) or "phase" not in described:
        raise BadInput(f"'{path}' is no model of this project: expected the keys phase, branch and config")
    return described


def read_numbers(kind: type[Model], described: dict[str, Any], folder: Path) -> Any:
    """The Config of a config.json. Raises BadInput for unknown or impossible numbers."""
    try:
        return kind.Config(**described["config"])
    except TypeError as error:
        raise BadInput(f"'{folder / 'config.json'}' does not fit phase {described['phase']}: {error}") from error
