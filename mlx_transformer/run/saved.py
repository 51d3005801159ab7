"""Saved models: model.safetensors, config.json, the tokenizer's files, and code/ with the files of one's own model."""

import json
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_transformer.data.tokenizers import Tokenizer, load_tokenizer
from mlx_transformer.nn.model import Model
from mlx_transformer.nn.patches import class_of, without_patches
from mlx_transformer.nn.weights import TABLES, WEIGHTS, check_depth, load_tables, put_weights, read_weights, save_arrays
from mlx_transformer.run.ladder import Experiment, find_experiment
from mlx_transformer.run.own_code import Code, record
from mlx_transformer.run.settings import SETTINGS, read_result
from mlx_transformer.train.checkpoint import arrays_of, list_checkpoints, load_newest, step_of
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.files import as_bad_input, write_json
from mlx_transformer.utils.trees import by_path

CODE = "code"  # folder of the copies of somebody's own files
KEPT = "kept"  # names those copies as the code to load


def load(
    run: str | Path, code: str | Path | None = None, *, divide: Callable[[Model], object] | None = None
) -> tuple[Model, Tokenizer]:
    """Read a model, in evaluation mode, and its tokenizer from a run folder, its model/, or a folder of `save`.

    model(tokens) maps (B, L) int32 to logits (B, L, V).
    code: the file that defines a model of one's own, or "kept" for the copy in the folder. That file is run; without
        code nothing in the folder is. Warns if the file differs from the one that the model was trained with.
    divide: leaves the model a part of its weights, of which alone are then in memory (`put_weights`).

    The weights are those of the newest checkpoint while a run is unfinished. Warns of that, and of a run that diverged.

    Raises BadInput if the folder holds no model, a damaged one, or one that needs code.
    """
    folder = model_folder(run)
    described = read_config(folder)
    kind = _find_experiment(described, folder, code).find_branch(described.get("branch"))
    kind = class_of(kind, described["config"])
    config = read_numbers(kind, described, folder)
    arrays, path, notes = find_weights(folder)
    check_depth(kind.n_blocks(config), arrays, path)
    model = kind(config)
    put_weights(model, arrays, path, divide)
    load_tables(model, folder)
    for note in notes:
        warnings.warn(note, stacklevel=2)
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

    Raises BadInput for a class that no file defines as Model or in BRANCHES, and for a run folder, in which `load`
    would find the run's model; OSError if the folder cannot be written.
    """
    if (Path(folder) / "model" / "config.json").is_file():
        raise BadInput(f"'{folder}' is the folder of a run, which has a model already: give another folder")
    folder, (experiment, branch) = Path(folder), find_experiment(without_patches(type(model)))
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
    save_tables(folder, model)
    save_description(folder, model, tokenizer, phase, branch, code)


def save_tables(folder: Path, model: Model) -> None:
    """Write what the model took from its training text, if anything. Raises OSError."""
    if arrays := model.tables():
        folder.mkdir(parents=True, exist_ok=True)
        save_arrays(folder / f".{TABLES}", arrays)
        (folder / f".{TABLES}").replace(folder / TABLES)


def save_description(
    folder: Path, model: Model, tokenizer: Tokenizer, phase: int | None, branch: str | None, code: Code | None = None
) -> None:
    """Write what `save_model` writes except for the weights, which are in a checkpoint so far. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
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


def find_weights(folder: Path) -> tuple[dict[str, mx.array], Path, list[str]]:
    """Return the weights of a model folder by parameter path, where they are from, and sentences on what they are.

    Those of an unfinished run are in its newest checkpoint: the best ones so far, once it was evaluated. Raises
    BadInput if there are none, or they cannot be read.
    """
    run = folder.absolute().parent
    if folder.name != "model" or not (run / SETTINGS).is_file():
        return read_weights(folder), folder / WEIGHTS, []
    result, checkpoints = read_result(run), run / "checkpoints"
    saved = list_checkpoints(checkpoints)
    if saved and (result is None or step_of(saved[-1]) > result["steps"]):
        found = load_newest(checkpoints)
        assert found is not None
        arrays, state, notes = found
        evaluated = state["progress"]["best_valid_loss"] is not None
        note = f"'{run}' is unfinished: the {'best ' if evaluated else ''}weights up to step {state['step']} are used"
        return arrays_of("best" if evaluated else "model", arrays), checkpoints, [*notes, note]
    if result is None and not (folder / WEIGHTS).is_file():
        raise BadInput(f"'{run}' has no weights yet: wait for its first checkpoint, or resume it")
    notes = []
    if result is not None and result["stopped"] == "diverged":
        which = "initial ones" if result["best_valid_loss"] is None else "best before it"
        notes = [f"'{run}' diverged at step {result['steps']}: its weights are the {which}"]
    return read_weights(folder), folder / WEIGHTS, notes


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
        known = {field.name for field in fields(kind.Config)}
        foreign = ", ".join(name for name in described["config"] if name not in known) or str(error)
        raise BadInput(
            f"'{folder / 'config.json'}' has what {kind.__module__}.{kind.__name__} has not ({foreign}): "
            "expected the model that was trained there; of a file of one's own, the same file or --code kept"
        ) from error
