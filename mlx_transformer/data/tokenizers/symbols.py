"""The tokenizer of a task: its symbols are its tokens."""

import json
import re
from collections.abc import Sequence
from typing import Any

from mlx_transformer.data.tokenizers.base import Tokenizer
from mlx_transformer.utils.errors import BadInput


class SymbolTokenizer(Tokenizer):
    """Words with one space between them, each a symbol of the task.

    With patches, a word of # and three hexadecimal digits is a patch of a picture: its token is vocab_size plus that
    number, which a model reads as pixels (nn/patches.py) and never predicts. Token 1 then stands for any patch.
    """

    kind, version, lossless = "symbols", 1, False
    eos_id, unk_id = 0, None
    EOS, PATCH = "<eos>", "<patch>"
    _PATCH = re.compile("#[0-9a-f]{3}")

    def __init__(self, symbols: Sequence[str], *, task: str, patches: bool = False, tool: str | None = None):
        self.task, self.patches, self.tool = task, patches, tool
        self._symbols = tuple(symbols)
        self._tokens = [self.EOS, *([self.PATCH] if patches else ()), *symbols]
        self._index = {symbol: len(self._tokens) - len(self._symbols) + i for i, symbol in enumerate(symbols)}
        self.vocab_size = len(self._tokens)

    @classmethod
    def read(cls, content: bytes) -> "SymbolTokenizer":
        """Read the file that `files` gives. Raises ValueError for another one."""
        values: Any = json.loads(content)
        if not isinstance(values, dict) or values.keys() != {"task", "patches", "tool", "symbols"}:
            raise ValueError("expected the keys task, patches, tool and symbols")
        return cls(values.pop("symbols"), **values)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text. Raises BadInput for a word that is no symbol."""
        return [self._encode(word) for word in text.split()]

    def _encode(self, word: str) -> int:
        if (token := self._index.get(word)) is not None:
            return token
        if self.patches and self._PATCH.fullmatch(word):
            return self.vocab_size + int(word[1:], 16)
        some = " ".join(self._symbols[:12])
        raise BadInput(f"{word!r} is no symbol of task:{self.task}: expected words such as {some}")

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.token(i) for i in ids if i != self.eos_id)

    def token(self, index: int) -> str:
        return self._tokens[index] if index < self.vocab_size else f"#{index - self.vocab_size:03x}"

    def files(self) -> dict[str, bytes]:
        values = {"task": self.task, "patches": self.patches, "tool": self.tool, "symbols": list(self._symbols)}
        return {"tokenizer.symbols.json": json.dumps(values, indent=0).encode()}
