"""Text from a model: completions of prompts, at once or streamed."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from mlx_transformer.data.tokenizers import Tokenizer
from mlx_transformer.generate.decoding import Decoder, count_slides, decode
from mlx_transformer.generate.sampling import Sampling
from mlx_transformer.generate.tools import runtime
from mlx_transformer.nn.model import Model
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.text import plural


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A prompt and its continuation."""

    prompt: str
    continuation: str
    tokens: list[int]  # of the continuation, without EOS
    ended: bool  # by EOS rather than by a limit
    slides: int = 0  # how often the context was full and its older half was forgotten

    @property
    def text(self) -> str:
        """Prompt and continuation."""
        return self.prompt + self.continuation


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    max_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stream: bool = False,
) -> list[Completion] | Iterator[str]:
    """Continue prompts until EOS or max_tokens tokens; None: until the context of config.seq_len tokens is full.

    Past the context the model reads the last half of it again and continues: Completion.slides counts how often.
    temperature 0 is greedy; top_k, top_p and min_p filter what is sampled (see `Sampling`).
    Returns a Completion for each prompt, in order; with stream=True, for a single prompt, an iterator of text.
    Raises BadInput for a prompt that is empty or as long as the context, and for a number out of its range.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if not stream:
        return complete(model, tokenizer, prompts, max_tokens=max_tokens, sampling=sampling, seed=seed)
    if len(prompts) != 1:
        raise BadInput(f"stream = True with {len(prompts)} prompts: expected one")
    return stream_completion(model, tokenizer, prompts[0], max_tokens=max_tokens, sampling=sampling, seed=seed)


def generate_unconditional(
    model: Model, tokenizer: Tokenizer, count: int, *, temperature: float = 1.0, seed: int = 0
) -> list[Completion]:
    """Sample `count` documents from BOS alone, up to their EOS or the end of the context."""
    ids = [[tokenizer.bos_id]] * count
    return _complete(model, tokenizer, [""] * count, ids, None, Sampling(temperature=temperature), seed)


def complete(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    seed: int = 0,
) -> list[Completion]:
    """Continue a batch of prompts as `generate` does."""
    _check(model)
    encoded = [encode_prompt(tokenizer, prompt, model.config.seq_len) for prompt in prompts]
    return _complete(model, tokenizer, prompts, encoded, max_tokens, sampling, seed)


def stream_completion(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    seed: int = 0,
) -> Generator[str, None, Completion]:
    """Continue one prompt as `generate` does; the generator yields text and returns the Completion.

    Text is yielded in whole characters, of which a token may be a part. Raises before the first text is asked for.
    """
    return _texts(stream_tokens(model, tokenizer, prompt, max_tokens=max_tokens, sampling=sampling, seed=seed))


def stream_tokens(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    decoder: Decoder | None = None,
    max_tokens: int | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    seed: int = 0,
) -> Generator[tuple[int, str], None, Completion]:
    """Continue one prompt as `stream_completion` does; the generator yields each token and the text that it completes.

    That text is empty for a token that ends within a character. EOS is not yielded. decoder: of this model, to be used
    again for many prompts; None: a new one.
    """
    _check(model)
    ids = encode_prompt(tokenizer, prompt, model.config.seq_len)
    (limit,), context = _limits([ids], max_tokens, model.config.seq_len)
    respond = runtime(tokenizer, [ids])
    draw = partial(decode, model) if decoder is None else decoder
    drawn = draw([ids], limit, sampling=sampling, seed=seed, context=context, respond=respond)
    return _stream(tokenizer, prompt, ids, drawn, model.config.seq_len)


def _check(model: Model) -> None:
    if model.parallel:
        raise BadInput("this model translates and does not continue text: use translate")


def encode_prompt(tokenizer: Tokenizer, prompt: str, context: int) -> list[int]:
    """Encode a prompt, with the tokenizer's prompt_prefix in front.

    Raises BadInput for a prompt that is empty or leaves no room in the context (in tokens).
    """
    if not prompt.strip():
        raise BadInput(f"prompt {prompt!r} is empty: expected some text to continue")
    ids = [*tokenizer.prompt_prefix, *tokenizer.encode(prompt)] or [tokenizer.bos_id]
    if len(ids) >= context:
        start = prompt if len(prompt) <= 40 else prompt[:37] + "..."
        raise BadInput(
            f"prompt '{start}' has {plural(len(ids), 'token')}: expected fewer than the context of {context}"
        )
    return ids


def _complete(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    encoded: list[list[int]],
    max_tokens: int | None,
    sampling: Sampling,
    seed: int,
) -> list[Completion]:
    tokens: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    limits, context = _limits(encoded, max_tokens, model.config.seq_len)
    respond, count = runtime(tokenizer, encoded), max(limits, default=0)
    for drawn in decode(model, encoded, count, sampling=sampling, seed=seed, context=context, respond=respond):
        for i, token in enumerate(drawn):
            if not ended[i] and len(tokens[i]) < limits[i]:
                ended[i] = token == tokenizer.eos_id
                tokens[i] += [] if ended[i] else [token]
        if all(done or len(own) >= limit for done, own, limit in zip(ended, tokens, limits, strict=True)):
            break
    return [
        _completion(tokenizer, prompt, ids, own, done, model.config.seq_len)
        for prompt, ids, own, done in zip(prompts, encoded, tokens, ended, strict=True)
    ]


def _texts(drawn: Generator[tuple[int, str], None, Completion]) -> Generator[str, None, Completion]:
    """Yield the texts of `stream_tokens`, then what is left of an unfinished character."""
    shown = 0
    while True:
        try:
            _, text = next(drawn)
        except StopIteration as end:
            yield end.value.continuation[shown:]
            return end.value
        shown += len(text)
        yield text


def _stream(
    tokenizer: Tokenizer, prompt: str, ids: list[int], drawn: Iterator[list[int]], context: int
) -> Generator[tuple[int, str], None, Completion]:
    tokens: list[int] = []
    ended, shown = False, 0
    for (token,) in drawn:
        if ended := token == tokenizer.eos_id:
            break
        tokens.append(token)
        text = continuation(tokenizer, ids, tokens)
        whole = "" if text.endswith("\N{REPLACEMENT CHARACTER}") else text[shown:]
        shown += len(whole)
        yield token, whole
    return _completion(tokenizer, prompt, ids, tokens, ended, context)


def _limits(encoded: list[list[int]], max_tokens: int | None, context: int) -> tuple[list[int], int | None]:
    """The number of tokens to sample for each prompt, and the context for `decode` where one of them leaves it."""
    if max_tokens is not None and max_tokens < 1:
        raise BadInput(f"max-tokens = {max_tokens}: expected a whole number of at least 1")
    room = [context - len(ids) for ids in encoded]
    if max_tokens is None:
        return room, None
    return [max_tokens] * len(room), context if max_tokens > min(room, default=max_tokens) else None


def _completion(
    tokenizer: Tokenizer, prompt: str, ids: list[int], tokens: list[int], ended: bool, context: int
) -> Completion:
    return Completion(
        prompt=prompt,
        continuation=continuation(tokenizer, ids, tokens),
        tokens=tokens,
        ended=ended,
        slides=count_slides(len(ids), len(tokens) + ended, context),
    )


def continuation(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """Return the text that tokens add to a prompt's; a word tokenizer puts a space between the two."""
    return tokenizer.decode([*prompt, *tokens])[len(tokenizer.decode(prompt)) :]
