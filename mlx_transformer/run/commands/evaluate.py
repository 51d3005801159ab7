"""`python -m mlx_transformer.evaluate RUN --data FILE`: the loss of a saved model over a text."""

import sys
from dataclasses import asdict, dataclass

from mlx_transformer.backend import use_device
from mlx_transformer.data.pairs import read_parallel
from mlx_transformer.data.tokenizers import Tokenizer
from mlx_transformer.generate.translation import judge, translation_loss
from mlx_transformer.nn.model import Model
from mlx_transformer.run.commands.model import load_model
from mlx_transformer.run.flags import Device, File, Place, RunArgument, Switch, Text, parse
from mlx_transformer.train.evaluate import Evaluation, evaluate
from mlx_transformer.utils.errors import BadInput, explain_out_of_memory
from mlx_transformer.utils.files import json_text


@dataclass
class Flags:
    """Compute the loss of a saved model, trained here or imported, over every token of a text."""

    run: RunArgument
    """a run folder, or its model/"""
    data: File = None
    """UTF-8 text with <|endoftext|> between documents, .jsonl or .csv, each also as .gz, or a folder of them; for a
    translator lines of a source, a tab and its translation"""
    text_column: Text = None
    """key or column of .jsonl and .csv that holds the text (default: text)"""
    code: Place = None
    """file that defines the model, for a model of your own; kept: the copy in the run folder"""
    json: Switch = False
    """print one JSON object: tokens, nats_per_token, perplexity, bits_per_byte, context_used"""
    device: Device = "auto"
    """device to compute on (default: auto)"""


@explain_out_of_memory("try a smaller model, or --device cpu")
def main(prog: str = "python -m mlx_transformer.evaluate", args: list[str] | None = None) -> None:
    """Run the command line."""
    flags = parse(Flags, prog, args=args)
    if flags.data is None:
        raise BadInput(f"--data is missing: expected the path of a text; see {prog} --help")
    use_device(flags.device or "auto")
    model, tokenizer = load_model(flags.run, flags.code)
    if model.parallel:
        _evaluate_translations(model, tokenizer, flags)
        return
    result = evaluate(model, tokenizer, flags.data, text_column=flags.text_column)
    print(json_text(asdict(result)) if flags.json else _describe(result))


def _evaluate_translations(model: Model, tokenizer: Tokenizer, flags: Flags) -> None:
    """Print the loss over the pairs of a text, and the scores of their translations by beam search."""
    if flags.text_column is not None:
        raise BadInput(f"--text-column {flags.text_column} goes with .jsonl and .csv; pairs have no columns")
    pairs = read_parallel(str(flags.data), lambda message: print(f"note: {message}", file=sys.stderr))
    nats, tokens = translation_loss(model, tokenizer, pairs)
    result = {"tokens": tokens, "nats_per_token": nats, **judge(model, tokenizer, pairs)}
    if flags.json:
        print(json_text(result))
        return
    rows = {
        "tokens": f"{tokens:,}",
        "nats per token": f"{nats:.4f}",
        "sentences": f"{result['pairs']:,}",
        "exact match": f"{100 * result['exact_match']:.1f} %, greedy {100 * result['greedy']['exact_match']:.1f} %",
        **{label: _score(result[label.lower()]) for label in ("chrF", "BLEU")},
    }
    print("\n".join(f"{name:<16}{value}" for name, value in rows.items()))


def _score(value: float | None) -> str:
    return "needs sacrebleu: pip install 'mlx-transformer[translation]'" if value is None else f"{value:.2f} of 100"


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
