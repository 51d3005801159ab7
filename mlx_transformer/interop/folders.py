"""Conversion between a Hugging Face folder and a model in memory."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_transformer.data.tokenizers import Tokenizer
from mlx_transformer.interop.formats import FORMATS, ConfigDict, Format
from mlx_transformer.interop.tokenizer import read_tokenizer, tokenizer_files
from mlx_transformer.interop.weights import Weights, from_hf, to_hf
from mlx_transformer.nn.model import Model
from mlx_transformer.nn.weights import check_finite, save_arrays
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.files import atomic_write, check_new, new_folder, write_json
from mlx_transformer.utils.trees import by_path

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


FindModel = Callable[[int, str | None], type[Model]]


@dataclass(frozen=True)
class ImportedModel:
    """A model read from a Hugging Face folder."""

    model: Model
    tokenizer: Tokenizer
    phase: int
    branch: str | None  # of the phase
    dropout: float  # of config.json, in training
    notes: tuple[str, ...]  # sentences on what differs from the original in training or sampling


def read_model(folder: Path, find_model: FindModel) -> ImportedModel:
    """Read a folder that transformers' save_pretrained wrote: config, weights (as float32) and tokenizer.

    find_model(phase, branch) gives the class of the model. Raises BadInput for an architecture that no phase holds and
    for weights or a tokenizer that do not fit.
    """
    hf = _read_json(folder / _CONFIG)
    form = _find_form(hf, folder)
    branch, values = form.read(hf)
    kind = find_model(form.phase, branch)
    config = kind.Config(**values)
    weights = form.clean(_read_weights(folder), branch)
    if config.n_layers > len(weights):  # checked before the layers are made
        raise BadInput(f"'{folder}' has {len(weights)} weights: too few for the {config.n_layers} layers of {_CONFIG}")
    model = kind(config)
    shapes = {path: value.shape for path, value in by_path(model.parameters()).items()}
    ours = from_hf(form.weights, weights, shapes)
    check_finite(ours, folder)
    model.load_weights(list(ours.items()))
    tokenizer = read_tokenizer(folder, hf.get("eos_token_id"))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise BadInput(
            f"'{folder}' has a tokenizer of {tokenizer.vocab_size} tokens and a model of {model.config.vocab_size}: "
            "they do not belong together"
        )
    model.eval()
    notes = tuple(_notes(form, hf, branch, values, tokenizer))
    return ImportedModel(model, tokenizer, form.phase, branch, values.get("dropout", 0.0), notes)


def write_model(model: Model, tokenizer: Tokenizer, phase: int, branch: str | None, folder: Path) -> str:
    """Write a folder for transformers' from_pretrained; return a sentence that says which libraries load it.

    Raises BadInput for a phase or a tokenizer without such a form and if folder is not new or empty; RunFailed if it
    cannot be written.
    """
    check_new(folder)
    form = _form_of(phase, branch)
    config = form.write(branch, model.config.to_dict())
    if why := form.transformers(config):
        raise BadInput(f"transformers cannot hold such a model: {why}")
    config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    weights = to_hf(form.weights, by_path(model.parameters()))
    files = tokenizer_files(tokenizer, model.config.seq_len)
    with new_folder(folder) as temporary:
        save_arrays(temporary / _WEIGHTS, weights)
        for name, content in files.items():
            atomic_write(temporary / name, content)
        write_json(temporary / _CONFIG, config)
    hindrance = form.mlx_lm(config)
    also = f"mlx-lm cannot hold it: {hindrance}" if hindrance else "mlx-lm can hold it too"
    return f"{form.architecture} in '{folder}', for transformers' AutoModelForCausalLM and AutoTokenizer; {also}"


def _form_of(phase: int, branch: str | None) -> Format:
    for form in FORMATS:
        if form.phase == phase and branch in form.branches.values():
            return form
    held = ", ".join(
        dict.fromkeys(f"phase {f.phase}{f'/{name}' if name else ''}" for f in FORMATS for name in f.branches.values())
    )
    name = f"phase {phase}{f'/{branch}' if branch else ''}"
    raise BadInput(f"{name} is not exported to Hugging Face: {held} are")


def _find_form(hf: ConfigDict, folder: Path) -> Format:
    for form in FORMATS:
        if form.fits(hf):
            return form
    held = ", ".join(dict.fromkeys(f"{form.model_type} (phase {form.phase})" for form in FORMATS))
    raise BadInput(f"'{folder}' holds a model of type {hf.get('model_type')!r}: supported are {held}")


def _notes(form: Format, hf: ConfigDict, branch: str | None, values: ConfigDict, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield a note for each difference in training or sampling, the logits being the same, and for ignored values."""
    for ignored in form.unused(hf):
        yield f"note: {ignored} is ignored, as it is in transformers"
    back = form.write(branch, values)
    only_written = {key.hf: key.absent for key in form.config_keys if not key.read}
    for key, absent in {**only_written, **{key: absent for key, (_, absent) in form.training.items()}}.items():
        theirs = absent if hf.get(key) is None else hf[key]
        if theirs != back[key]:
            yield f"note: {key} = {theirs} there is {back[key]} here"
    for what, key, own in (("begin", "bos", tokenizer.bos_id), ("end", "eos", tokenizer.eos_id)):
        ids = hf.get(f"{key}_token_id")
        if ids is not None and own not in (ids if isinstance(ids, list) else [ids]):
            yield f"note: texts {what} with token {ids} there, and with {own}, the tokenizer's {key.upper()}, here"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"'{path}' cannot be read ({error}): expected a folder that save_pretrained wrote") from error
    if not isinstance(value, dict):
        raise BadInput(f"'{path}' holds no JSON object: expected a folder that save_pretrained wrote")
    return value


def _read_weights(folder: Path) -> Weights:
    """Read their weights by name. Raises BadInput unless they are sound safetensors."""
    arrays: Weights = {}
    for path in _weight_files(folder):
        try:
            arrays.update(mx.load(str(path)))  # type: ignore[arg-type]
        except (OSError, RuntimeError, ValueError) as error:
            raise BadInput(f"'{path}' cannot be read ({error}): expected sound weights in 16 or 32 bits") from error
    return arrays


def _weight_files(folder: Path) -> list[Path]:
    """Find the single file, else the files of an index, as from_pretrained does. Raises BadInput for neither."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        places = _read_json(folder / _INDEX).get("weight_map")
        names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else [""]
        if not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
            raise BadInput(f"'{folder / _INDEX}' names files that are no safetensors of this folder")
        return [folder / name for name in names]
    if pickled := sorted(folder.glob("*.bin")):
        raise BadInput(
            f"'{pickled[0]}' is a pickle, which can run any code when it is read: expected {_WEIGHTS}, "
            "which save_pretrained of transformers writes"
        )
    return [folder / _WEIGHTS]
