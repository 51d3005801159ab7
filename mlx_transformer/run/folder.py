"""A run's folder: whether it may be written, its lock, its settings.json, and errors while it is written."""

import json
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mlx_transformer.run.ladder import Experiment
from mlx_transformer.run.own_code import record
from mlx_transformer.run.plan import Plan
from mlx_transformer.run.settings import SETTINGS, Settings, read_result, read_settings
from mlx_transformer.train.checkpoint import list_checkpoints
from mlx_transformer.utils.errors import BadInput, Interrupted, RunFailed, explain_out_of_memory
from mlx_transformer.utils.files import as_bad_input, check_place, lock_file, write_json

RESULTS = Path("results/phases")
CACHED_RUNS = Path("results/bench/runs")  # of comparisons, named by a fingerprint
RECIPE_CODE = "recipe_code"  # folder of the copy of the file that --recipe FILE.py:NAME names
_FILES = (SETTINGS, "result.json", "curve.jsonl", "report.md", "stories.md", "loss.png", "lengths.png", "log.txt")
_FOLDERS = ("model", "checkpoints", "code", RECIPE_CODE)


def check_folder(settings: Settings) -> None:
    """Raise BadInput if --out cannot be created or must not be overwritten, or if --resume cannot be resumed."""
    with as_bad_input(settings.resume or settings.out):
        if settings.resume is not None:
            _check_resume(settings.resume)
        elif settings.out is not None:
            _check_out(settings.out)


def _check_resume(folder: Path) -> None:
    if read_result(folder) is not None and not list_checkpoints(folder / "checkpoints"):
        raise BadInput(
            f"'{folder}' holds a run without its checkpoints, so it cannot be resumed: start a new one in another "
            f"--out, from the weights of this one with --init-from {shlex.quote(str(folder))}"
        )


def _check_out(out: Path) -> None:
    check_place(out)
    if out.is_dir() and any(not _is_begun(path) for path in out.iterdir()):
        if not _is_run(out):
            raise BadInput(f"--out '{out}' is not empty and holds no run: expected a folder that is new or empty")
        if _is_finished(out):
            raise BadInput(
                f"--out '{out}' holds a finished run: give another folder, or --resume it with a larger limit"
            )
        if list_checkpoints(out / "checkpoints"):
            raise BadInput(
                f"--out '{out}' holds an unfinished run: resume it with --resume {shlex.quote(str(out))}, "
                "or give another folder"
            )


def _is_begun(path: Path) -> bool:
    """Whether a run that was killed before its first file may leave this."""
    return path.name == ".lock" or re.fullmatch(rf"\.{re.escape(SETTINGS)}\.\d+\.tmp", path.name) is not None


def _is_run(folder: Path) -> bool:
    try:
        return bool(read_settings(folder))
    except BadInput:
        return False


def _is_finished(folder: Path) -> bool:
    result = read_result(folder)
    return result is not None and result["stopped"] != "interrupted"


def write_settings(folder: Path, plan: Plan) -> None:
    """Write settings.json: the settings, and what they have to lead to again when the run is resumed.

    A folder with this file alone is a run before its first step: `--resume FOLDER` trains it. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = {"phase": plan.experiment.phase, "flags": plan.settings.to_dict(), **_identity(plan)}
    write_json(folder / SETTINGS, stored)


def check_unchanged(folder: Path, plan: Plan) -> None:
    """Raise BadInput where the settings of a run folder lead to another model, text, tokenizer or code than before."""
    stored = read_settings(folder)
    for name, value in _identity(plan).items():
        if stored.get(name) != value:
            raise BadInput(
                f"'{folder}' was started with another {name} than there is now: it cannot be resumed; start a new run"
            )


def _identity(plan: Plan) -> dict[str, Any]:
    identity = {
        "code": record(plan.experiment.code),
        "recipe_code": record(plan.recipe_code),
        "corpus": plan.corpus.sha256,
        "config": plan.config.to_dict(),
        "recipe": plan.recipe.to_dict(),
        "tokenizer": plan.tokenizer.sha256,
    }
    return json.loads(json.dumps(identity))  # tuples become lists, as in the file


def new_folder(experiment: Experiment, branch: str | None) -> Path:
    """Return a folder below results/phases that does not exist yet, for a run without --out."""
    place = f"phase_{experiment.phase}" if experiment.code is None else ""
    name = "_".join(filter(None, (place, experiment.name, branch, time.strftime("%Y%m%d_%H%M%S"))))
    folder, nth = RESULTS / name, 2
    while folder.exists():
        folder, nth = RESULTS / f"{name}_{nth}", nth + 1
    return folder


@contextmanager
def lock_folder(folder: Path, settings: Settings) -> Iterator[bool]:
    """Create the folder and lock it; yield whether it is locked, as not every file system can.

    Raises BadInput if it cannot be created or another process holds the lock.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            locked = stack.enter_context(lock_file(folder / ".lock"))
        except BlockingIOError:
            raise BadInput(f"'{folder}' is being trained by another process: wait for it, or stop it") from None
        except OSError as error:
            raise BadInput(f"'{folder}' cannot be written ({error.strerror}): give another --out") from error
        for left in (*folder.glob(".*.[0-9]*.tmp"), *folder.glob("model/.*.[0-9]*.tmp")):  # of a killed process
            left.unlink()
        if settings.resume is None:
            check_folder(settings)  # again: another process may have trained here in the meantime
            _empty(folder)
        yield locked


def _empty(folder: Path) -> None:
    """Delete the files of a run, and nothing else."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


@contextmanager
def report_failures(resume: str, folder: Path) -> Iterator[None]:
    """Raise RunFailed for a full disk or memory, Interrupted for Ctrl-C; resume: the command that resumes the run."""
    try:
        with explain_out_of_memory("try a smaller --batch-size, --seq-len or --d-model"):
            yield
    except OSError as error:
        raise RunFailed(f"could not write to '{folder}': {error}; free some space, then: {resume}") from error
    except KeyboardInterrupt:
        raise Interrupted(f"stopped without saving; the last checkpoint stays; resume with: {resume}") from None
