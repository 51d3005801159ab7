"""A run on disk: its folder, result.json, curve, report and pictures."""

from __future__ import annotations

import json
import math
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx

from mlx_transformer.backend import device_info, versions
from mlx_transformer.generate import complete, generate_unconditional
from mlx_transformer.generate.quality import quality
from mlx_transformer.nn.config import SIZES
from mlx_transformer.nn.model import Model
from mlx_transformer.run.console import Console
from mlx_transformer.run.flags import TrainFlags, parse, train_flags
from mlx_transformer.run.folder import check_folder, explained, new_folder, owned
from mlx_transformer.run.ladder import Experiment, split_recipe
from mlx_transformer.run.own_code import Code
from mlx_transformer.run.plan import SETTINGS, Plan, make_plan, read_settings
from mlx_transformer.run.report import draw_loss, resume_command, write_report, write_stories
from mlx_transformer.run.saved import CODE, save_model
from mlx_transformer.train.trainer import (
    Eval,
    Event,
    Progress,
    Resumed,
    RunOptions,
    Step,
    Stopped,
    default_eval_every,
    fit,
)
from mlx_transformer.utils.errors import BadInput, Interrupted, RunFailed, exit_cleanly
from mlx_transformer.utils.files import atomic_write, write_json
from mlx_transformer.utils.trees import by_path

_LOG_STEPS_PER_EVALUATION = 10  # lines of curve.jsonl between two evaluations
_SCHEMA_VERSION = 2
RECIPE_CODE = "recipe_code"  # folder of the copy of the file that --recipe FILE.py:NAME names
_JUDGED_STORIES = 100


def main(module: ModuleType) -> None:
    """Run the command line of a module that defines what is trained, `__main__` among them."""

    def command() -> None:
        experiment = Experiment.of_module(module)
        train(experiment, parse(train_flags(experiment), experiment.command, _description(experiment)))

    exit_cleanly(command)


def train(experiment: Experiment, flags: TrainFlags) -> Path:
    """Train, evaluate, write stories, save everything; the run's folder.

    Raises BadInput with nothing written, RunFailed for a run that started and could not go on, Interrupted.
    """
    console = Console(quiet=flags.quiet)
    check_folder(flags)
    plan = make_plan(experiment, flags, console.say)
    model = plan.make_model()
    folder = flags.resume or flags.out or new_folder(experiment, plan.settings.get("branch"))
    with owned(folder, flags), explained(resume_command(experiment.command, folder), folder):
        settings = {"phase": experiment.phase, "flags": plan.settings, **_identity(plan, folder, flags)}
        write_json(folder / SETTINGS, settings)
        for code, name in ((experiment.code, CODE), (plan.recipe_code, RECIPE_CODE)):
            if code is not None:
                code.keep(folder / name)
        console.log_to(folder / "log.txt")
        _introduce(console, plan, model, folder)
        stop = threading.Event()
        with _stop_on_signal(stop):
            stopped, curve = _train(plan, model, folder, console, stop)
            stop.set()  # all is saved: from here on a signal need not wait
            _finish(plan, model, folder, stopped, curve, console)
    return folder


