"""Runs of a variant: each in a process of its own, resumed where it stopped, found again once it is finished.

    run = Run.of(Variant(phase=1), Settings(size="nano", data="fables", max_tokens=100_000, seed=3))
    finished = execute(run)

A run in MLX is settings.json and the command that resumes it; one of the reference is bench/reference/train.py on the
same sequences, weights and evaluations. Its folder is named by the fingerprint of everything that decides the result:
code, settings, text, tokenizer, machine, versions.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.compare.sources import checksum, planned_checksum
from bench.compare.variants import Variant, own_value, settings_of
from bench.workers.machine import ROOT, threads, torch_device
from bench.workers.process import ALLOCATOR, INTERRUPTED, UNTOUCHED, environment, run_to_end
from bench.workers.training_step import save_weights
from mlx_transformer.backend import compiles, device_info, versions
from mlx_transformer.data.stream import validation_sequences
from mlx_transformer.run.folder import CACHED_RUNS, write_settings
from mlx_transformer.run.ladder import split_recipe
from mlx_transformer.run.plan import Plan, make_plan
from mlx_transformer.run.result import known_before
from mlx_transformer.run.settings import Settings, settings_type
from mlx_transformer.train.checkpoint import list_checkpoints
from mlx_transformer.train.trainer import default_eval_every
from mlx_transformer.utils.errors import RunFailed
from mlx_transformer.utils.files import lock_file, write_json

RUNS = CACHED_RUNS  # of all comparisons: a finished run is never repeated
# Settings that the fingerprint has in another form, such as the text's checksum, or that decide nothing.
_NOT_IN_FINGERPRINT = (
    "data",
    "valid",
    "text_column",
    "stories",
    "tokenizer",
    "device",
    "prompt",
    "quiet",
    "save_every",
    "log",
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A variant and the plan of its training: every choice made."""

    variant: Variant
    plan: Plan

    @classmethod
    def of(cls, variant: Variant, settings: Settings, say: Callable[[str], None] = lambda text: None) -> "Run":
        """Plan a run with these settings; branch, recipe and change are the variant's.

        Prepares the text and the tokenizer. Raises BadInput where a setting is impossible.
        """
        experiment = variant.experiment
        settings = replace(settings, branch=variant.branch, recipe=variant.recipe_name)
        plan = make_plan(experiment, settings, say)
        if variant.change and own_value(variant.change[0], plan.config, plan.recipe) != variant.change[1]:
            values = {field.name: getattr(settings, field.name) for field in fields(settings)}
            changed = settings_type(experiment)(**values | settings_of(variant.change, variant))
            plan = make_plan(experiment, changed, say)
        return cls(variant=variant, plan=plan)

    def with_settings(self, **changed: Any) -> "Run":
        """Return it with another seed, or settings that change no other part of the plan, such as eval_every."""
        seed = changed.get("seed", self.plan.seed)
        return replace(self, plan=replace(self.plan, seed=seed, settings=replace(self.plan.settings, **changed)))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides the result, its times included."""
        plan, variant = self.plan, self.variant
        settings = {name: value for name, value in plan.settings.to_dict().items() if name not in _NOT_IN_FINGERPRINT}
        if (named := split_recipe(settings.get("recipe") or "")) is not None:
            settings["recipe"] = named[1]  # its file stands in files, wherever it lies
        parts = {
            "code": planned_checksum(*self._sources),
            "files": [code.sha256 for code in (plan.experiment.code, plan.recipe_code) if code is not None],
            "variant": [variant.phase, variant.branch, variant.backend, variant.copy],
            "settings": settings,
            "config": plan.config.to_dict(),
            "recipe": plan.recipe.to_dict(),
            "limits": asdict(plan.limits),
            "seed": plan.seed,
            "corpus": plan.corpus.sha256,
            "tokenizer": plan.tokenizer.sha256,
            "machine": [device_info().describe(), threads()],
            "versions": versions() if variant.backend == "mlx" else importlib.metadata.version("torch"),
            "compiles": variant.backend == "mlx" and compiles(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]

    @property
    def _sources(self) -> tuple[int | None, tuple[Path, ...], str]:
        files = [code.path for code in (self.plan.experiment.code, self.plan.recipe_code) if code is not None]
        return self.variant.phase, tuple(files), self.variant.backend

    def check_code(self) -> None:
        """Raise RunFailed if the code is no longer what the fingerprint says."""
        try:
            same = checksum(*self._sources) == planned_checksum(*self._sources)
            for code in (self.plan.experiment.code, self.plan.recipe_code):
                now = {} if code is None else {name: (code.path.parent / name).read_bytes() for name in code.files}
                same = same and (code is None or now == code.files)
        except (OSError, SyntaxError):  # it is being edited
            same = False
        if not same:
            name = f"{self.variant.name}, seed {self.plan.seed},"
            raise RunFailed(f"the code changed while {name} was planned or trained: give the command again")

    @property
    def batch_size(self) -> int:
        """Sequences of a step."""
        return self.plan.recipe.batch_size(self.plan.config.seq_len)

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.plan.config.seq_len

    @property
    def evaluate_every(self) -> int:
        """Steps between two evaluations."""
        plan = self.plan
        return plan.settings.eval_every or default_eval_every(plan.recipe, plan.tokens, plan.config.seq_len)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The state of a run. status: done, diverged, failed (error says why) or missing."""

    status: str
    result: dict[str, Any] | None = None
    evals: tuple[dict[str, Any], ...] = ()  # tokens, seconds (of the training clock), valid_loss
    error: str | None = None
    folder: Path | None = None


