"""Contenders and their runs: each run a process of its own, resumed where it stopped, found again when it is finished.

    run = Run.of(Contender(phase=1), Settings(size="nano", data="fables", max_tokens=100_000, seed=3))
    finished = execute(run)

A run of ours is the command that a person would type, `python -m phases.phase1 ... --out FOLDER`; one of a reference
is bench/reference/train.py over the same rows, weights and evaluations. FOLDER is named by the fingerprint of all that
decides the result: code, settings, text, tokenizer, machine, versions.
"""

import ast
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.workers.machine import ROOT, threads, torch_device
from bench.workers.process import ALLOCATOR, INTERRUPTED, UNTOUCHED, environment, run_to_end
from bench.workers.training_step import save_weights
from mlx_transformer.backend import compiles, device_info, matmul_gflops, versions
from mlx_transformer.data.stream import Batches, validation_sequences
from mlx_transformer.run.folder import write_settings
from mlx_transformer.run.ladder import Experiment, find_branch, find_phase
from mlx_transformer.run.plan import Plan, make_plan
from mlx_transformer.run.result import known_before
from mlx_transformer.run.settings import Settings
from mlx_transformer.train.checkpoint import list_checkpoints
from mlx_transformer.train.trainer import default_eval_every
from mlx_transformer.utils.errors import BadInput, RunFailed
from mlx_transformer.utils.files import write_json

RUNS = Path("results/bench/runs")  # of all comparisons: a finished run is never repeated
BACKENDS = ("mlx", "torch", "torch-compile")
DEFAULT = "default"  # the phase's own RECIPE
_MATMUL_SHARE = 0.3  # of the matmul rate that a training step is thought to reach, before anything is known
# Settings that the fingerprint holds in another form (the text's checksum), or that decide nothing.
_UNMARKED = ("data", "valid", "stories", "tokenizer", "device", "prompt", "quiet", "save_every")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is compared. copy: of one that stands there more than once, so that it is run again."""

    phase: int
    branch: str | None = None
    recipe: str = DEFAULT
    backend: str = "mlx"
    copy: int = 1

    @classmethod
    def read(cls, text: str) -> "Variant":
        """From "2", "3/rope" (a branch), "2:original" (a recipe) or both. Raises BadInput for what is not there."""
        match = re.fullmatch(r"(\d{1,9})(?:/([^:]+))?(?::(.+))?", text)
        if match is None:
            raise BadInput(f"--phases {text!r}: expected a phase such as 2, 3/BRANCH, 2:RECIPE or 3/BRANCH:RECIPE")
        phase, branch, recipe = match.groups()
        module = find_phase(int(phase))
        find_branch(module, branch)
        if recipe not in (None, DEFAULT, *module.RECIPES):
            known = ", ".join(sorted(module.RECIPES)) or "none besides its own"
            raise BadInput(f"recipe '{recipe}' is unknown in phase {phase}: it has {known}")
        return cls(phase=int(phase), branch=branch, recipe=recipe or DEFAULT)

    @property
    def is_alone(self) -> bool:
        """Whether it adds one idea to the previous phase, `phase_<n-1>_with_X`, and not to its own phase."""
        added = f"phase_{self.phase - 1}_with_"
        return any(name.startswith(added) for name in (self.branch or "", self.recipe))

    @property
    def name(self) -> str:
        """ "phase 3/rope:original #2 · torch": what differs from a phase's trunk in MLX."""
        branch = f"/{self.branch}" if self.branch else ""
        recipe = f":{self.recipe}" if self.recipe != DEFAULT else ""
        copy = f" #{self.copy}" if self.copy > 1 else ""
        backend = f" · {self.backend}" if self.backend != "mlx" else ""
        return f"phase {self.phase}{branch}{recipe}{copy}{backend}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A contender and one plan of the trainer's: every choice made."""

    variant: Variant
    plan: Plan

    @classmethod
    def of(cls, variant: Variant, flags: Settings, say: Callable[[str], None] = lambda text: None) -> "Run":
        """The run that the flags of a training command ask for; branch and recipe are the contender's.

        Raises BadInput where they cannot be followed. Prepares the text and the tokenizer.
        """
        recipe = None if variant.recipe == DEFAULT else variant.recipe
        plan = make_plan(Experiment.of_phase(variant.phase), replace(flags, branch=variant.branch, recipe=recipe), say)
        return cls(variant=variant, plan=plan)

    def with_settings(self, **changed: Any) -> "Run":
        """The same with another seed, or settings that change no other part of the plan, such as eval_every."""
        seed = changed.get("seed", self.plan.seed)
        return replace(self, plan=replace(self.plan, seed=seed, settings=replace(self.plan.settings, **changed)))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of all that decides the result, its times included."""
        plan, own = self.plan, self.variant
        marked = {
            "code": _code(own.phase, own.backend),
            "contender": asdict(own),
            "settings": {name: value for name, value in plan.settings.to_dict().items() if name not in _UNMARKED},
            "config": plan.config.to_dict(),
            "recipe": plan.recipe.to_dict(),
            "limits": asdict(plan.limits),
            "seed": plan.seed,
            "corpus": plan.corpus.sha256,
            "tokenizer": plan.tokenizer.sha256,
            "machine": [device_info().describe(), threads()],
            "versions": versions() if own.backend == "mlx" else importlib.metadata.version("torch"),
            "compiles": own.backend == "mlx" and compiles(),
        }
        return hashlib.sha256(json.dumps(marked, sort_keys=True).encode()).hexdigest()[:20]

    @property
    def step_tokens(self) -> int:
        return self.plan.recipe.batch_size(self.plan.config.seq_len) * self.plan.config.seq_len

    @property
    def evaluate_every(self) -> int:
        """Steps between two evaluations."""
        plan = self.plan
        return plan.settings.eval_every or default_eval_every(plan.recipe, plan.tokens, plan.config.seq_len)


_DECIDING = [f"mlx_transformer.{name}" for name in ("trainer", "generate", "plan", "quality", "data.fables")]


def _checksum(phase: int, backend: str) -> str:
    """Of the sources that a run's losses and times depend on; Python's comments and layout do not count."""
    files = _imported([f"phases.phase{phase}", *_DECIDING])
    files |= set() if backend == "mlx" else set((ROOT / "bench" / "reference").rglob("*.py"))
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT)}\n{_statements(path)}\n".encode())
    for path in sorted((ROOT / "mlx_transformer").glob("*.cpp")) if backend == "mlx" else ():
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _statements(path: Path) -> str:
    """What a source file does: without layout, comments and docstrings."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


