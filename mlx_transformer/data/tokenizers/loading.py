"""Reading a tokenizer from a folder or from somebody else's tokenizer.json."""

import json
from collections.abc import Callable
from pathlib import Path

from mlx_transformer.data.tokenizers.base import Tokenizer
from mlx_transformer.data.tokenizers.bpe import BPETokenizer
from mlx_transformer.data.tokenizers.huggingface import HFTokenizer
from mlx_transformer.data.tokenizers.symbols import SymbolTokenizer
from mlx_transformer.data.tokenizers.word import WordTokenizer
from mlx_transformer.utils.errors import BadInput

_FILES: dict[str, Callable[[Path], Tokenizer]] = {
    "tokenizer.model": lambda path: BPETokenizer(path.read_bytes()),
    "tokenizer.words.json": lambda path: WordTokenizer(json.loads(path.read_bytes())),
    "tokenizer.symbols.json": lambda path: SymbolTokenizer.read(path.read_bytes()),
    "tokenizer.json": HFTokenizer.read,
}


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer that was saved in a folder. Raises BadInput if there is none or its file is damaged."""
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


def read_tokenizer_json(name: str, vocab_size: int | None) -> HFTokenizer:
    """Return the tokenizer of `--tokenizer PATH`, a tokenizer.json or a folder with one.

    Raises BadInput if it cannot be read or its vocabulary is not of `vocab_size` (None: any size).
    """
    path = Path(name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = HFTokenizer.read(path)
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(
            f"--tokenizer {name} is neither bpe nor word, nor a tokenizer.json that can be read ({reason})"
        ) from error
    if vocab_size not in (None, tokenizer.vocab_size):
        raise BadInput(
            f"--vocab-size {vocab_size} does not fit {path}, which has {tokenizer.vocab_size} tokens; leave it out"
        )
    return tokenizer
