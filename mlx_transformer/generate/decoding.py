"""Cached decoding of tokens, batched over prompts."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import mlx.core as mx

from mlx_transformer.backend import divided_blas, in_parts, streams
from mlx_transformer.generate.decoding_model import decoding_model
from mlx_transformer.generate.sampling import Sampling
from mlx_transformer.generate.tools import Respond
from mlx_transformer.nn.cache import Cache
from mlx_transformer.nn.model import Model

GREEDY = Sampling(temperature=0.0)
_SEQUENCES_PER_STREAM = 16  # with fewer, dispatching to another stream costs more than it saves


def decode(
    model: Model,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    context: int | None = None,
    respond: Respond | None = None,
) -> Iterator[list[int]]:
    """Yield `count` times the next token of every prompt, with a new `Decoder`."""
    return Decoder(model)(prompts, count, sampling=sampling, seed=seed, context=context, respond=respond)


def count_slides(prompt: int, drawn: int, context: int) -> int:
    """Count how often a sequence slid: `drawn` tokens sampled after a prompt, in a context of so many tokens."""
    return max(0, -(-(prompt + drawn - context) // (context - _kept(context))))


def first_read(length: int, context: int) -> int:
    """Return the index of the first token that is read for the one behind `length` tokens; 0 before a slide."""
    return count_slides(length, 1, context) * (context - _kept(context))


def _kept(context: int) -> int:
    """Number of tokens that stay in a full context."""
    return max(1, context // 2)


class Decoder:
    """Cached decoding with one model: prefill, then a compiled step for each token.

    A large batch is split over the streams of a CPU. Prompts of equal length are prefilled together, others one by one,
    and their caches merged, so that no sequence holds padding. Further calls with the same shapes compile nothing.
    """

    def __init__(self, model: Model) -> None:
        self.model = decoding_model(model)
        self.model.eval()  # the model itself may be in training mode
        self._forward = mx.compile(self._step, inputs=[self.model.state])

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        *,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        context: int | None = None,
        respond: Respond | None = None,
    ) -> Iterator[list[int]]:
        """Yield `count` times the next token of every prompt.

        context: a sequence of so many tokens slides: the last half of them is prefilled again, from position 0, and
        decoding continues after it. None: sequences grow without limit.
        respond: a tool's runtime, which may replace the tokens sampled (generate/tools.py).
        """
        if count < 1 or not prompts:
            return
        keys = _keys(seed)
        used = streams()[: 1 if self.model.in_parts else max(1, len(prompts) // _SEQUENCES_PER_STREAM)]
        with divided_blas() if len(used) > 1 else nullcontext():
            split = in_parts(list(prompts), len(used))
            parts = [_Part(self, stream, own, context) for stream, (own, _) in zip(used, split, strict=True)]
            tokens = _sample(parts, sampling, next(keys), respond)
            for _ in range(count - 1):
                for part, (own, _) in zip(parts, in_parts(tokens, len(parts)), strict=True):
                    part.advance(own)
                following = _sample(parts, sampling, next(keys), respond)
                # All parts at once, else the first stream works alone; and one step ahead of the tokens that are read,
                # which are ready only when everything dispatched with them is.
                mx.async_eval(following, [part.state for part in parts])
                yield tokens.tolist()  # type: ignore[misc]
                tokens = following
            yield tokens.tolist()  # type: ignore[misc]

    def _step(self, tokens: mx.array, state: list) -> tuple[mx.array, list]:
        self.cache.state = state
        return self.model.last_logits(tokens[:, None], self.cache), self.cache.state

    def step(self, tokens: mx.array, cache: Cache) -> mx.array:
        """Return the logits (B, V) after tokens (B,) and update the cache, which grows first where it is full."""
        cache.reserve(1)
        self.cache, free_slots = cache, cache.free_slots
        logits, cache.state = self._forward(tokens, cache.state)
        cache.free_slots = [free - 1 for free in free_slots]  # a compiled step does not run the caches' Python code
        return logits


class _Part:
    """Some of the prompts, decoded on one stream: the logits (B, V) after each and their cache."""

    def __init__(
        self, decoder: Decoder, stream: mx.Stream, prompts: Sequence[Sequence[int]], context: int | None
    ) -> None:
        self.decoder, self.stream, self.prompts, self.context = decoder, stream, prompts, context
        self.lengths = [len(prompt) for prompt in prompts]  # of each sequence, in the cache
        self.drawn: deque[mx.array] = deque(maxlen=_kept(context) if context else 0)  # the last tokens (B,)
        with mx.stream(stream):
            self.logits, self.cache = _prefill(decoder.model, prompts)

    @property
    def state(self) -> list:
        """The arrays that the next step reads."""
        return [self.logits, self.cache.state]

    def advance(self, tokens: mx.array) -> None:
        """Compute the logits after the tokens (B,) just sampled; sequences that fill the context slide."""
        self.drawn.append(tokens)
        self.lengths = [length + 1 for length in self.lengths]
        full = [i for i, length in enumerate(self.lengths) if self.context and length >= self.context]
        with mx.stream(self.stream):
            if len(full) < len(self.lengths):
                self.logits = self.decoder.step(tokens, self.cache)
            if full:
                self._slide(full)

    def _slide(self, full: list[int]) -> None:
        """Prefill the last tokens of these sequences, and put the result in the place of what they had."""
        drawn = mx.stack(list(self.drawn), axis=1).tolist()
        kept = self.drawn.maxlen or 1
        tails = [[*self.prompts[i], *drawn[i]][-kept:] for i in full]  # type: ignore[index,misc]
        self.lengths = [kept if i in full else length for i, length in enumerate(self.lengths)]
        logits, cache = _prefill(self.decoder.model, tails)
        if others := [i for i in range(len(self.lengths)) if i not in full]:
            self.cache.select(mx.array(others))
            cache.offset = mx.full((len(full),), kept)
            cache = Cache.merge([self.cache, cache])
            places = mx.argsort(mx.array(others + full))
            cache.select(places)
            cache.compact(max(self.lengths))
            logits = mx.concatenate([self.logits[mx.array(others)], logits])[places]
        self.logits, self.cache = logits, cache


def _sample(parts: Sequence[_Part], sampling: Sampling, key: mx.array, respond: Respond | None) -> mx.array:
    """Sample the next token of every sequence, (B,), or let a tool's runtime write it."""
    tokens = sampling(mx.concatenate([part.logits for part in parts]), key)
    return tokens if respond is None else mx.array(respond(tokens.tolist()))  # type: ignore[arg-type]


def _keys(seed: int) -> Iterator[mx.array]:
    """Yield a random key for each step."""
    key = mx.random.key(seed)
    while True:
        key, own = mx.random.split(key)
        yield own


def _prefill(model: Model, prompts: Sequence[Sequence[int]]) -> tuple[mx.array, Cache]:
    """Compute the logits (B, V) after each prompt, and one cache of all."""
    if len({len(prompt) for prompt in prompts}) == 1:
        cache = model.make_cache(len(prompts))
        return model.last_logits(mx.array([list(prompt) for prompt in prompts]), cache), cache
    parts = [_prefill(model, [prompt]) for prompt in prompts]
    return mx.concatenate([logits for logits, _ in parts]), Cache.merge([cache for _, cache in parts])
