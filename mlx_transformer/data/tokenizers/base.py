"""The interface of a tokenizer."""

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.files import atomic_write


class Tokenizer(ABC):
    """Map text to token ids in [0, vocab_size) and back.

    The EOS token separates two documents and is never text. Decoding can be streamed: decode(ids + [next]) begins with
    decode(ids), except for U+FFFD at its end, which stands for a character whose remaining bytes are still to come (bpe
    and word exactly; hf as far as its decoder does).
    """

    kind: str  # "bpe", "word", "hf" or "symbols"
    vocab_size: int
    eos_id: int
    unk_id: int | None  # token of what the vocabulary lacks; None if it lacks nothing
    lossless: bool  # decode(encode(text)) == text, for every text
    version = 2  # of the rules by which texts are encoded: part of the key of cached vocabularies and tokens

    @property
    def bos_id(self) -> int:
        """The token that begins a document: the EOS token where there is no other."""
        return self.eos_id

    @property
    def prompt_prefix(self) -> list[int]:
        """Tokens in front of a prompt."""
        return [self.bos_id]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, never EOS, whatever the text holds. Raises BadInput for lone surrogates."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text, on all cores where the library can."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of any token ids: EOS and padding give nothing, an incomplete character gives U+FFFD."""

    @abstractmethod
    def token(self, index: int) -> str:
        """Return a token as the tokenizer itself writes it, for people to look at."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Return name and content of the files that `load_tokenizer` reads; the names begin with `tokenizer.`."""

    def save(self, folder: Path) -> None:
        """Write the files into a folder. Raises OSError."""
        for name, content in self.files().items():
            atomic_write(folder / name, content)

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the files: equal for equal tokenizers."""
        return hashlib.sha256(b"".join(self.files().values())).hexdigest()


def not_unicode(texts: Sequence[str]) -> BadInput:
    """Explain why a library refused texts: Python strings may hold halves of surrogate pairs, UTF-8 cannot."""
    half = next((char for text in texts for char in text if "\ud800" <= char <= "\udfff"), "")
    return BadInput(f"the text holds {half!r}, half of a surrogate pair, which is no character; give valid UTF-8")
