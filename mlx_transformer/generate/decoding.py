"""Cached decoding, batched over prompts."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import mlx.core as mx

from mlx_transformer.backend import divided_blas, in_parts, streams
from mlx_transformer.data.tokenizers import Tokenizer
from mlx_transformer.generate.ready import ready
from mlx_transformer.generate.sampling import Sampling
from mlx_transformer.nn.cache import Cache
from mlx_transformer.nn.model import Model
from mlx_transformer.utils.errors import BadInput

GREEDY = Sampling(temperature=0.0)
_ROWS_OF_A_STREAM = 16  # at least: dispatching to another one costs more than it saves with fewer


@dataclass(frozen=True, kw_only=True)
class Story:
    """A prompt and what the model made of it."""

    prompt: str
    continuation: str
    pieces: list[int]  # the continuation's, without the boundary
    ended: bool  # at a document's end, not at the limit

    @property
    def text(self) -> str:
        """Prompt and continuation."""
        return self.prompt + self.continuation


def tell(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    seed: int = 0,
) -> list[Story]:
    """One story for each prompt, up to its document end, max_tokens pieces, or the context if that is nearer.

    Raises BadInput for a prompt that is empty or does not fit the context.
    """
    encoded = [encode_prompt(tokenizer, prompt, model.config.seq_len) for prompt in prompts]
    return _tell(model, tokenizer, list(prompts), encoded, max_tokens, sampling, seed)


def tell_freely(model: Model, tokenizer: Tokenizer, count: int, *, sampling: Sampling, seed: int = 0) -> list[Story]:
    """So many stories from nothing but a document's opening, up to their ends or the context."""
    return _tell(model, tokenizer, [""] * count, [[tokenizer.bos_id]] * count, None, sampling, seed)


def _tell(
    model: Model,
    tokenizer: Tokenizer,
    prompts: list[str],
    encoded: list[list[int]],
    max_tokens: int | None,
    sampling: Sampling,
    seed: int,
) -> list[Story]:
    pieces: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    free_slots = [model.config.seq_len - len(ids) for ids in encoded]
    limit = [r if max_tokens is None else min(r, max_tokens) for r in free_slots]
    for drawn in decode(model, encoded, max(limit, default=0), sampling=sampling, seed=seed):
        for i, piece in enumerate(drawn):
            if not ended[i] and len(pieces[i]) < limit[i]:
                ended[i] = piece == tokenizer.eos_id
                pieces[i] += [] if ended[i] else [piece]
        if all(done or len(own) >= most for done, own, most in zip(ended, pieces, limit, strict=True)):
            break
    return [
        Story(prompt=prompt, continuation=_text_behind(tokenizer, ids, own), pieces=own, ended=done)
        for prompt, ids, own, done in zip(prompts, encoded, pieces, ended, strict=True)
    ]


def stream(
    model: Model, tokenizer: Tokenizer, prompt: str, max_tokens: int | None, sampling: Sampling, seed: int
) -> Iterator[str]:
    """One story as it is made: text as soon as it is certain, since a piece may be a part of a character.

    Raises BadInput as `tell` does.
    """
    ids = encode_prompt(tokenizer, prompt, model.config.seq_len)
    free_slots = model.config.seq_len - len(ids)
    pieces: list[int] = []
    shown = 0
    for (piece,) in decode(model, [ids], min(free_slots, max_tokens or free_slots), sampling=sampling, seed=seed):
        if piece == tokenizer.eos_id:
            break
        pieces.append(piece)
        text = _text_behind(tokenizer, ids, pieces)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[shown:]
            shown = len(text)
    yield _text_behind(tokenizer, ids, pieces)[shown:]


def _text_behind(tokenizer: Tokenizer, prompt: list[int], pieces: list[int]) -> str:
    """What pieces add to the text of a prompt's; the word tokenizer puts a space between the two."""
    return tokenizer.decode([*prompt, *pieces])[len(tokenizer.decode(prompt)) :]


def encode_prompt(tokenizer: Tokenizer, prompt: str, context: int) -> list[int]:
    """The pieces of a prompt, behind what the tokenizer has in front of one.

    Raises BadInput for a prompt that is empty or leaves no room in the context (pieces).
    """
    if not prompt.strip():
        raise BadInput(f"prompt {prompt!r} is empty: give the first words of a story")
    pieces = [*tokenizer.prompt_prefix, *tokenizer.encode(prompt)] or [tokenizer.bos_id]
    if len(pieces) >= context:
        start = prompt if len(prompt) <= 40 else prompt[:37] + "..."
        raise BadInput(f"prompt '{start}' has {len(pieces)} pieces: expected fewer than the context of {context}")
    return pieces


