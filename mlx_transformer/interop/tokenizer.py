"""Conversion of tokenizers to and from Hugging Face's files."""

import json
from pathlib import Path
from typing import Any

from mlx_transformer.data.tokenizers import HFTokenizer, Tokenizer
from mlx_transformer.utils.errors import BadInput

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's form of a space


def tokenizer_files(tokenizer: Tokenizer, context: int) -> dict[str, bytes]:
    """Make tokenizer.json and tokenizer_config.json, with which AutoTokenizer gives the same tokens and the same text.

    By default AutoTokenizer adds the special tokens that our `generate` puts in front of a prompt. Raises BadInput for
    a word tokenizer, which has no such form.
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


def read_tokenizer(folder: Path, eos: object) -> HFTokenizer:
    """Read tokenizer.json; eos is the eos_token_id of config.json: an integer, a list of integers, or something else.

    Raises BadInput if the file is missing or damaged.
    """
    eos = eos[0] if isinstance(eos, list) and eos else eos
    path = folder / "tokenizer.json"
    try:
        return HFTokenizer(path.read_bytes(), eos if type(eos) is int else None)
    except OSError as error:
        raise BadInput(
            f"'{path}' cannot be read ({error.strerror}): expected the tokenizer as one file, which "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of transformers writes"
        ) from error


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()


def _bpe(proto: bytes, tokenizer: Tokenizer) -> dict[str, Any]:
    """Convert a SentencePiece model to a tokenizer.json that encodes and decodes alike.

    Its pieces hold real spaces, so that U+2581 needs no escape: it is spelled by its bytes like any other unknown
    character. Two cases differ: the EOS token's characters in a text, which their library reads as EOS unless called
    with split_special_tokens=True; and bytes that form no character, where theirs decodes each byte, and those beside
    it, to a U+FFFD, and ours several to one.
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
    """List every pair of pieces that forms a piece, the best piece first: SentencePiece has scores instead of merges.

    The order among the pairs of one piece matters only where two overlap, as in a run of one character; SentencePiece
    takes the left one, whose left part is the longer one there.
    """
    known = set(pieces.values())
    return [
        (pieces[i][:cut], pieces[i][cut:])
        for i in ranked
        for cut in range(len(pieces[i]) - 1, 0, -1)
        if pieces[i][:cut] in known and pieces[i][cut:] in known
    ]
