"""A tokenizer.json of the Hugging Face library `tokenizers`."""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_transformer.data.store import SEPARATOR
from mlx_transformer.data.tokenizers.base import Tokenizer, not_unicode
from mlx_transformer.utils.errors import BadInput


class HFTokenizer(Tokenizer):
    """A tokenizer.json.

    EOS is the special token with the id `end`, else one of the usual names. BOS is the token that the template puts in
    front of a text, as Llama's `<s>`; else EOS. The tokenizer counts as lossless if a set of awkward texts comes back
    unchanged (byte-level BPE); the validation text is checked too when it is tokenized. A special token's own text
    within a document is plain text.

    Raises BadInput if the library is missing or cannot read the content, or if there is no EOS token.
    """

    kind, version = "hf", 3
    _END = "tokenizer.end.txt"
    _ENDS = (SEPARATOR, "</s>", "<eos>", "<|end_of_text|>")
    _AWKWARD = (
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
            raise BadInput("this tokenizer.json has no tokens: expected a vocabulary")
        self.vocab_size = max(vocabulary.values()) + 1
        special = {index for index, added in self._model.get_added_tokens_decoder().items() if added.special}
        usual = next((vocabulary[token] for token in self._ENDS if token in vocabulary), None)
        eos_id = end if end in special else usual
        if eos_id is None:
            raise BadInput(f"this tokenizer.json has no token that ends a text (looked for {', '.join(self._ENDS)})")
        self.eos_id = eos_id
        self._is_usual = eos_id == usual
        self.unk_id = vocabulary.get(getattr(self._model.model, "unk_token", None) or "<unk>")
        self.lossless = all(self.decode(self.encode(text)) == text for text in self._AWKWARD)

    @classmethod
    def read(cls, path: Path) -> "HFTokenizer":
        """Read a tokenizer.json, and the EOS id that `save` has written beside it. Raises OSError."""
        end = path.with_name(cls._END)
        return cls(path.read_bytes(), int(end.read_text()) if end.is_file() else None)

    @functools.cached_property
    def prompt_prefix(self) -> list[int]:
        """Tokens that the template puts in front of a text: none in GPT-2's."""
        text = self._model.encode(self._AWKWARD[0])
        marked = zip(text.ids, text.special_tokens_mask, strict=True)
        return [token for token, _ in itertools.takewhile(lambda pair: pair[1], marked)]

    @property
    def bos_id(self) -> int:
        return next(iter(self.prompt_prefix), self.eos_id)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError as error:
            raise not_unicode(texts) from error

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids), skip_special_tokens=True)

    def token(self, index: int) -> str:
        return self._model.id_to_token(index) or ""

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._content} | ({} if self._is_usual else {self._END: b"%d" % self.eos_id})
