"""`python -m mlx_transformer.evaluate RUN --data FILE`: a saved model's loss over a text, or its score on a task."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text as Plain

from mlx_transformer.backend import use_device
from mlx_transformer.data import pairs
from mlx_transformer.data.tasks import find_task, is_task
from mlx_transformer.data.tokenizers import Tokenizer
from mlx_transformer.generate import Score, score
from mlx_transformer.generate.translation import judge, translation_loss
from mlx_transformer.nn.model import Model
from mlx_transformer.run.commands.model import load_model
from mlx_transformer.run.flags import Device, File, Place, RunArgument, Switch, Text, parse
from mlx_transformer.train.evaluate import Evaluation, evaluate
from mlx_transformer.utils.errors import BadInput, explain_out_of_memory
from mlx_transformer.utils.files import json_text
from mlx_transformer.utils.terminal import Terminal


@dataclass
class Flags:
    """Compute the loss of a saved model, trained here or imported, over a whole text, or its score on a task."""

    run: RunArgument
    """a run folder, or its model/"""
    data: File = None
    """task:NAME, or UTF-8 text with <|endoftext|> between documents, .jsonl, .csv, each also as .gz, or a folder; for a
    translator lines of a source, a tab and its translation, or pairs: the tests of the built-in pairs"""
    text_column: Text = None
    """key or column of .jsonl and .csv that holds the text (default: text)"""
    code: Place = None
    """file that defines the model, for a model of your own; kept: the copy in the run folder"""
    json: Switch = False
    """print one JSON object: tokens, nats_per_token, perplexity, bits_per_byte, context_used; of a task its levels"""
    device: Device = "auto"
    """device to compute on (default: auto)"""


@explain_out_of_memory("try a smaller model, or --device cpu")
def main(prog: str = "python -m mlx_transformer.evaluate", args: list[str] | None = None) -> None:
    """Run the command line."""
    flags = parse(Flags, prog, args=args)
    if flags.data is None:
        raise BadInput(f"--data is missing: expected the path of a text; see {prog} --help")
    if is_task(str(flags.data)):
        find_task(str(flags.data))
        if flags.text_column is not None:
            raise BadInput(f"--text-column {flags.text_column} goes with .jsonl and .csv; {flags.data}: no columns")
    use_device(flags.device or "auto")
    model, tokenizer = load_model(flags.run, flags.code)
    if is_task(str(flags.data)):
        found = score(model, tokenizer, str(flags.data))
        if flags.json:
            print(json_text(found.to_dict()))
        else:
            _show(found)
        return
    if model.parallel:
        _evaluate_translations(model, tokenizer, flags)
        return
    result = evaluate(model, tokenizer, flags.data, text_column=flags.text_column)
    print(json_text(asdict(result)) if flags.json else _describe(result))


def _evaluate_translations(model: Model, tokenizer: Tokenizer, flags: Flags) -> None:
    """Print the loss over the pairs of a text, or of each built-in test, and the scores of their translations."""
    if flags.text_column is not None:
        raise BadInput(f"--text-column {flags.text_column} goes with .jsonl and .csv; pairs have no columns")
    if str(flags.data) != pairs.NAME:
        found = _score_pairs(model, tokenizer, pairs.read_parallel(str(flags.data), _note))
        print(json_text(found) if flags.json else _describe_pairs(found))
        return
    corpus = pairs.load_pairs(pairs.NAME, say=_note)
    tests = {name: pairs.read_pairs(corpus, split) for name, split in pairs.TESTS.items()}
    scored = {name: _score_pairs(model, tokenizer, test, pairs.kind_of) for name, test in tests.items()}
    if flags.json:
        print(json_text(scored))
        return
    print("\n\n".join(f"{name}\n{_describe_pairs(one)}" for name, one in scored.items()))


def _note(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


def _score_pairs(
    model: Model,
    tokenizer: Tokenizer,
    chosen: Sequence[tuple[str, str]],
    kind_of: Callable[[tuple[str, str]], str] | None = None,
) -> dict[str, Any]:
    nats, tokens = translation_loss(model, tokenizer, chosen, _note)
    return {"tokens": tokens, "nats_per_token": nats, **judge(model, tokenizer, chosen, kind_of=kind_of)}


def _describe_pairs(found: dict[str, Any]) -> str:
    greedy, nats = found["greedy"], found["nats_per_token"]
    rows = {
        "tokens": f"{found['tokens']:,}",
        "nats per token": "unknown: every pair is too long" if nats is None else f"{nats:.4f}",
        "sentences": f"{found['pairs']:,}",
        "exact match": f"{100 * found['exact_match']:.1f} %, greedy {100 * greedy['exact_match']:.1f} %",
        **{f"  {kind}": f"{100 * own['exact_match']:.1f} %" for kind, own in found.get("by_kind", {}).items()},
        **{label: _score(found[label.lower()]) for label in ("chrF", "BLEU")},
    }
    return "\n".join(f"{name:<16}{value}" for name, value in rows.items())


def _score(value: float | None) -> str:
    return "needs sacrebleu: pip install 'mlx-transformer[translation]'" if value is None else f"{value:.2f} of 100"


def _show(found: Score) -> None:
    """Print the score of a task by level, with the floor and the ceiling of each."""
    references = list(dict.fromkeys(name for level in found.levels for name in level.references))
    named = (name.replace("_", " ") for name in references)
    table = Table("level", "trained", "tokens", "answers", "accuracy", *named, "floor", "ceiling", title=found.task)
    for level in found.levels:
        others = [level.references.get(name, level.accuracy) for name in references]
        shares = [f"{100 * share:.1f} %" for share in (level.accuracy, *others, level.floor, level.ceiling)]
        trained = "yes" if level.trained else "no"
        table.add_row(Plain(level.level), trained, str(level.tokens), str(level.answers), *shares)
    table.caption = f"accuracy {100 * found.accuracy:.1f} %, the mean over the trained levels"
    Terminal().print(table)


def _describe(result: Evaluation) -> str:
    bits = result.bits_per_byte
    rows = {
        "tokens": f"{result.tokens:,}",
        "nats per token": f"{result.nats_per_token:.4f}",
        "perplexity": f"{result.perplexity:,.2f}",
        "bits per byte": "unknown: the tokenizer is not lossless" if bits is None else f"{bits:.4f}",
        "context used": f"{100 * result.context_used:.0f} %, on average before a token",
    }
    return "\n".join(f"{name:<16}{value}" for name, value in rows.items())