_code = functools.cache(_checksum)  # as it was when the first run of its kind was planned


def _imported(modules: Sequence[str]) -> set[Path]:
    """The files of these modules of ours and of those that they import at their top, and so on."""
    files: set[Path] = set()
    todo = list(modules)
    while todo:
        path = ROOT.joinpath(*todo.pop().split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if path in files or not path.is_file():
            continue  # seen; or a name inside a module, not a module
        files.add(path)
        for node in ast.parse(path.read_bytes()).body:
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return files


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What is known of a run. status: done, diverged, failed (error says why) or missing."""

    status: str
    result: dict[str, Any] | None = None
    evals: tuple[dict[str, Any], ...] = ()  # tokens, seconds (of the training clock), valid_loss
    error: str | None = None
    folder: Path | None = None


def look(run: Run, cache: Path = RUNS) -> Finished:
    """A run as it stands in the cache: done, diverged or missing."""
    folder = cache / run.fingerprint
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Finished(status="missing")
    if result["stopped"] == "interrupted":
        return Finished(status="missing")
    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()]
    evals = tuple(
        {name: line[name] for name in ("tokens", "seconds", "valid_loss")}
        for line in lines
        if line["kind"] == "eval" and line["valid_loss"] is not None
    )
    status = "diverged" if result["stopped"] == "diverged" else "done"
    return Finished(status=status, result=result, evals=evals, folder=folder)


def is_begun(run: Run, cache: Path = RUNS) -> bool:
    """Whether there is something to go on from."""
    folder = cache / run.fingerprint
    return bool(list_checkpoints(folder / "checkpoints")) or (folder / "checkpoint.npz").exists()


def execute(run: Run, cache: Path = RUNS) -> Finished:
    """Make a run, or go on with it, or find it finished.

    Raises KeyboardInterrupt once an interrupted run has saved, and RunFailed if the code is no longer the one that was
    planned with. A run that fails is an answer, not an error; it is tried again the next time.
    """
    folder = (cache / run.fingerprint).absolute()
    _outwait(folder)
    found = look(run, cache)
    if found.status != "missing":
        _tidy(folder)
        return found
    _check_code(run)
    if run.variant.backend == "mlx":
        command, variables = _ours(run, folder), environment()
    else:
        _lay_out(run, folder)
        command = ["bench.reference.train", str(folder)]
        variables = environment(**UNTOUCHED, **ALLOCATOR)
    ended = run_to_end(["-m", *command], variables)
    try:
        _check_code(run)
    except RunFailed:
        shutil.rmtree(folder, ignore_errors=True)  # nobody knows which code made it
        raise
    if ended.code == INTERRUPTED:
        raise KeyboardInterrupt
    found = look(run, cache)
    if found.status == "missing":
        return Finished(status="failed", error=ended.reason)
    _tidy(folder)
    return found


def _outwait(folder: Path) -> None:
    """Wait until nobody trains in the folder: a run that outlived a killed parent goes on to its end."""
    if folder.is_dir():
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)


def _check_code(run: Run) -> None:
    """Raises RunFailed if the code is no longer what the fingerprint says."""
    own = run.variant
    try:
        same = _checksum(own.phase, own.backend) == _code(own.phase, own.backend)
    except (OSError, SyntaxError):  # it is being edited
        same = False
    if not same:
        name = f"{own.name}, seed {run.plan.seed},"
        raise RunFailed(f"the code changed while {name} was planned or trained: give the command again")


def _ours(run: Run, folder: Path) -> list[str]:
    """Write the settings of a new run; return the command that trains it, without python -m."""
    if not list_checkpoints(folder / "checkpoints"):
        write_settings(folder, run.plan)
    return [f"phases.phase{run.variant.phase}", f"--resume={folder}", "--quiet"]


def _lay_out(run: Run, folder: Path) -> None:
    """What bench/reference/train.py reads, task.json last."""
    if (folder / "task.json").exists():
        return
    plan, backend = run.plan, run.variant.backend
    folder.mkdir(parents=True, exist_ok=True)
    rows, seq_len = run.step_tokens // plan.config.seq_len, plan.config.seq_len
    budget = plan.limits.max_tokens
    assert budget is not None, "a reference is trained for so many tokens"
    _write_rows(folder / "rows.npy", plan, rows, -(-budget // run.step_tokens))
    for name, values in zip(("valid", "mask"), validation_sequences(plan.tokens.valid, seq_len), strict=True):
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
        "rows_per_step": rows,
        "eval_every": run.evaluate_every,
        "max_tokens": budget,
        "bits_per_nat": plan.bits_per_byte(1.0),
        "about": {**about, "backend": backend},
    }
    write_json(folder / "task.json", task)


def _write_rows(path: Path, plan: Plan, rows: int, steps: int) -> None:
    """The rows (rows * steps, L + 1) of a run in their order."""
    train, seq_len = plan.tokens.train, plan.config.seq_len
    batches = Batches(train, rows, seq_len, plan.seed)
    out = np.lib.format.open_memmap(path, "w+", train.dtype, (steps * rows, seq_len + 1))
    for i in range(0, len(out), rows):
        out[i : i + rows] = next(batches)
    out.flush()


def _tidy(folder: Path) -> None:
    """Drop what only going on would need."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for path in (*folder.glob("*.npy"), *folder.glob("*.npz")):
        path.unlink()


def keep_logs(finished: Finished, folder: Path, name: str) -> None:
    """Copy what a run wrote of itself, without its weights, so that the results stand by themselves."""
    if finished.folder is None:
        return
    place = folder / re.sub("[^a-z0-9-]+", "_", name.replace(":", "-"))  # 6/x and 6:x are two
    place.mkdir(parents=True, exist_ok=True)
    for file in ("result.json", "curve.jsonl"):
        shutil.copyfile(finished.folder / file, place / file)


def lacks_reference(runs: Sequence[Run]) -> list[str | None]:
    """For each run why there is no reference in PyTorch, or None where there is one."""
    tasks = [
        {"phase": run.variant.phase, "branch": run.variant.branch, "recipe": run.plan.recipe.to_dict()} for run in runs
    ]
    ended = run_to_end(["-m", "bench.reference.check"], stdin=json.dumps(tasks))
    if ended.code == INTERRUPTED:
        raise KeyboardInterrupt
    if ended.code:
        raise RunFailed(f"PyTorch cannot be used: {ended.reason}")
    return json.loads(ended.stdout)


def _tokens_of(run: Run) -> int:
    """How many a run will train on: its budget, or up to the first evaluation at which its recipe is over."""
    plan, between = run.plan, run.evaluate_every * run.step_tokens
    budget = plan.limits.max_tokens or 0
    ends = (at for at in range(between, budget, between) if plan.recipe.is_finished(at))
    return next(ends, budget)


def forecast(run: Run, parameters: int, cache: Path = RUNS) -> float:
    """Seconds that a run will take: as earlier ones of its kind took, else from this machine's matmuls."""
    if look(run, cache).status != "missing":
        return 0.0
    plan, own, budget = run.plan, run.variant, _tokens_of(run)
    if (known := _known_paces(cache).get((own.phase, own.branch, plan.size, own.backend))) is not None:
        return known * budget
    evaluated = budget / (run.evaluate_every * run.step_tokens) * len(plan.tokens.valid) / 3
    return 6 * parameters * (budget + evaluated) / (_MATMUL_SHARE * 1e9 * _matmul_rate())


@functools.cache
def _known_paces(cache: Path) -> dict[tuple[int, str | None, str, str], float]:
    """Seconds a token of the finished runs there."""
    found = {}
    for path in cache.glob("*/result.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, ZeroDivisionError):
            one = json.loads(path.read_text(encoding="utf-8"))
            kind = (one["phase"], one["branch"], one["size"], one.get("backend", "mlx"))
            found[kind] = (one["train_seconds"] + one["eval_seconds"]) / one["tokens"]
    return found


@functools.cache
def _matmul_rate() -> float:
    return matmul_gflops(seconds=0.5)