def decode(
    model: Model, prompts: Sequence[Sequence[int]], count: int, *, sampling: Sampling = GREEDY, seed: int = 0
) -> Iterator[list[int]]:
    """Yield count times the next piece of every prompt; each row goes on behind its own pieces, of whatever length."""
    return Decoder(model)(prompts, count, sampling=sampling, seed=seed)


class Decoder:
    """Cached decoding with one model: the prompts are read, then a compiled step a piece.

    Many rows are divided over the streams of a CPU. Prompts of equal length are read together, others one by one and
    their caches merged, so that no row holds padding. Called again with shapes it has seen, it compiles nothing anew.
    """

    def __init__(self, model: Model) -> None:
        self.model = ready(model)
        self.model.eval()  # whatever mode the model itself is in: fit() leaves it training
        self._forward = mx.compile(self._step, inputs=[self.model.state])

    def __call__(
        self, prompts: Sequence[Sequence[int]], count: int, *, sampling: Sampling = GREEDY, seed: int = 0
    ) -> Iterator[list[int]]:
        """Yield count times the next piece of every prompt."""
        if count < 1 or not prompts:
            return
        keys = _keys(seed)
        used = streams()[: max(1, len(prompts) // _ROWS_OF_A_STREAM)]
        with divided_blas() if len(used) > 1 else nullcontext():
            rows = in_parts(list(prompts), len(used))
            parts = [_Rows(self, stream, own) for stream, (own, _) in zip(used, rows, strict=True)]
            pieces = _drawn(parts, sampling, next(keys))
            for _ in range(count - 1):
                for part, (own, _) in zip(parts, in_parts(pieces, len(parts)), strict=True):
                    part.advance(own)
                following = _drawn(parts, sampling, next(keys))
                # All at once, else the first stream works alone; and a step ahead of the pieces that are looked at, as
                # they are there only when all is that was dispatched with them.
                mx.async_eval(following, [part.state for part in parts])
                yield pieces.tolist()  # type: ignore[misc]
                pieces = following
            yield pieces.tolist()  # type: ignore[misc]

    def _step(self, pieces: mx.array, state: list) -> tuple[mx.array, list]:
        self.cache.state = state
        return self.model.unembed(self.model.last_hidden(pieces[:, None], self.cache)[:, -1]), self.cache.state

    def step(self, pieces: mx.array, cache: Cache) -> mx.array:
        """Logits (B, V) behind the pieces (B,), with the cache moved on; where it is full it grows first."""
        cache.reserve(1)
        self.cache, free_slots = cache, cache.free_slots
        logits, cache.state = self._forward(pieces, cache.state)
        cache.free_slots = [free - 1 for free in free_slots]  # a compiled step bypasses the caches
        return logits


class _Rows:
    """Some prompts on a stream of their own: logits (B, V) behind each, and their cache."""

    def __init__(self, decoder: Decoder, stream: mx.Stream, prompts: Sequence[Sequence[int]]) -> None:
        self.decoder, self.stream = decoder, stream
        with mx.stream(stream):
            self.logits, self.cache = _read(decoder.model, prompts)

    @property
    def state(self) -> list:
        """What the next step reads."""
        return [self.logits, self.cache.state]

    def advance(self, pieces: mx.array) -> None:
        """Logits behind the pieces (B,) just drawn."""
        with mx.stream(self.stream):
            self.logits = self.decoder.step(pieces, self.cache)


def _drawn(parts: Sequence[_Rows], sampling: Sampling, key: mx.array) -> mx.array:
    """The next piece of every row (B,)."""
    return sampling(mx.concatenate([part.logits for part in parts]), key)


def _keys(seed: int) -> Iterator[mx.array]:
    """A random key for each draw."""
    key = mx.random.key(seed)
    while True:
        key, own = mx.random.split(key)
        yield own


def _read(model: Model, prompts: Sequence[Sequence[int]]) -> tuple[mx.array, Cache]:
    """Logits (B, V) behind each prompt, and one cache of all."""
    if len({len(prompt) for prompt in prompts}) == 1:
        cache = model.make_cache(len(prompts))
        return model.unembed(model.last_hidden(mx.array([list(prompt) for prompt in prompts]), cache)[:, -1]), cache
    read = [_read(model, [prompt]) for prompt in prompts]
    return mx.concatenate([logits for logits, _ in read]), Cache.merge([cache for _, cache in read])
