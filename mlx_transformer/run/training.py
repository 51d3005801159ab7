"""A training run: from settings to a folder with the model, its curve, its report and result.json."""

import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx

from mlx_transformer.backend import device_info
from mlx_transformer.data.tokenizers import Tokenizer
from mlx_transformer.nn.model import Model
from mlx_transformer.run.console import Console
from mlx_transformer.run.curve import Curve
from mlx_transformer.run.flags import parse
from mlx_transformer.run.folder import (
    RECIPE_CODE,
    check_folder,
    check_unchanged,
    lock_folder,
    new_folder,
    report_failures,
    write_settings,
)
from mlx_transformer.run.help import HELP, HELP_ALL, print_help
from mlx_transformer.run.ladder import Experiment
from mlx_transformer.run.loggers import check_loggers, open_loggers
from mlx_transformer.run.own_code import Code, is_own
from mlx_transformer.run.plan import Plan, make_plan
from mlx_transformer.run.ranks import check_alike, check_text, describe, share_settings
from mlx_transformer.run.report import draw_lengths, draw_loss, resume_command, write_report, write_stories
from mlx_transformer.run.result import make_result
from mlx_transformer.run.saved import CODE, save_description, save_model, save_tables
from mlx_transformer.run.settings import Settings, read_result, settings_type
from mlx_transformer.train.checkpoint import list_checkpoints
from mlx_transformer.train.parallel import Ranks, check_batches, join
from mlx_transformer.train.parts import PARTS, check_parts, count_shares
from mlx_transformer.train.trainer import Prepared, RunOptions, Stopped, default_eval_every, fit
from mlx_transformer.utils.errors import Interrupted, RunFailed, exit_cleanly
from mlx_transformer.utils.files import write_json
from mlx_transformer.utils.text import plural
from mlx_transformer.utils.trees import by_path

_LOG_STEPS_PER_EVALUATION = 10  # lines of curve.jsonl between two evaluations


def main(module: ModuleType) -> None:
    """Run the command line of a module that defines what is trained, such as `__main__`."""

    def command() -> None:
        experiment, args = Experiment.of_module(module), set(sys.argv[1:])
        if args & {*HELP, HELP_ALL}:
            print_help(experiment, everything=HELP_ALL in args)
        else:
            train(experiment, parse(settings_type(experiment), experiment.command))

    exit_cleanly(command)


def train(experiment: Experiment, settings: Settings) -> Path:
    """Train, evaluate, generate text, save everything; return the run folder.

    Of several ranks, started by `mlx.launch`, rank 0 alone writes and prints. Raises BadInput with nothing written,
    RunFailed for a run that started and failed, Interrupted for a signal.
    """
    ranks = join()
    with ranks.running():
        return _train_ranks(experiment, settings, ranks)


