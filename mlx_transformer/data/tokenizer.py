"""Tokenizers: text to pieces (integers) and back. One interface, three kinds: bpe, word, hf.

`decode` can be streamed: decode(pieces + [next]) begins with decode(pieces), but for U+FFFD at its end, which stands
for a character of which bytes are still to come (bpe and word exactly; an imported one as far as its decoder does).
"""

import functools
import hashlib
import io
import itertools
import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_transformer.data.corpus import Corpus, read_parts
from mlx_transformer.data.store import SEPARATOR, cached_folder
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.files import atomic_write, write_json

DEFAULT_VOCAB_SIZE = 8192
SAMPLE_BYTES = 20_000_000  # of the training text that a vocabulary is learned from
_VERSION = 2  # of the way vocabularies are trained: part of the cache key
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # U+2581, as which SentencePiece writes a space


class Tokenizer(ABC):
    """Pieces are integers in [0, vocab_size); the boundary is the piece between two documents and is never text."""

    kind: str
    vocab_size: int
    eos_id: int
    lossless: bool  # decode(encode(text)) == text, for every text
    unknown: int | None  # the piece for what the vocabulary lacks; None where there is no such thing

    @property
    def bos_id(self) -> int:
        """The piece that a document begins with."""
        return self.eos_id

    @property
    def prompt_prefix(self) -> list[int]:
        """What stands in front of a prompt."""
        return [self.bos_id]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The pieces of a text, never the boundary, whatever the text holds. Raises BadInput for lone surrogates."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores where the library can."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, pieces: Sequence[int]) -> str:
        """The text of any pieces; boundaries and padding are nothing, an incomplete character is U+FFFD."""

    @abstractmethod
    def piece(self, index: int) -> str:
        """A piece as the tokenizer itself writes it, for people to look at."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Name and content of the files that `load_tokenizer` reads; the names begin with `tokenizer.`."""

    def save(self, folder: Path) -> None:
        """Write its files into a folder. Raises OSError."""
        for name, content in self.files().items():
            atomic_write(folder / name, content)

    @functools.cached_property
    def sha256(self) -> str:
        """Of its files: two tokenizers with the same one are the same."""
        return hashlib.sha256(b"".join(self.files().values())).hexdigest()


