"""`python -m mlx_transformer.evaluate RUN --data FILE`: the loss of a saved model over a text."""

from dataclasses import asdict, dataclass

from mlx_transformer.backend import use_device
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
    """UTF-8 text with <|endoftext|> between documents, .jsonl or .csv, each also as .gz, or a folder of them"""
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
    result = evaluate(*load_model(flags.run, flags.code), flags.data, text_column=flags.text_column)
    print(json_text(asdict(result)) if flags.json else _describe(result))


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