def _train(plan: Plan, model: Model, folder: Path, console: Console, stop: threading.Event) -> tuple[Stopped, Curve]:
    settings, seq_len = plan.settings, plan.config.seq_len
    eval_every = settings.get("eval_every") or default_eval_every(plan.recipe, plan.tokens, seq_len)
    options = RunOptions(
        checkpoints=folder / "checkpoints",
        eval_every=eval_every,
        save_every=settings.get("save_every"),
        compile=not settings.get("no_compile", False),
        should_stop=stop.is_set,
    )
    log_every = max(1, eval_every // _LOG_STEPS_PER_EVALUATION)
    curve = Curve(folder / "curve.jsonl", plan.bits_per_byte, log_every)
    with console.training(plan.limits):
        for event in fit(model, plan.recipe, plan.tokens, seed=plan.seed, limits=plan.limits, options=options):
            curve.write(event)
            console.show(event, mx.get_peak_memory())
    assert isinstance(event, Stopped)
    return event, curve


def _finish(plan: Plan, model: Model, folder: Path, stopped: Stopped, curve: Curve, console: Console) -> None:
    """Everything that a run leaves behind, result.json last: where it stands, the run is whole."""
    stories: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    if stopped.why not in ("interrupted", "diverged"):
        model.eval()
        completions = complete(model, plan.tokenizer, plan.prompts, sampling=plan.sampling, seed=plan.seed)
        stories = [{"prompt": s.prompt, "text": s.text, "ended": s.ended} for s in completions]
        figures = quality(stories, plan.tokens.train, plan.tokenizer, _fables(plan, model))
        write_stories(folder, stories, figures)
    experiment, branch = plan.experiment, plan.settings.get("branch")
    save_model(folder / "model", model, plan.tokenizer, experiment.phase, branch, experiment.code)
    result = describe(plan, model, stopped, figures)
    write_report(folder, result, curve.lines or [], stories, plan.experiment.command)
    draw_loss(folder / "loss.png", result, curve.lines or [])
    write_json(folder / "result.json", result)
    if stopped.why == "diverged":
        raise RunFailed(stopped.message)
    if stopped.why == "interrupted":
        raise Interrupted(f"saved; go on with: {resume_command(plan.experiment.command, folder)}")
    _say_result(console, result, stories, folder)


def _fables(plan: Plan, model: Model) -> list[str]:
    """Where the corpus has a grammar: stories drawn from the model's own distribution, to be judged by it."""
    if plan.corpus.name != "fables":
        return []
    samples = generate_unconditional(model, plan.tokenizer, _JUDGED_STORIES, seed=plan.seed)
    return [sample.text for sample in samples]


def describe(plan: Plan, model: Model, stopped: Stopped, figures: dict[str, Any]) -> dict[str, Any]:
    """result.json, key by key as the schema has it."""
    measured = _measured(stopped.progress, plan)
    return {**described(plan, model), **measured, "stopped": stopped.why, "quality": figures}


def described(plan: Plan, model: Model) -> dict[str, Any]:
    """What is known of a run before it starts: the first part of result.json."""
    tokens, device = plan.tokens, device_info()
    floor = tokens.floor_bits
    return {
        "schema_version": _SCHEMA_VERSION,
        "phase": plan.experiment.phase,
        "code": _record(plan.experiment.code),
        "branch": plan.settings.get("branch"),
        "recipe_name": _recipe_name(plan.settings.get("recipe")),
        "seed": plan.seed,
        "size": plan.size,
        "device": {"name": device.name, "backend": device.backend, "memory_bytes": device.memory_bytes},
        "versions": versions(),
        "corpus": {
            "name": plan.corpus.name,
            "sha256": plan.corpus.sha256,
            "train_tokens": len(tokens.train) - 1,
            "valid_tokens": len(tokens.valid) - 1,
            "train_bytes": plan.corpus.train_bytes,
            "valid_bytes": tokens.valid_bytes,
            "floor_bpb": None if floor is None else floor / tokens.valid_bytes,
            "duplicates_removed": plan.corpus.duplicates_removed,
        },
        "tokenizer": {
            "kind": plan.tokenizer.kind,
            "vocab_size": plan.tokenizer.vocab_size,
            "unknown_rate": tokens.unknown_rate,
        },
        "config": plan.config.to_dict(),
        "recipe": plan.recipe.to_dict(),
        "parameters": model.count_parameters(),
    }


def _recipe_name(name: str | None) -> str | None:
    """Shorten "/home/me/my_idea.py:FAST" to "my_idea.py:FAST"."""
    named = split_recipe(name or "")
    return name if named is None else f"{named[0].name}:{named[1]}"


def _measured(now: Progress, plan: Plan) -> dict[str, Any]:
    return {
        "steps": now.step,
        "tokens": now.tokens,
        "epochs": now.epochs,
        "train_seconds": now.train_seconds,
        "compile_seconds": now.compile_seconds,
        "eval_seconds": now.eval_seconds,
        "tokens_per_second": now.tokens_per_second,
        "best_valid_loss": now.best_valid_loss,
        "best_valid_bpb": plan.bits_per_byte(now.best_valid_loss),
        "final_valid_loss": now.final_valid_loss,
        "target_loss": plan.limits.target_loss,
        "seconds_to_target": now.seconds_to_target,
        "tokens_to_target": now.tokens_to_target,
        "peak_memory_bytes": now.peak_memory_bytes,
    }


class Curve:
    """curve.jsonl: a line for each evaluation, and for some of the steps between."""

    def __init__(self, path: Path, bits_per_byte: Callable[[float | None], float | None], log_every: int) -> None:
        self.path, self.bits_per_byte, self.log_every = path, bits_per_byte, log_every
        self.lines: list[dict[str, Any]] | None = None  # until the first event tells where the run stands

    def write(self, event: Event) -> None:
        """Add what belongs into the curve. A resumed run first drops the lines that it will write again."""
        if self.lines is None:
            self._begin(event.step if isinstance(event, Resumed) else 0)
        if isinstance(event, Eval):
            self._add("eval", event, valid_loss=event.valid_loss, valid_bpb=self.bits_per_byte(event.valid_loss))
        elif isinstance(event, Step) and event.step % self.log_every == 0:
            self._add(
                "log",
                event,
                **event.metrics,
                learning_rate=event.learning_rate,
                grad_norm=event.gradient_norm,
                tokens_per_second=event.tokens_per_second,
                data_wait_share=event.data_wait_share,
            )

    def _begin(self, step: int) -> None:
        self.lines = [line for line in _read_lines(self.path) if line["step"] <= step]
        atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def _add(self, kind: str, event: Step | Eval, **values: Any) -> None:
        values = {name: _number(value) for name, value in values.items()}
        line = {"kind": kind, "step": event.step, "tokens": event.tokens, "seconds": event.seconds, **values}
        assert self.lines is not None
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _number(value: float | None) -> float | None:
    """JSON knows no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a curve; a killed run may have left a part of one at the end."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _identity(plan: Plan, folder: Path, flags: TrainFlags) -> dict[str, Any]:
    """What must be the same for a run to go on. Raises BadInput if it is not, since the result would be neither's."""
    own = {
        "code": _record(plan.experiment.code),
        "recipe_code": _record(plan.recipe_code),
        "corpus": plan.corpus.sha256,
        "config": plan.config.to_dict(),
        "recipe": plan.recipe.to_dict(),
        "tokenizer": plan.tokenizer.sha256,
    }
    own = json.loads(json.dumps(own))  # tuples become lists, as in the file
    if flags.resume is not None:
        stored = read_settings(folder)
        for name, value in own.items():
            if stored.get(name) != value:
                raise BadInput(
                    f"'{folder}' was begun with another {name} than is found now: it cannot go on; start a new run"
                )
    return own


def _record(code: Code | None) -> dict[str, Any] | None:
    return None if code is None else code.record()


@contextmanager
def _stop_on_signal(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C or SIGTERM asks the run to save and stop; once stop is set, it ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _introduce(console: Console, plan: Plan, model: Model, folder: Path) -> None:
    """What is about to be trained, on what, and where it goes."""
    corpus, recipe = plan.corpus, plan.recipe
    console.say(device_info().describe())
    console.say(
        f"{corpus.train_documents:,} documents, {len(plan.tokens.train):,} pieces to train on, "
        f"{len(plan.tokens.valid):,} to validate; {plan.tokenizer.kind} tokenizer of {plan.config.vocab_size:,} pieces"
    )
    groups: dict[str, int] = {}
    for path, value in by_path(model.parameters()).items():
        name = re.sub(r"^blocks\.\d+\.", "blocks.", path).rsplit(".", 1)[0]
        groups[name] = groups.get(name, 0) + value.size
    for name, count in groups.items():
        console.say(f"  {name:<24}{count:>12,}")
    console.say(f"  {'parameters':<24}{model.count_parameters()['total']:>12,}")
    rows, parts = (
        recipe.batch_size(plan.config.seq_len),
        "" if recipe.accumulate == 1 else f" ({recipe.accumulate} parts)",
    )
    console.say(f"steps of {rows} x {plan.config.seq_len} tokens{parts} in {recipe.dtype}; everything goes to {folder}")
    if recipe.dtype != "float32" and device_info().backend == "cpu":
        console.say(f"note: on a CPU {recipe.dtype} is several times slower than float32")


def _say_result(console: Console, result: dict[str, Any], stories: list[dict[str, Any]], folder: Path) -> None:
    best, bpb, floor = result["best_valid_loss"], result["best_valid_bpb"], result["corpus"]["floor_bpb"]
    figures = [f"validation loss {best:.4f} nats per piece"]
    figures += [] if bpb is None else [f"{bpb:.4f} bits per byte"]
    figures += [] if floor is None else [f"entropy floor {floor:.4f}"]
    rate = result["tokens_per_second"]
    figures += [] if rate is None else [f"{rate:,.0f} tokens/s"]
    console.say(", ".join(figures))
    for story in stories[:1]:
        console.say(f"\n{story['text']}\n")
    console.say(f"all of it: {folder / 'report.md'}")


def _description(experiment: Experiment) -> str:
    """The idea and its hyperparameters by size, for --help."""
    title = (experiment.module.__doc__ or f"{experiment}.").splitlines()[0]
    table = {name: " / ".join(str(SIZES[size][name]) for size in SIZES) for name in SIZES["nano"]}
    recipes = [experiment.recipe.at(size) for size in SIZES]
    table["batch_size"] = " / ".join(
        str(recipe.batch_tokens // SIZES[size]["seq_len"]) for recipe, size in zip(recipes, SIZES, strict=True)
    )
    table["learning_rate"] = " / ".join(f"{recipe.learning_rate:g}" for recipe in recipes)
    dropout = recipes[0].dropout
    table["dropout"] = f"{experiment.model.Config().dropout if dropout is None else dropout:g}"
    table["dtype"] = recipes[0].dtype
    defaults = ", ".join(f"{name} {values}" for name, values in table.items())
    branches = f" Branches: {', '.join(sorted(experiment.branches))}." if experiment.branches else ""
    variants = f" Recipes: {', '.join(sorted(experiment.recipes))}." if experiment.recipes else ""
    return f"{title} Defaults for {' / '.join(SIZES)}: {defaults}.{branches}{variants}"
