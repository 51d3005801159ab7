"""Saved models: model.safetensors, config.json, the tokenizer's files, and code/ with the files of one's own model."""

import json
import warnings
from pathlib import Path
from typing import Any

from mlx_transformer.data.tokenizers import Tokenizer, load_tokenizer
from mlx_transformer.nn.model import Model
from mlx_transformer.nn.weights import WEIGHTS, check_depth, put_weights, read_weights, save_arrays
from mlx_transformer.run.ladder import Experiment, find_experiment
from mlx_transformer.run.own_code import Code, record
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.files import as_bad_input, write_json
from mlx_transformer.utils.trees import by_path

CODE = "code"  # folder of the copies of somebody's own files
KEPT = "kept"  # names those copies as the code to load


def load(run: str | Path, code: str | Path | None = None) -> tuple[Model, Tokenizer]:
    """Read a model, in evaluation mode, and its tokenizer from a run folder, its model/, or a folder of `save`.

    model(tokens) maps (B, L) int32 to logits (B, L, V).
    code: the file that defines a model of one's own, or "kept" for the copy in the folder. That file is run; without
        code nothing in the folder is. Warns if the file differs from the one that the model was trained with.

    Raises BadInput if the folder holds no model, a damaged one, or one that needs code.
    """
    folder = model_folder(run)
    described = read_config(folder)
    kind = _find_experiment(described, folder, code).find_branch(described.get("branch"))
    config = read_numbers(kind, described, folder)
    arrays = read_weights(folder)
    check_depth(config.n_layers, arrays, folder)
    model = kind(config)
    put_weights(model, arrays, folder)
    model.eval()
    tokenizer = load_tokenizer(folder)
    spare = config.vocab_size - tokenizer.vocab_size  # an imported model may pad its embedding
    if spare < 0 or (spare > 0 and tokenizer.kind != "hf"):
        raise BadInput(
            f"'{folder}' has a model of {config.vocab_size} tokens and a tokenizer of {tokenizer.vocab_size}: "
            "they do not belong together"
        )
    return model, tokenizer


def _find_experiment(described: dict[str, Any], folder: Path, code: str | Path | None) -> Experiment:
    """Return the experiment that defines the model of a config.json. Raises BadInput if unknown or without code."""
    recorded = described.get("code")
    if recorded is None:
        if code is not None:
            raise BadInput(f"'{folder}' holds a model of phase {described['phase']}, which takes no code: leave it out")
        return Experiment.of_phase(described["phase"])
    name, sha256 = (recorded.get(key) for key in ("file", "sha256")) if isinstance(recorded, dict) else (None, None)
    if not isinstance(name, str) or Path(name).name != name:
        raise BadInput(f"'{folder / 'config.json'}' is damaged: expected the name of a Python file in code")
    if code is None:
        raise BadInput(
            f"'{folder}' holds a model of the file '{name}', which runs only on request: give "
            f'code="{name}" (--code {name}), or code="kept" (--code kept) for the copy in the folder'
        )
    experiment = Experiment.of_file(_kept(folder, name) if code == KEPT else code)
    if experiment.code is None or experiment.code.sha256 != sha256:
        warnings.warn(f"'{code}' differs from the file that the model in '{folder}' was trained with", stacklevel=3)
    return experiment


def _kept(folder: Path, name: str) -> Path:
    """Return the copy of a file in a run folder or a folder of `save`. Raises BadInput if there is none."""
    for place in (folder, folder.parent):
        if (place / CODE / name).is_file():
            return place / CODE / name
    raise BadInput(f"'{folder}' has no copy of '{name}': give the file itself, code=\"{name}\" (--code {name})")


def save(folder: str | Path, model: Model, tokenizer: Tokenizer) -> None:
    """Write a model and its tokenizer for `load`, with a copy of the file that defines a model of one's own.

    Raises BadInput for a class that no file defines as Model or in BRANCHES; OSError if the folder cannot be written.
    """
    folder, (experiment, branch) = Path(folder), find_experiment(type(model))
    save_model(folder, model, tokenizer, experiment.phase, branch, experiment.code)
    if experiment.code is not None:
        experiment.code.keep(folder / CODE)


def save_model(
    folder: Path,
    model: Model,
    tokenizer: Tokenizer,
    phase: int | None,
    branch: str | None,
    code: Code | None = None,
) -> None:
    """Write weights, config.json and tokenizer; the same model gives the same bytes. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".model.safetensors"
    save_arrays(temporary, by_path(model.parameters()))
    temporary.replace(folder / WEIGHTS)
    tokenizer.save(folder)
    write_json(
        folder / "config.json",
        {
            "phase": phase,
            "branch": branch,
            "code": record(code),
            "config": model.config.to_dict(),
        },
    )


def model_folder(run: str | Path) -> Path:
    """Return RUN/model or RUN, the first that holds config.json. Raises BadInput if neither does."""
    for folder in (Path(run) / "model", Path(run)):
        with as_bad_input(folder):
            if (folder / "config.json").is_file():
                return folder
    raise BadInput(f"'{run}' holds no model: expected a run folder, or its model/, with a config.json")


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json, a dictionary with phase, branch, code and config. Raises BadInput."""
    path = folder / "config.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"'{path}' cannot be read ({error}): expected the JSON that a run writes") from error
    if not isinstance(described, dict) or not isinstance(described.get("config"), dict) or "phase" not in described:
        raise BadInput(f"'{path}' is no model of this project: expected the keys phase, branch and config")
    return described


def read_numbers(kind: type[Model], described: dict[str, Any], folder: Path) -> Any:
    """Make the Config of a config.json. Raises BadInput for unknown or impossible hyperparameters."""
    try:
        return kind.Config(**described["config"])
    except TypeError as error:
        raise BadInput(f"'{folder / 'config.json'}' does not fit the model: {error}") from error
