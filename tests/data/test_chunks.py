"""Long documents that are read in parts: the tokens are those of the whole document."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_transformer.data import chunks as module
from mlx_transformer.data import documents as reading
from mlx_transformer.data.corpus import load_corpus
from mlx_transformer.data.tokenizers import HFTokenizer, Tokenizer, train_tokenizer
from mlx_transformer.data.tokens import encode_text, tokenize_corpus

LINES = "".join(
    f"Line {i}: the cat sat on the mat {i % 7} times.\n{'  indented, and “quoted”' * (i % 3)}\n\nDon't, it said.\n"
    for i in range(60)
)
TEXTS = {
    "lines": LINES,
    "one line": LINES.replace("\n", " "),
    "white space": LINES.replace("\n", " \n \n\n  "),
    "no spaces": LINES.replace(" ", "").replace("\n", ""),
    "Chinese": "".join(
        f"从前有{'一二三四五六七'[i * i % 7]}只{'猫狗鸟鱼牛'[i % 5]}，它坐在垫子上。" for i in range(200)
    ),
}
LEARNED = {"max_token_length": 12, "show_progress": False}  # a token of the whole text would need the whole as context


def library() -> Any:
    return pytest.importorskip("tokenizers")


def llama2() -> Any:
    """SentencePiece's way as in Llama 2's tokenizer.json: a space in front, merges across the whole text."""
    t = library()
    learned = t.Tokenizer(t.models.BPE())
    learned.pre_tokenizer = t.pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    lines = [line for text in TEXTS.values() for line in text.split("\n")]
    learned.train_from_iterator(lines, t.trainers.BpeTrainer(vocab_size=600, special_tokens=special, **LEARNED))
    model = json.loads(learned.to_str())["model"]
    pairs = [tuple(pair) for pair in model["merges"]]
    made = t.Tokenizer(t.models.BPE(model["vocab"], pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.normalizer = t.normalizers.Sequence([t.normalizers.Prepend("▁"), t.normalizers.Replace(" ", "▁")])
    decoders = t.decoders
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = t.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def trained(pre_tokenizer: Any, decoder: Any = None) -> Any:
    t = library()
    made = t.Tokenizer(t.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoder
    special = ["</s>", "<unk>"]
    alphabet = t.pre_tokenizers.ByteLevel.alphabet()
    trainer = t.trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet, **LEARNED)
    made.train_from_iterator(TEXTS.values(), trainer)
    return made


def metaspace() -> Any:
    t = library()
    return trained(t.pre_tokenizers.Metaspace(prepend_scheme="first", split=False), t.decoders.Metaspace())


def gpt2() -> Any:
    t = library()
    return trained(t.pre_tokenizers.ByteLevel(add_prefix_space=True), t.decoders.ByteLevel())


def gpt4() -> Any:
    """Llama 3's and GPT-4's pattern: newlines belong to the punctuation before them."""
    t, pre = library(), library().pre_tokenizers
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre.Split(t.Regex(pattern), "isolated")
    return trained(pre.Sequence([split, pre.ByteLevel(False, use_regex=False)]), t.decoders.ByteLevel())


def unigram() -> Any:
    t = library()
    made = t.Tokenizer(t.models.Unigram())
    made.normalizer = t.normalizers.Sequence([t.normalizers.NFKC(), t.normalizers.Strip(), t.normalizers.Lowercase()])
    made.pre_tokenizer, made.decoder = t.pre_tokenizers.Metaspace(), t.decoders.Metaspace()
    trainer = t.trainers.UnigramTrainer(vocab_size=400, special_tokens=["</s>", "<unk>"], unk_token="<unk>")
    made.train_from_iterator(TEXTS.values(), trainer)
    return made


MADE = (llama2, metaspace, gpt2, gpt4, unigram)


@pytest.fixture(params=[*MADE, "bpe", "word"], ids=lambda made: made if isinstance(made, str) else made.__name__)
def tokenizer(request, tmp_path, monkeypatch) -> Tokenizer:
    monkeypatch.setenv("MLX_TRANSFORMER_CACHE", str(tmp_path / "cache"))
    if not isinstance(request.param, str):
        return HFTokenizer(request.param().to_str().encode())
    (tmp_path / "train.txt").write_text("\n<|endoftext|>\n".join(TEXTS.values()))
    return train_tokenizer(request.param, load_corpus(str(tmp_path / "train.txt"), say=print), 400, explicit=False)


@pytest.fixture(params=TEXTS)
def text(request, tmp_path, monkeypatch) -> Path:
    (tmp_path / "text.txt").write_text(f"Short.\n<|endoftext|>{TEXTS[request.param]}\n<|endoftext|>The end.")
    monkeypatch.setattr(reading, "SEGMENT", 700)
    monkeypatch.setattr(module, "CONTEXT", 100)
    return tmp_path / "text.txt"


def whole(tokenizer: Tokenizer, documents: list[str]) -> list[int]:
    bos = [] if tokenizer.bos_id == tokenizer.eos_id else [tokenizer.bos_id]
    framed = ([*bos, *tokenizer.encode(document), tokenizer.eos_id] for document in documents)
    return [tokenizer.eos_id, *(token for tokens in framed for token in tokens)]


def test_a_document_in_parts_has_the_tokens_of_the_whole(tokenizer, text):
    documents = list(reading.read_documents(text))
    assert sum(1 for _ in reading.read_parts(text)) > 5
    ids, facts = encode_text(reading.read_parts(text), tokenizer)
    assert ids.tolist() == whole(tokenizer, documents)
    assert facts["lossless"] == (
        tokenizer.lossless and all(tokenizer.decode(tokenizer.encode(d)) == d for d in documents)
    )
    data = tokenize_corpus(load_corpus(str(text), say=print), tokenizer, print)
    assert data.train.tolist() == whole(tokenizer, documents[:2])


@pytest.mark.parametrize("limit", [3, 20, 500, 1999])
def test_a_beginning_has_the_tokens_of_that_beginning(tokenizer, text, limit):
    document = list(reading.read_documents(text))[1]
    (text.parent / "long.txt").write_text(document)
    ids, facts = encode_text(reading.read_parts(text.parent / "long.txt"), tokenizer, limit)
    kept = document.encode()[: facts["valid_bytes"]].decode()
    assert ids.tolist() == whole(tokenizer, [kept])
    assert len(ids) <= limit
    ends = (i for i in range(len(kept) + 1, len(document)) if "\n" not in kept or document[i - 1] == "\n")
    assert len(whole(tokenizer, [document[: next(ends, len(document))]])) > limit or kept == document
