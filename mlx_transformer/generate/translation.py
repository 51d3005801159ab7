"""Translations by a trained encoder-decoder, and how good they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_transformer.data.pairs import encode_pairs, encode_sources
from mlx_transformer.data.tokenizers import Tokenizer
from mlx_transformer.generate.beam import GREEDY, Beam, Hypothesis, search
from mlx_transformer.generate.decoding import Decoder
from mlx_transformer.nn.model import Model
from mlx_transformer.train.evaluate import Evaluator, batch_tokens
from mlx_transformer.utils.errors import BadInput

_ROWS = 256  # hypotheses decoded together
_WORDS = 4  # of a bar of the exact match by length

Pair = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Translation:
    """A source and its translation."""

    source: str
    text: str
    tokens: list[int]  # of the translation, without EOS
    score: float  # log-probability / length penalty
    ended: bool  # by EOS rather than by the limit


def translate(
    model: Model,
    tokenizer: Tokenizer,
    sources: str | Sequence[str],
    *,
    beam: int = 4,
    length_penalty: float = 0.6,
    max_tokens: int | None = None,
) -> list[Translation]:
    """Translate sentences by beam search, in order; beam 1 is greedy.

    max_tokens: of a translation, EOS included; None: 50 more than its source has.
    Raises BadInput for a model that does not translate, an empty source, and a number out of its range.
    """
    if not model.parallel:
        raise BadInput("this model continues text and does not translate: use generate, or train --branch translator")
    if max_tokens is not None and max_tokens < 1:
        raise BadInput(f"max-tokens = {max_tokens}: expected a whole number of at least 1")
    texts, how = [sources] if isinstance(sources, str) else list(sources), Beam(size=beam, alpha=length_penalty)
    for text in texts:
        if not text.strip():
            raise BadInput(f"sentence {text!r} is empty: expected some text to translate")
    encoded = encode_sources(tokenizer, [text.strip() for text in texts])
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
    decoder, found = Decoder(model), dict[int, Hypothesis]()
    for start in range(0, len(order), at_once := max(1, _ROWS // beam)):
        chosen = order[start : start + at_once]
        rows, limits = [encoded[i] for i in chosen], [max_tokens] * len(chosen)
        best = search(decoder, rows, tokenizer.bos_id, tokenizer.eos_id, how, limits)
        found |= dict(zip(chosen, best, strict=True))
    return [
        Translation(source=text, text=tokenizer.decode(one.tokens), tokens=one.tokens, score=one.score, ended=one.ended)
        for text, one in ((text, found[i]) for i, text in enumerate(texts))
    ]


def compare(translations: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
    """Score translations: exact_match in [0, 1]; chrf and bleu as sacrebleu gives them, in [0, 100].

    chrF: Popović 2015; BLEU: Papineni et al. 2002. Both are None where sacrebleu is not installed.
    """
    same = sum(ours == reference for ours, reference in zip(translations, references, strict=True))
    scores: dict[str, float | None] = {"exact_match": same / len(references), "chrf": None, "bleu": None}
    try:
        from sacrebleu import corpus_bleu, corpus_chrf
    except ImportError:
        return scores
    ours, theirs = list(translations), [list(references)]
    return scores | {"chrf": corpus_chrf(ours, theirs).score, "bleu": corpus_bleu(ours, theirs, force=True).score}


def translation_loss(
    model: Model, tokenizer: Tokenizer, pairs: Sequence[Pair], say: Callable[[str], None] = print
) -> tuple[float | None, int]:
    """Return the loss in nats per target token, and the tokens, of the pairs of at most the model's seq_len tokens.

    Says how many pairs are longer; the loss is None where all are.
    """
    try:
        side, _ = encode_pairs(pairs, tokenizer, model.config.seq_len, say)
    except BadInput:  # none fits
        return None, 0
    evaluator = Evaluator(model, side.in_order(batch_tokens()))
    return evaluator(), evaluator.tokens


def judge(
    model: Model,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    beam: Beam = Beam(),  # noqa: B008
    kind_of: Callable[[Pair], str] | None = None,
) -> dict[str, Any]:
    """Translate sources by beam search and greedily, and score both.

    by_length: for each class of source lengths, in words, its first length, its pairs and their exact match. by_kind:
    the same for the pairs of each kind, where kind_of tells them.
    """
    found = [_judged(model, tokenizer, pairs, how, kind_of) for how in (beam, GREEDY)]
    return {"pairs": len(pairs), **found[0], "greedy": found[1]}


def _judged(
    model: Model, tokenizer: Tokenizer, pairs: Sequence[Pair], beam: Beam, kind_of: Callable[[Pair], str] | None
) -> dict[str, Any]:
    """Translate sources and score the translations."""
    made = translate(model, tokenizer, [source for source, _ in pairs], beam=beam.size, length_penalty=beam.alpha)
    texts, references = [one.text for one in made], [target for _, target in pairs]
    hits = [ours == reference for ours, reference in zip(texts, references, strict=True)]
    scores = {
        **compare(texts, references),
        "score": sum(one.score for one in made) / len(made),
        "by_length": _by_length(pairs, hits),
    }
    if kind_of is None:
        return scores
    kinds: dict[str, tuple[list[Pair], list[bool]]] = {}
    for pair, hit in zip(pairs, hits, strict=True):
        own = kinds.setdefault(kind_of(pair), ([], []))
        own[0].append(pair)
        own[1].append(hit)
    return scores | {
        "by_kind": {
            kind: {"pairs": len(own), "exact_match": sum(right) / len(own), "by_length": _by_length(own, right)}
            for kind, (own, right) in sorted(kinds.items())
        }
    }


def _by_length(pairs: Sequence[Pair], hits: Sequence[bool]) -> list[list[float]]:
    """Return [first length, pairs, share of hits] of each class of source lengths, in words."""
    classes: dict[int, list[bool]] = {}
    for (source, _), hit in zip(pairs, hits, strict=True):
        classes.setdefault((len(source.split()) - 1) // _WORDS * _WORDS + 1, []).append(hit)
    return [[words, len(own), sum(own) / len(own)] for words, own in sorted(classes.items())]
