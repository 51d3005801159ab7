"""Our tokenizers as the files that Hugging Face's library reads, and theirs as ours."""

import json
from pathlib import Path
from typing import Any

from mlx_transformer.data.tokenizers import HFTokenizer, Tokenizer
from mlx_transformer.utils.errors import BadInput

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # as which SentencePiece writes a space


def tokenizer_files(tokenizer: Tokenizer, context: int) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json, by which AutoTokenizer gives the same pieces and the same text.

    With special tokens, which is its default, AutoTokenizer puts in front of a text what our `generate` does. Raises
    BadInput for the kind word, which has no such form.
    """
    if tokenizer.kind == "word":
        raise BadInput("a word tokenizer has no form in Hugging Face that gives the same text back: use bpe or hf")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.token(tokenizer.bos_id),
        "eos_token": tokenizer.token(tokenizer.eos_id),
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    files = tokenizer.files()
    content = files.get("tokenizer.json") or _dump(_bpe(files["tokenizer.model"], tokenizer))
    return {"tokenizer.json": content, "tokenizer_config.json": _dump(settings)}


def read_tokenizer(folder: Path, end: object) -> HFTokenizer:
    """The tokenizer.json of a folder of theirs, whose eos_token_id is end: an integer, a list of some, or no number.

    Raises BadInput if it has none or it is damaged.
    """
    end = end[0] if isinstance(end, list) and end else end
    path = folder / "tokenizer.json"
    try:
        return HFTokenizer(path.read_bytes(), end if type(end) is int else None)
    except OSError as error:
        raise BadInput(
            f"'{path}' cannot be read ({error.strerror}): expected the tokenizer as one file, which "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of transformers writes"
        ) from error


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()


def _bpe(proto: bytes, tokenizer: Tokenizer) -> dict[str, Any]:
    """A SentencePiece model as a tokenizer.json, with the same pieces for every text and the same text for its pieces.

    The pieces hold real spaces, so that U+2581 needs no escape: its bytes spell it, as any other non-piece.
    What differs: a text that holds the boundary's own characters, which their library takes for the boundary unless
    called with split_special_tokens=True; and bytes that are no character, for each of which, and for the bytes beside
    it, theirs writes a U+FFFD, where ours writes one for several and keeps those beside it.
    """
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_proto=proto)
    indices = range(model.vocab_size())
    special = {i for i in indices if model.is_byte(i) or model.is_control(i) or model.is_unknown(i)}
    pieces = {i: model.id_to_piece(i).replace(_SPACE, " ") for i in indices if i not in special}
    vocabulary = {**{model.id_to_piece(i): i for i in special}, **{piece: i for i, piece in pieces.items()}}
    eos = tokenizer.token(tokenizer.eos_id)
    prefix = [{"SpecialToken": {"id": eos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": tokenizer.eos_id,
                "content": eos,
                "special": True,
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            }
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": prefix,
            "pair": [*prefix, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {eos: {"id": eos, "ids": [tokenizer.eos_id], "tokens": [eos]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": _merges(sorted(pieces, key=model.get_score, reverse=True), pieces),
        },
    }


def _merges(ranked: list[int], pieces: dict[int, str]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the best piece first: SentencePiece has scores where they have a list.

    The order among the pairs of one piece only matters where two overlap, as in a run of one character; SentencePiece
    takes the left one, whose own left part is the longer one there.
    """
    known = set(pieces.values())
    return [
        (pieces[i][:cut], pieces[i][cut:])
        for i in ranked
        for cut in range(len(pieces[i]) - 1, 0, -1)
        if pieces[i][:cut] in known and pieces[i][cut:] in known
    ]
