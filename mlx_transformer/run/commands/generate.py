"""`python -m mlx_transformer.generate RUN`: text from a trained model."""

import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_transformer.backend import use_device
from mlx_transformer.data.pairs import encode_sources
from mlx_transformer.data.tokenizers import Tokenizer
from mlx_transformer.generate import Completion, complete, stream_completion, translate
from mlx_transformer.generate.beam import Beam
from mlx_transformer.generate.sampling import Sampling
from mlx_transformer.nn.model import Model
from mlx_transformer.run.commands.model import load_model
from mlx_transformer.run.commands.ranks import first_complains, first_prints, load_part, watched
from mlx_transformer.run.flags import (
    Device,
    Number,
    Part,
    Place,
    RunArgument,
    SamplingFlags,
    Seed,
    Switch,
    WholeNumber,
    Words,
    parse,
    read_sampling,
)
from mlx_transformer.run.task import check_no_sampling
from mlx_transformer.train.parallel import Ranks, join
from mlx_transformer.utils.errors import BadInput, explain_out_of_memory
from mlx_transformer.utils.text import plural


@dataclass(kw_only=True)
class Flags(SamplingFlags):
    """Continue text with a trained model, or translate it; without --prompt, one line at a time of standard input."""

    run: RunArgument
    """a run folder, or its model/"""
    prompt: Words = ()
    """text to continue, or sentence to translate (repeatable)"""
    max_tokens: WholeNumber = None
    """tokens to generate at most; past the context, older text is forgotten (default: up to the context; for a
    translation 50 more than its source has)"""
    beam: WholeNumber = None
    """hypotheses of a translator's beam search; 1 is greedy (default: 4)"""
    length_penalty: Number = None
    """exponent of a translator's length penalty; 0: none (default: 0.6)"""
    seed: Seed = 0
    """random seed of sampling (default: 0)"""
    code: Place = None
    """file that defines the model, for a model of your own; kept: the copy in the run folder"""
    device: Device = "auto"
    """device to compute on (default: auto)"""
    stream: Switch = False
    """print text while it is generated; prompts are then continued one by one, each with the same seed"""
    shard: Part = None
    """what each rank that mlx.launch starts has of the model: some heads and hidden units of every layer (tensor), or
    some layers (pipeline)"""


@explain_out_of_memory("try fewer prompts, a smaller --max-tokens, or --device cpu")
def main(prog: str = "python -m mlx_transformer.generate", args: list[str] | None = None) -> None:
    """Run the command line."""
    flags = parse(Flags, prog, args=args)
    ranks = join()
    with ranks.running(), first_complains(ranks):
        _check_ranks(flags, ranks)
        use_device(flags.device or "auto")
        sampling = read_sampling(flags)
        if flags.shard is None:
            _generate(flags, *load_model(flags.run, flags.code), sampling)
        else:
            model, tokenizer = load_part(flags.run, flags.code, flags.shard, repr(replace(flags, run=Path())), ranks)
            with first_prints(ranks, at_once=flags.stream):
                _generate(flags, model, tokenizer, watched(sampling, ranks), notes=ranks.rank == 0)


def _check_ranks(flags: Flags, ranks: Ranks) -> None:
    """Raise BadInput for what one process, or several, cannot do."""
    if ranks.size == 1 and flags.shard is not None:
        raise BadInput(f"--shard {flags.shard}: expected several ranks; start the command with mlx.launch -n 2")
    if ranks.size > 1 and flags.shard is None:
        raise BadInput(f"{ranks.size} ranks: give --shard tensor or --shard pipeline, or leave mlx.launch out")
    if ranks.size > 1 and not flags.prompt:
        raise BadInput(f"{ranks.size} ranks read no standard input: give --prompt")


def _generate(flags: Flags, model: Model, tokenizer: Tokenizer, sampling: Sampling, *, notes: bool = True) -> None:
    """Continue the prompts, or the lines of standard input, and print them."""
    seed = flags.seed or 0
    if model.parallel:
        _translate(model, tokenizer, flags)
        return
    for name in ("beam", "length_penalty"):
        if (value := getattr(flags, name)) is not None:
            raise BadInput(f"--{name.replace('_', '-')} {value}: '{flags.run}' holds no translator; leave it out")
    options: dict[str, Any] = {"max_tokens": flags.max_tokens, "sampling": sampling, "seed": seed}
    if flags.prompt and not flags.stream:
        completions = complete(model, tokenizer, flags.prompt, **options)
        print("\n\n".join(completion.text for completion in completions))
        _note_slides(completions if notes else [], model.config.seq_len)
        return
    refused = 0
    completions = []
    for prompt in flags.prompt or _lines():
        try:
            completions.append(_print(prompt, stream_completion(model, tokenizer, prompt, **options)))
        except BadInput as error:
            if flags.prompt:
                raise
            print(f"error: {error}", file=sys.stderr)
            refused += 1
    _note_slides(completions if notes else [], model.config.seq_len)
    if refused and not sys.stdin.isatty():  # on a terminal the error has been seen already
        raise BadInput(f"{refused} of the lines could not be continued: see above")


def _translate(model: Model, tokenizer: Tokenizer, flags: Flags) -> None:
    """Print the translation of each prompt, or of each line."""
    check_no_sampling(flags)
    if flags.stream:
        raise BadInput("--stream: a translation is searched as a whole; leave it out")
    usual = Beam()
    options: dict[str, Any] = {
        "beam": flags.beam or usual.size,
        "length_penalty": usual.alpha if flags.length_penalty is None else flags.length_penalty,
        "max_tokens": flags.max_tokens,
    }
    for lines in [flags.prompt] if flags.prompt else ([line] for line in _lines()):
        made = translate(model, tokenizer, lines, **options)
        print("\n".join(one.text for one in made), flush=True)
        _note_long_sources(model, tokenizer, lines)


def _note_long_sources(model: Model, tokenizer: Tokenizer, sources: Sequence[str]) -> None:
    longest = model.config.seq_len
    if count := sum(len(row) > longest for row in encode_sources(tokenizer, sources)):
        of = f"{count} of {plural(len(sources), 'sentence')} {'has' if count == 1 else 'have'}"
        print(f"note: {of} more than {longest} tokens, the most in training: expect mistakes", file=sys.stderr)


def _lines() -> Iterator[str]:
    """Yield the lines of standard input that are not empty."""
    if sys.stdin is None:
        raise BadInput("there is no standard input to read prompts from: give --prompt")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line.rstrip("\r")


def _print(prompt: str, texts: Generator[str, None, Completion]) -> Completion:
    """Print a prompt and its continuation as it comes."""
    print(prompt, end="", flush=True)
    while True:
        try:
            print(next(texts), end="", flush=True)
        except StopIteration as end:
            print("\n")
            return end.value


def _note_slides(completions: list[Completion], context: int) -> None:
    if any(completion.slides for completion in completions):
        note = f"note: past the context of {context} tokens, older text is forgotten and the last half is read again"
        print(note, file=sys.stderr)