MISSING = Finished(status="missing")


def find_finished(run: Run, cache: Path = RUNS) -> Finished:
    """Find a run in the cache: done, diverged or missing."""
    folder = cache / run.fingerprint
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return MISSING
    if result["stopped"] == "interrupted":
        return MISSING
    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()]
    evals = tuple(
        {name: line[name] for name in ("tokens", "seconds", "valid_loss")}
        for line in lines
        if line["kind"] == "eval" and line["valid_loss"] is not None
    )
    status = "diverged" if result["stopped"] == "diverged" else "done"
    return Finished(status=status, result=result, evals=evals, folder=folder)


def has_checkpoint(run: Run, cache: Path = RUNS) -> bool:
    """Whether an unfinished run can be resumed."""
    folder = cache / run.fingerprint
    return bool(list_checkpoints(folder / "checkpoints")) or (folder / "checkpoint.npz").exists()


def execute(run: Run, cache: Path = RUNS, say: Callable[[str], None] = lambda text: None) -> Finished:
    """Make a run, resume it, or find it finished; its progress is said.

    A run that fails is a result, and it is tried again the next time. Raises KeyboardInterrupt once an interrupted run
    has saved, and RunFailed if the code changed since the run was planned.
    """
    folder = (cache / run.fingerprint).absolute()
    _wait_for_others(folder)
    finished = find_finished(run, cache)
    if finished.status != "missing":
        _tidy(folder)
        return finished
    run.check_code()
    try:
        command, variables = _prepare(run, folder)
    except OSError as error:
        return Finished(status="failed", error=f"could not write to '{folder}': {error}")
    ended = run_to_end(command, variables, watch=lambda seconds: say(f"    {progress(run, folder, seconds)}"))
    try:
        run.check_code()
    except RunFailed:
        shutil.rmtree(folder, ignore_errors=True)  # nobody knows which code made it
        raise
    if ended.code == INTERRUPTED:
        raise KeyboardInterrupt
    finished = find_finished(run, cache)
    if finished.status == "missing":
        return Finished(status="failed", error=ended.reason)
    _tidy(folder)
    return finished


def progress(run: Run, folder: Path, seconds: float) -> str:
    """Say how far a run is after so many seconds, by the last whole line of its curve.jsonl."""
    path, limits = folder / "curve.jsonl", run.plan.limits
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if not (whole := [line for line in lines if line.endswith("}")]):
        return f"{seconds:.0f} s: no step logged yet"
    last = json.loads(whole[-1])
    pairs = (("tokens", limits.max_tokens), ("step", limits.max_steps), ("seconds", limits.max_seconds))
    share = max((last[name] / limit for name, limit in pairs if limit), default=0.0)
    name, loss = ("validation loss", last["valid_loss"]) if last["kind"] == "eval" else ("loss", last["loss"])
    shown = "not finite" if loss is None else f"{loss:.3f}"
    return f"{seconds:.0f} s: step {last['step']:,}, {share:.0%} of the budget, {name} {shown}"


def _wait_for_others(folder: Path) -> None:
    """Wait until no other process trains in the folder: a run whose parent was killed continues to its end."""
    if folder.is_dir():
        with lock_file(folder / ".lock", wait=True):
            pass


