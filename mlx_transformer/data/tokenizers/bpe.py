"""The byte-pair encoding of SentencePiece, and how its vocabulary is learned ("piece": SentencePiece's token)."""

import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from mlx_transformer.data.store import SEPARATOR
from mlx_transformer.data.tokenizers.base import Tokenizer, not_unicode
from mlx_transformer.utils.errors import BadInput

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # U+2581, as which SentencePiece writes a space

_FIXED = 260  # tokens of every vocabulary: EOS, unknown, newline, tab and 256 bytes
SMALLEST_BPE = _FIXED + 2
_LONG = 4000  # characters of a line, beyond which SentencePiece is given its words one by one
_RESERVED = re.compile("[\n\t\0\u2581\u2585]")  # SentencePiece skips whole lines that hold one of these


class BPETokenizer(Tokenizer):
    """SentencePiece byte-pair encoding with byte fallback (Sennrich et al. 2016; Kudo and Richardson 2018).

    Identity normalization, no dummy prefix, all white space kept; newline and tab are tokens of their own and never
    part of another, so that a text may be cut after any newline without changing its tokens. SentencePiece turns U+2581
    into a space, so here it never sees one: the character is written as its three byte tokens, without loss.
    """

    kind, lossless, unk_id = "bpe", True, None

    def __init__(self, proto: bytes):
        from sentencepiece import SentencePieceProcessor

        self._proto = proto
        self._model = SentencePieceProcessor()
        self._model.LoadFromSerializedProto(proto)  # its constructor takes an empty one for none, and logs at each use
        self.vocab_size = self._model.vocab_size()
        self.eos_id = self._model.eos_id()
        self._bytes = [self._bytes_of(i) for i in range(self.vocab_size)]
        self._space_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]

    def _bytes_of(self, index: int) -> bytes:
        piece = self._model.id_to_piece(index)
        if self._model.is_byte(index):
            return bytes([int(piece[3:5], 16)])
        if self._model.is_control(index):
            return b""
        if self._model.is_unknown(index):
            return "\N{REPLACEMENT CHARACTER}".encode()
        return piece.replace(_SPACE, " ").encode()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        split = [text.split(_SPACE) for text in texts]
        try:
            encoded = iter(self._model.encode([part for parts in split for part in parts], num_threads=_threads()))
        except TypeError as error:
            raise not_unicode(texts) from error
        return [self._join([next(encoded) for _ in parts]) for parts in split]

    def _join(self, parts: list[list[int]]) -> list[int]:
        joined = parts[0]
        for part in parts[1:]:
            joined = joined + self._space_ids + part
        return joined

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")

    def token(self, index: int) -> str:
        return self._model.id_to_piece(index)

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._proto}


def _threads() -> int:
    """The number of cores that this process may run on, at most OMP_NUM_THREADS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(int(limit), cores) if limit.isdigit() and int(limit) > 0 else cores


def train_bpe(sample: list[str], vocab_size: int) -> tuple[BPETokenizer, int]:
    """Return a tokenizer of at most `vocab_size` tokens, and how many of them the sample supports."""
    lines = [line for text in sample for line in _lines(text) if line]
    if not lines:
        raise BadInput("the training text has no characters to learn tokens from; give another text")
    tokenizer = BPETokenizer(_train(lines, vocab_size))
    supported, even = tokenizer.vocab_size, tokenizer.vocab_size // 64 * 64
    if even >= SMALLEST_BPE and supported < vocab_size:
        tokenizer = BPETokenizer(_train(lines, even))
    return tokenizer, supported


def _lines(text: str) -> Iterator[str]:
    """Yield what SentencePiece can be trained on: lines without reserved characters, none too long for it."""
    for line in _RESERVED.split(text):
        if len(line) <= _LONG:
            yield line
        else:
            yield from re.findall(f" *[^ ]{{1,{_LONG}}}", line)


def _frequent_stretches(lines: list[str], vocab_size: int) -> Iterator[str]:
    """Yield the lines without their rare characters, which are left to the byte tokens.

    The others are the most frequent ones, until they cover all but 1 in 10,000 characters or fill half the vocabulary.
    """
    counts = Counter(itertools.chain.from_iterable(lines)).most_common()
    total, covered, alphabet = sum(count for _, count in counts), 0, ""
    for char, count in counts[: (vocab_size - _FIXED) // 2]:
        if covered >= 0.9999 * total:
            break
        alphabet += char
        covered += count
    rare = re.compile(f"[^{re.escape(alphabet)}]")
    for line in lines:
        yield from filter(None, rare.split(line))


def _train(lines: list[str], vocab_size: int) -> bytes:
    """Return a SentencePiece model learned from lines."""
    from sentencepiece import SentencePieceTrainer

    proto = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=_frequent_stretches(lines, vocab_size),
        model_writer=proto,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,  # _frequent_stretches has removed the rare characters
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n", "\t"],
        required_chars="\u2581",  # SentencePiece's space: without it, a text that has none makes every space a U+2581
        eos_id=0,
        eos_piece=SEPARATOR,
        unk_id=1,
        bos_id=-1,
        pad_id=-1,
        max_sentence_length=1 << 20,
        num_threads=4,  # is written into the model: must not follow the machine, though it does not change the tokens
        minloglevel=2,
    )
    return proto.getvalue()