def threads() -> int:
    """OMP_NUM_THREADS, else the cores that this process may run on."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    if named.isdigit() and int(named) > 0:
        return int(named)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class BPE(Tokenizer):
    """SentencePiece byte-pair encoding with byte fallback (Sennrich et al. 2016; Kudo and Richardson 2018).

    Identity normalisation, no dummy prefix, all white space kept; newline and tab are pieces of their own and never
    part of another, so that a text may be cut behind any newline without changing its pieces. SentencePiece turns
    U+2581 into a space, so here it never sees one: the character is spelled by its three byte pieces, without loss.
    """

    kind, lossless, unknown = "bpe", True, None

    def __init__(self, proto: bytes):
        from sentencepiece import SentencePieceProcessor

        self._proto = proto
        self._model = SentencePieceProcessor(model_proto=proto)
        self.vocab_size = self._model.vocab_size()
        self.eos_id = self._model.eos_id()
        self._bytes = [self._bytes_of(i) for i in range(self.vocab_size)]
        self._spelled = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]

    def _bytes_of(self, index: int) -> bytes:
        piece = self._model.id_to_piece(index)
        if self._model.is_byte(index):
            return bytes([int(piece[3:5], 16)])
        if self._model.is_control(index):
            return b""
        return (
            "\N{REPLACEMENT CHARACTER}".encode()
            if self._model.is_unknown(index)
            else piece.replace(_SPACE, " ").encode()
        )

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        cut = [text.split(_SPACE) for text in texts]
        try:
            encoded = iter(self._model.encode([part for parts in cut for part in parts], num_threads=threads()))
        except TypeError as error:
            raise _not_unicode(texts) from error
        return [self._join([next(encoded) for _ in parts]) for parts in cut]

    def _join(self, parts: list[list[int]]) -> list[int]:
        joined = parts[0]
        for part in parts[1:]:
            joined = joined + self._spelled + part
        return joined

    def decode(self, pieces: Sequence[int]) -> str:
        return b"".join(self._bytes[i] for i in pieces).decode("utf-8", errors="replace")

    def piece(self, index: int) -> str:
        return self._model.id_to_piece(index)

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._proto}


class Word(Tokenizer):
    """Words, case kept; punctuation marks and newlines are words of their own. Not lossless: white space is guessed."""

    kind, lossless = "word", False
    SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")
    unknown, eos_id = 1, 3
    _WORD = re.compile(r"\n|\w+(?:['’]\w+)*|[^\w\s]")
    _NOT_BEFORE = frozenset("\n.,!?;:%)]}'’”…-–—/")
    _NOT_AFTER = frozenset("\n([{‘“$#-–—/")

    def __init__(self, words: Sequence[str]):
        self._words = [*self.SPECIALS, *words]
        self._index = {word: i for i, word in enumerate(self._words) if i >= len(self.SPECIALS)}
        self.vocab_size = len(self._words)

    @classmethod
    def split(cls, text: str) -> list[str]:
        return cls._WORD.findall(text)

    def encode(self, text: str) -> list[int]:
        return [self._index.get(word, self.unknown) for word in self.split(text)]

    def decode(self, pieces: Sequence[int]) -> str:
        """Join words as English is written; a straight double quote opens and closes in turn within a paragraph."""
        text, before, quoted = [], "\n", False
        for word in (self._words[i] for i in pieces if i == self.unknown or i >= len(self.SPECIALS)):
            closes = word == '"' and quoted
            if not (closes or word in self._NOT_BEFORE or before in self._NOT_AFTER or (before == '"' and quoted)):
                text.append(" ")
            text.append(word)
            quoted = word != "\n" and quoted != (word == '"')
            before = word
        return "".join(text)

    def piece(self, index: int) -> str:
        return self._words[index]

    def files(self) -> dict[str, bytes]:
        return {
            "tokenizer.words.json": json.dumps(self._words[len(self.SPECIALS) :], ensure_ascii=False, indent=0).encode()
        }


class Imported(Tokenizer):
    """A `tokenizer.json` of Hugging Face's library `tokenizers`; its end-of-text piece is the boundary.

    That is the special piece numbered `end`, if there is one, else one of the usual names. A document opens with the
    piece that its template puts in front of a text, as Llama's `<s>`; else with the boundary. It counts as lossless if
    a battery of awkward texts survives (byte-level BPE does); whether the validation text does is checked once more
    when that is tokenised. A special token's own text within a document is plain text.
    """

    kind = "hf"
    _END = "tokenizer.end.txt"
    _ENDS = (SEPARATOR, "</s>", "<eos>", "<|end_of_text|>")
    _BATTERY = (
        "Once upon a time, 3.5 cats said: “no!” – (it's 100%) don't.",
        "  two  spaces\n\n\ttabs \n and ends ",
        "Zoë naïve ﬁ A\u0301 \u00a0 Привет 你好 مرحبا 🙂👩‍🚀",
        "".join(map(chr, range(32, 127))),
    )

    def __init__(self, content: bytes, end: int | None = None):
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise BadInput(
                "a tokenizer.json needs the library tokenizers; install it with `pip install tokenizers`"
            ) from None
        try:
            self._model: Any = Library.from_buffer(content)
        except Exception as error:  # the library raises nothing more precise
            raise BadInput(f"this tokenizer.json is not one that the library tokenizers can read ({error})") from error
        self._content = content
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        vocabulary: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise BadInput("this tokenizer.json has no pieces: expected a vocabulary")
        self.vocab_size = max(vocabulary.values()) + 1
        special = {index for index, added in self._model.get_added_tokens_decoder().items() if added.special}
        usual = next((vocabulary[piece] for piece in self._ENDS if piece in vocabulary), None)
        eos_id = end if end in special else usual
        if eos_id is None:
            raise BadInput(f"this tokenizer.json has no piece that ends a text (looked for {', '.join(self._ENDS)})")
        self.eos_id = eos_id
        self._is_usual = eos_id == usual
        self.unknown = vocabulary.get(getattr(self._model.model, "unk_token", None) or "<unk>")
        self.lossless = all(self.decode(self.encode(text)) == text for text in self._BATTERY)

    @functools.cached_property
    def prompt_prefix(self) -> list[int]:
        """What the template puts in front of a text: nothing in GPT-2's."""
        text = self._model.encode(self._BATTERY[0])
        marked = zip(text.ids, text.special_tokens_mask, strict=True)
        return [piece for piece, _ in itertools.takewhile(lambda pair: pair[1], marked)]

    @property
    def bos_id(self) -> int:
        return next(iter(self.prompt_prefix), self.eos_id)

    @classmethod
    def read(cls, path: Path) -> "Imported":
        """A tokenizer.json, and the end of text that a run has kept beside it."""
        end = path.with_name(cls._END)
        return cls(path.read_bytes(), int(end.read_text()) if end.is_file() else None)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError as error:
            raise _not_unicode(texts) from error

    def decode(self, pieces: Sequence[int]) -> str:
        return self._model.decode(list(pieces), skip_special_tokens=True)

    def piece(self, index: int) -> str:
        return self._model.id_to_token(index) or ""

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._content} | ({} if self._is_usual else {self._END: b"%d" % self.eos_id})