def _prepare(run: Run, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Write what a run starts from; return python's arguments and the environment to make it. Raises OSError."""
    if run.variant.backend != "mlx":
        _lay_out(run, folder)
        return ["-m", "bench.reference.train", str(folder)], environment(**UNTOUCHED, **ALLOCATOR)
    if not list_checkpoints(folder / "checkpoints"):
        write_settings(folder, run.plan)
    code = run.plan.experiment.code
    program = ["-m", f"phases.phase{run.variant.phase}"] if code is None else [str(code.path)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # for a file that lies elsewhere
    return [*program, f"--resume={folder}", "--quiet"], environment(PYTHONPATH=path)


def _lay_out(run: Run, folder: Path) -> None:
    """Write what bench/reference/train.py reads, task.json last."""
    if (folder / "task.json").exists():
        return
    plan, backend = run.plan, run.variant.backend
    folder.mkdir(parents=True, exist_ok=True)
    budget = plan.limits.max_tokens
    assert budget is not None, "a reference is trained for a number of tokens"
    _write_sequences(folder / "sequences.npy", run, -(-budget // run.step_tokens))
    valid = validation_sequences(plan.tokens.valid, plan.config.seq_len)
    for name, values in zip(("valid", "mask"), valid, strict=True):
        np.save(folder / f"{name}.npy", values)
    model = plan.make_model()
    save_weights(folder / "weights.npz", model)
    about = known_before(plan, model)
    about["versions"] = {"torch": importlib.metadata.version("torch"), "python": about["versions"]["python"]}
    task = {
        "phase": run.variant.phase,
        "branch": run.variant.branch,
        "config": plan.config.to_dict(),
        "recipe": plan.recipe.to_dict(),
        "compiled": backend == "torch-compile",
        "device": torch_device(),
        "threads": threads(),
        "seed": plan.seed,
        "batch_size": run.batch_size,
        "eval_every": run.evaluate_every,
        "max_tokens": budget,
        "bits_per_nat": plan.bits_per_byte(1.0),
        "about": {**about, "backend": backend},
    }
    write_json(folder / "task.json", task)


def _write_sequences(path: Path, run: Run, steps: int) -> None:
    """Write the training sequences (steps * batch size, L + 1) of a run in their order."""
    tokens, seq_len, size = run.plan.tokens, run.plan.config.seq_len, run.batch_size
    batches = tokens.batches(size, seq_len, run.plan.seed)
    out = np.lib.format.open_memmap(path, "w+", tokens.train.dtype, (steps * size, seq_len + 1))
    for i in range(0, len(out), size):
        out[i : i + size] = next(batches)
    out.flush()


def _tidy(folder: Path) -> None:
    """Remove what only resuming needs."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for path in (*folder.glob("*.npy"), *folder.glob("*.npz")):
        path.unlink()


def keep_logs(finished: Finished, folder: Path, name: str) -> None:
    """Copy a run's logs, without its weights, so that the results stand by themselves."""
    if finished.folder is None:
        return
    place = folder / re.sub("[^a-z0-9-]+", "_", name.replace(":", "-"))  # 6/x and 6:x are two
    place.mkdir(parents=True, exist_ok=True)
    for file in ("result.json", "curve.jsonl"):
        shutil.copyfile(finished.folder / file, place / file)


def missing_references(runs: Sequence[Run]) -> list[str | None]:
    """Return for each run why it has no reference in PyTorch, or None where it has one. Raises RunFailed."""
    tasks = [
        {"phase": run.variant.phase, "branch": run.variant.branch, "recipe": run.plan.recipe.to_dict()} for run in runs
    ]
    ended = run_to_end(["-m", "bench.reference.check"], stdin=json.dumps(tasks))
    if ended.code == INTERRUPTED:
        raise KeyboardInterrupt
    if ended.code:
        raise RunFailed(f"PyTorch cannot be used: {ended.reason}")
    return [_why_no_reference(run) or reason for run, reason in zip(runs, json.loads(ended.stdout), strict=True)]


def _why_no_reference(run: Run) -> str | None:
    """Return why nothing can be a reference of a run, or None."""
    code, task = run.plan.experiment.code, run.plan.corpus.task
    if code is not None:
        return f"{code.path.name} is no phase"
    return None if task is None else f"its loss counts every token, that of task:{task} the answers alone"