def _train_ranks(experiment: Experiment, settings: Settings, ranks: Ranks) -> Path:
    console = Console(quiet=settings.quiet or ranks.rank > 0)
    settings = share_settings(experiment, settings, ranks)

    def prepare() -> tuple[Plan, Model]:
        if ranks.rank == 0:
            check_folder(settings)
            check_loggers(settings.log)
        plan = make_plan(experiment, settings, console.say)
        check_text(plan, ranks)
        shares = count_shares(plan.settings.shard, ranks)
        check_batches(plan.recipe, plan.config.seq_len, shares)
        model = plan.make_model(console.say, shares, ranks.size // shares)
        check_parts(model, plan.recipe, plan.settings.shard, ranks)
        return plan, model

    plan, model = ranks.in_turn(prepare)
    check_alike(plan, model, ranks)
    resumed = settings.resume if ranks.rank == 0 else None
    ended = ranks.gather("" if resumed is None else _why_ended(plan, read_result(resumed)))[0]
    if ranks.rank:
        return Path() if ended else _follow(plan, model, ranks)
    folder = settings.resume or settings.out or new_folder(experiment, settings.branch)
    failures = report_failures(resume_command(experiment.command, folder), folder)
    with lock_folder(folder, settings) as locked, failures:
        if settings.resume is not None:
            check_unchanged(folder, plan)
            if reason := _why_ended(plan, read_result(folder)):
                console.say(f"nothing to do: {reason}; nothing was changed")
                return folder
        if not locked:
            console.say(f"warning: '{folder}' cannot be locked on its file system: train there in one process only")
        write_settings(folder, plan)
        for code, name in ((experiment.code, CODE), (plan.recipe_code, RECIPE_CODE)):
            if code is not None:
                code.keep(folder / name)
        save_description(folder / "model", *_saved_as(plan, model))
        console.log_to(folder / "log.txt")
        _introduce(console, plan, model, folder, ranks)
        stop = threading.Event()
        with stop_on_signal(stop):
            stopped, curve = _train(plan, model, folder, console, stop, ranks)
            stop.set()  # everything is saved: the next signal ends the process at once
            _finish(plan, model, folder, stopped, curve, console, ranks)
    return folder


def _why_ended(plan: Plan, result: dict[str, Any] | None) -> str:
    """Return why a finished run still ends where it did; "" if the settings let it take another step."""
    if result is None or result["stopped"] in ("interrupted", "diverged"):
        return ""
    step, loss, target = result["steps"], result["final_valid_loss"], plan.limits.target_loss
    if (result["stopped"] == "target") != (target is not None and loss is not None and loss <= target):
        return ""  # another target than before
    limit = plan.limits.reached(
        steps=step, tokens=result["tokens"], epochs=result["epochs"], seconds=result["train_seconds"]
    )
    if step % _eval_every(plan) == 0 and result["stopped"] == "target":
        return f"the target loss was reached at step {step}; give a lower --target-loss"
    if step % _eval_every(plan) == 0 and result["stopped"] == "plateau":
        return f"the run ended on a plateau or with its schedule at step {step}"
    return f"the limit was reached at step {step}; give a larger --{limit.replace('_', '-')}" if limit else ""


def _eval_every(plan: Plan) -> int:
    return plan.settings.eval_every or default_eval_every(plan.recipe, plan.tokens, plan.config.seq_len)


def _options(plan: Plan, folder: Path, stop: threading.Event, ranks: Ranks) -> RunOptions:
    settings = plan.settings
    return RunOptions(
        checkpoints=folder / "checkpoints",
        eval_every=_eval_every(plan),
        save_every=settings.save_every,
        compile=not settings.no_compile,
        deterministic=settings.deterministic,
        score=plan.task.scorer(plan) if ranks.rank == 0 or settings.shard in PARTS else None,
        should_stop=stop.is_set,
        ranks=ranks,
        shard=settings.shard or "none",
    )


def _follow(plan: Plan, model: Model, ranks: Ranks) -> Path:
    """Train as a rank other than 0, which writes and prints nothing."""
    stop, folder = threading.Event(), Path()
    with stop_on_signal(stop):
        options = _options(plan, folder, stop, ranks)
        *_, event = fit(model, plan.recipe, plan.tokens, seed=plan.seed, limits=plan.limits, options=options)
    assert isinstance(event, Stopped)
    if event.why in ("interrupted", "diverged"):  # rank 0 says so
        ranks.leave(130 if event.why == "interrupted" else 1)
    return folder


def _train(
    plan: Plan, model: Model, folder: Path, console: Console, stop: threading.Event, ranks: Ranks
) -> tuple[Stopped, Curve]:
    settings, eval_every = plan.settings, _eval_every(plan)
    if (folder / "curve.jsonl").exists() and not list_checkpoints(folder / "checkpoints"):
        console.say(f"'{folder}' has no checkpoint yet: starting again from step 0")
    options = _options(plan, folder, stop, ranks)
    log_every = max(1, eval_every // _LOG_STEPS_PER_EVALUATION)
    curve = Curve(folder / "curve.jsonl", plan.bits_per_byte, log_every)
    with console.training(plan.limits), ExitStack() as stack:
        writers = open_loggers(settings.log, folder, settings.to_dict(), log_every)
        for writer in writers:
            stack.callback(writer.close)
        for event in fit(model, plan.recipe, plan.tokens, seed=plan.seed, limits=plan.limits, options=options):
            curve.write(event)
            if isinstance(event, Prepared):
                save_tables(folder / "model", model)
            for writer in writers:
                writer.write(event)
            console.show(event, mx.get_peak_memory())
    assert isinstance(event, Stopped)
    return event, curve


def _finish(
    plan: Plan, model: Model, folder: Path, stopped: Stopped, curve: Curve, console: Console, ranks: Ranks
) -> None:
    """Write what a run leaves; result.json after all that it needs, then the picture, which may fail."""
    ranks.advance("saving")
    stories: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    if stopped.why not in ("interrupted", "diverged"):
        model.eval()
        stories, figures = plan.task.write(plan, model)
        write_stories(folder, stories, figures)
    save_model(folder / "model", *_saved_as(plan, model))
    result = make_result(plan, model, stopped, figures, ranks)
    write_report(folder, result, curve.lines or [], stories, plan.experiment.command, plan.limits)
    write_json(folder / "result.json", result)
    _draw(folder, result, curve, console)
    if stopped.why == "diverged":
        raise RunFailed(stopped.message)
    if stopped.why == "interrupted":
        raise Interrupted(f"saved; resume with: {resume_command(plan.experiment.command, folder)}")
    _say_result(console, result, stories, folder)


def _draw(folder: Path, result: dict[str, Any], curve: Curve, console: Console) -> None:
    pictures: dict[str, Callable[[Path], None]] = {
        "loss.png": lambda path: draw_loss(path, result, curve.lines or []),
    }
    if result["quality"].get("translations"):
        pictures["lengths.png"] = lambda path: draw_lengths(path, result)
    for name, draw in pictures.items():
        try:
            draw(folder / name)
        except Exception as error:  # of matplotlib and its fonts; the results are there without it
            console.say(f"warning: {name} was not drawn ({type(error).__name__}: {error})")


def _saved_as(plan: Plan, model: Model) -> tuple[Model, Tokenizer, int | None, str | None, Code | None]:
    experiment = plan.experiment
    return model, plan.tokenizer, experiment.phase, plan.settings.branch, experiment.code


@contextmanager
def stop_on_signal(stop: threading.Event) -> Iterator[None]:
    """Set stop at the first SIGINT or SIGTERM; raise KeyboardInterrupt at the next."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _introduce(console: Console, plan: Plan, model: Model, folder: Path, ranks: Ranks) -> None:
    """Print device, ranks, text, model, batch and folder."""
    corpus, recipe = plan.corpus, plan.recipe
    console.say(device_info().describe())
    if ranks.size > 1:
        console.say(describe(ranks, recipe.batch_size(plan.config.seq_len), plan.settings.shard))
    elif (shard := plan.settings.shard or "none") != "none":
        console.say(f"note: --shard {shard} divides nothing in one process: start several with mlx.launch")
    if plan.experiment.code is not None and not is_own(type(model).__module__) and type(model).__module__ != "__main__":
        console.say(f"{plan.experiment} defines no Model: the one of phase {plan.experiment.phase} is trained")
    size = f"{plural(corpus.train_documents, 'document')}, {plan.tokens.epoch_tokens + 1:,} training tokens, "
    if corpus.shards is not None:
        size = f"{plural(len(corpus.shards), 'file')}, about {plan.tokens.epoch_tokens:,} training tokens, "
    console.say(
        f"{size}"
        f"{plan.tokens.valid_tokens + 1:,} validation tokens; "
        f"{plan.tokenizer.kind} tokenizer of {plan.config.vocab_size:,}"
    )
    groups: dict[str, int] = {}
    for path, value in by_path(model.parameters()).items():
        name = re.sub(r"\.(weight|bias)$", "", re.sub(r"\bblocks\.\d+\.", "blocks.", path))
        groups[name] = groups.get(name, 0) + value.size
    for name, count in groups.items():
        console.say(f"  {name:<24}{count:>12,}")
    console.say(f"  {'parameters':<24}{model.count_parameters()['total']:>12,}")
    seq_len, parts = plan.config.seq_len, "" if recipe.accumulate == 1 else f", accumulated over {recipe.accumulate}"
    console.say(f"batches of {recipe.batch_size(seq_len)} x {seq_len} tokens{parts}, {recipe.dtype}; folder {folder}")
    if recipe.dtype != "float32" and device_info().backend == "cpu":
        console.say(f"note: on a CPU {recipe.dtype} is several times slower than float32")


def _say_result(console: Console, result: dict[str, Any], stories: list[dict[str, Any]], folder: Path) -> None:
    best, bpb, floor = result["best_valid_loss"], result["best_valid_bpb"], result["corpus"]["floor_bpb"]
    figures = [f"validation loss {best:.4f} nats per token"]
    figures += [f"accuracy {100 * task['accuracy']:.1f} %"] if (task := result["quality"].get("task")) else []
    figures += [] if bpb is None else [f"{bpb:.4f} bits per byte"]
    figures += [] if floor is None else [f"entropy floor {floor:.4f}"]
    throughput = result["tokens_per_second"]
    figures += [] if throughput is None else [f"{throughput:,.0f} tokens/s"]
    console.say(", ".join(figures))
    for story in stories[:1]:
        console.say(f"\n{story['text']}\n")
    console.say(f"report: {folder / 'report.md'}")