def _not_unicode(texts: Sequence[str]) -> BadInput:
    """Why a library refused texts: Python strings may hold halves of surrogate pairs, UTF-8 cannot."""
    half = next((char for text in texts for char in text if "\ud800" <= char <= "\udfff"), "")
    return BadInput(f"the text holds {half!r}, half of a surrogate pair, which is no character; give valid UTF-8")


_FILES: dict[str, Callable[[Path], Tokenizer]] = {
    "tokenizer.model": lambda path: BPE(path.read_bytes()),
    "tokenizer.words.json": lambda path: Word(json.loads(path.read_bytes())),
    "tokenizer.json": Imported.read,
}


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that was saved in a folder. Raises BadInput if there is none or its file is damaged."""
    for name, read in _FILES.items():
        if (folder / name).is_file():
            try:
                return read(folder / name)
            except BadInput as error:
                raise BadInput(f"{folder / name}: {error}") from None
            except (OSError, RuntimeError, ValueError, TypeError) as error:
                raise BadInput(
                    f"{folder / name} cannot be read ({error}); it is damaged or not a tokenizer's file"
                ) from error
    raise BadInput(f"{folder} has no tokenizer in it (looked for {', '.join(_FILES)})")


# Learning a vocabulary

_BPE_FIXED = 260  # pieces that every vocabulary has: boundary, unknown, newline, tab and 256 bytes
_BPE_SMALLEST = _BPE_FIXED + 2
_LONG = 4000  # characters of a line, beyond which SentencePiece is given its words one by one
_RESERVED = re.compile("[\n\t\0\u2581\u2585]")  # SentencePiece skips whole lines that hold one of these


def train_tokenizer(kind: str, corpus: Corpus, vocab_size: int | None = None, explicit: bool = True) -> Tokenizer:
    """A tokenizer for a corpus, learned from its training split: `bpe`, `word`, or the path of a tokenizer.json.

    Where the text supports fewer pieces than `vocab_size` (None: 8,192), that is BadInput if the number is `explicit`;
    else as many as it supports are taken (bpe: a multiple of 64), which `vocab_size` of the tokenizer then says.
    """
    if kind not in ("bpe", "word"):
        return _imported(kind, vocab_size if explicit else None)
    wanted = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
    least = _BPE_SMALLEST if kind == "bpe" else len(Word.SPECIALS) + 1
    explicit = explicit and vocab_size is not None
    if wanted < least:
        raise BadInput(f"--vocab-size {wanted} is too small for the tokenizer {kind}; give at least {least}")

    def build(folder: Path) -> None:
        sample = _sample(corpus)
        tokenizer, supported = _train_bpe(sample, wanted) if kind == "bpe" else _train_word(sample, wanted)
        tokenizer.save(folder)
        write_json(folder / "supported.json", supported)

    key = hashlib.sha256(repr((_VERSION, kind, wanted, SAMPLE_BYTES, corpus.train_sha256)).encode()).hexdigest()[:20]
    folder = cached_folder("tokenizers", f"{kind}-{key}", build)
    supported = json.loads((folder / "supported.json").read_text())
    if explicit and supported < wanted:
        raise BadInput(
            f"--vocab-size {wanted} is more than this text supports with the tokenizer {kind}; "
            f"the largest is {supported}: give that or less, or a longer text"
        )
    return load_tokenizer(folder)


def _imported(kind: str, vocab_size: int | None) -> Imported:
    path = Path(kind).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Imported.read(path)
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(
            f"--tokenizer {kind} is neither bpe nor word, nor a tokenizer.json that can be read ({reason})"
        ) from error
    if vocab_size not in (None, tokenizer.vocab_size):
        raise BadInput(
            f"--vocab-size {vocab_size} does not fit {path}, which has {tokenizer.vocab_size} pieces; leave it out"
        )
    return tokenizer


def _sample(corpus: Corpus) -> list[str]:
    """Texts of together about SAMPLE_BYTES, evenly from the whole training split: the same ones every time."""
    share = min(1.0, SAMPLE_BYTES / corpus.train_bytes)
    seen, kept = 0, 0
    sample: list[str] = []
    for text, _ in read_parts(corpus.train):
        seen += len(text)
        if kept + len(text) <= seen * share or not sample:
            kept += len(text)
            sample.append(text)
    return sample


def _train_word(sample: list[str], wanted: int) -> tuple[Word, int]:
    counts = Counter(word for text in sample for word in Word.split(text))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return Word(ranked[: wanted - len(Word.SPECIALS)]), len(ranked) + len(Word.SPECIALS)


def _train_bpe(sample: list[str], wanted: int) -> tuple[BPE, int]:
    """A model of at most `wanted` pieces, and how many the text supports (no more than wanted are looked for)."""
    lines = [line for text in sample for line in _lines(text) if line]
    if not lines:
        raise BadInput("the training text has no characters to learn pieces from; give another text")
    model = BPE(_bpe_proto(lines, wanted))
    supported, even = model.vocab_size, model.vocab_size // 64 * 64
    if even >= _BPE_SMALLEST and supported < wanted:
        model = BPE(_bpe_proto(lines, even))
    return model, supported


def _lines(text: str) -> Iterator[str]:
    """What SentencePiece may be trained on: no character that makes it skip a line, no line that is too long for it."""
    for line in _RESERVED.split(text):
        if len(line) <= _LONG:
            yield line
        else:
            yield from re.findall(f" *[^ ]{{1,{_LONG}}}", line)


def _known_stretches(lines: list[str], size: int) -> Iterator[str]:
    """Lines without their rare characters, which are left to the bytes.

    The others are the most frequent ones, until they make up all but 1 in 10,000 characters or half of the pieces.
    """
    counts = Counter(itertools.chain.from_iterable(lines)).most_common()
    total, covered, alphabet = sum(count for _, count in counts), 0, ""
    for char, count in counts[: (size - _BPE_FIXED) // 2]:
        if covered >= 0.9999 * total:
            break
        alphabet += char
        covered += count
    rare = re.compile(f"[^{re.escape(alphabet)}]")
    for line in lines:
        yield from filter(None, rare.split(line))


def _bpe_proto(lines: list[str], size: int) -> bytes:
    from sentencepiece import SentencePieceTrainer

    proto = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=_known_stretches(lines, size),
        model_writer=proto,
        model_type="bpe",
        vocab_size=size,
        hard_vocab_limit=False,
        character_coverage=1.0,  # _known_stretches has seen to it
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
        num_threads=4,  # is written into the model: must not follow the machine, though it does not change the pieces
        minloglevel=2,
    )
    return proto.getvalue()
