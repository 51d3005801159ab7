"""A model and its tokenizer as the page uses them: what it writes, expects and attends to."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_transformer import nn
from mlx_transformer.backend import use_device
from mlx_transformer.generate import Decoder, continuation, encode_prompt, first_read, stream_tokens
from mlx_transformer.run.commands.model import load_model
from mlx_transformer.run.ladder import find_branch, find_phase
from mlx_transformer.run.saved import model_folder, read_config
from mlx_transformer.serve.bodies import Attending, Looking, Writing
from mlx_transformer.utils.errors import BadInput

Events = Generator[dict[str, Any], None, None]
_CANDIDATES = 10  # tokens that are listed for a place
_BEFORE = 4  # tokens before another that decide about its text


class Player:
    """The methods compute: all of them, `__init__` too, run on the thread of one worker.

    Raises BadInput as `load` does, and for a translator.
    """

    def __init__(self, run: Path, code: str | None, device: str) -> None:
        self.device = use_device(device)
        self.run, self.described = run, read_config(model_folder(run))
        if self.described.get("code") is None:  # before loading: threads that read weights may outlive an error
            self._refuse(find_branch(find_phase(self.described["phase"]), self.described.get("branch")))
        self.model, self.tokenizer = load_model(run, code)
        self._refuse(type(self.model))
        self.decoder = Decoder(self.model)
        self.heads = self._count_heads()

    def _refuse(self, kind: type[nn.Model]) -> None:
        if kind.parallel:
            raise BadInput(
                f"'{self.run}' holds a translator, which the page does not show: use `python -m mlx_transformer "
                f"generate {self.run} --prompt TEXT`, or notebooks/translation.py for its attention"
            )

    def _count_heads(self) -> list[int]:
        """Return the number of heads with attention weights of each layer, 0 for a mixer without."""
        heads = [0] * len(self.model.stack())
        for one in nn.attention_maps(self.model, mx.array([[self.tokenizer.bos_id]])):
            heads[one.depth] = heads[one.depth] or one.weights.shape[1]
        return heads

    def describe(self) -> dict[str, Any]:
        """Return what the page says about the model."""
        code = self.described.get("code")
        mixers = (getattr(block, "mixer", block) for block in self.model.stack())
        return {
            "run": self.run.resolve().name,
            "phase": self.described["phase"],
            "branch": self.described.get("branch"),
            "code": code["file"] if code else None,
            "parameters": self.model.count_parameters()["total"],
            "vocabulary": self.tokenizer.vocab_size,
            "tokenizer": self.tokenizer.kind,
            "context": self.model.config.seq_len,
            "device": self.device.name,
            "layers": [{"mixer": type(m).__name__, "heads": n} for m, n in zip(mixers, self.heads, strict=True)],
        }

    def write(self, asked: Writing) -> Events:
        """Yield the tokens of the prompt, each token that continues it, and how it ended."""
        drawn = stream_tokens(
            self.model,
            self.tokenizer,
            asked.prompt,
            decoder=self.decoder,
            max_tokens=asked.max_tokens,
            sampling=asked.sampling,
            seed=asked.seed,
        )
        yield {"prompt": self._pieces(encode_prompt(self.tokenizer, asked.prompt, self.model.config.seq_len))}
        shown = 0
        while True:
            try:
                token, text = next(drawn)
            except StopIteration as end:
                whole = end.value
                break
            shown += len(text)
            yield self._piece(token, text)
        yield {"ended": whole.ended, "slides": whole.slides, "rest": whole.continuation[shown:]}

    def _pieces(self, tokens: list[int]) -> list[dict[str, Any]]:
        """Return the tokens of a prompt with the text that each completes; the last one has all that is left."""
        pieces, shown = [], 0
        for i, token in enumerate(tokens, 1):
            text = self.tokenizer.decode(tokens[:i])
            whole = text if i == len(tokens) or not text.endswith("\N{REPLACEMENT CHARACTER}") else text[:shown]
            pieces.append(self._piece(token, whole[shown:]))
            shown = len(whole)
        return pieces

    def _piece(self, token: int, text: str) -> dict[str, Any]:
        special = token in (self.tokenizer.bos_id, self.tokenizer.eos_id)
        return {"token": token, "text": text, "name": "¶" if special else self.tokenizer.token(token)}

    def look(self, asked: Looking) -> Events:
        """Yield the distribution of the next token: the most probable ones, and the one that stands there.

        p: of the model; sampled: of the sampling settings. rank: 1 for the most probable token.
        """
        tokens = self._known(asked.tokens)
        read = tokens[first_read(len(tokens), self.model.config.seq_len) :]
        logits = self.model.last_logits(mx.array([read])).astype(mx.float32)
        greedy = asked.sampling.is_greedy
        sampled = mx.arange(logits.shape[-1]) == mx.argmax(logits) if greedy else asked.sampling.filtered(logits)[0]
        p = np.array(mx.softmax(logits[0], axis=-1))
        q = np.array(sampled if greedy else mx.softmax(sampled, axis=-1), np.float32)
        order = np.argsort(-p, kind="stable")[:_CANDIDATES]

        def shown(token: int) -> dict[str, Any]:
            text = continuation(self.tokenizer, tokens[-_BEFORE:], [token])
            plain = text and "\N{REPLACEMENT CHARACTER}" not in text
            piece = self._piece(token, text if plain else "")
            rank = int((p > p[token]).sum()) + 1
            return {**piece, "p": float(p[token]), "sampled": float(q[token]), "rank": rank}

        own = asked.token is not None and asked.token < len(p)
        yield {
            "candidates": [shown(int(token)) for token in order],
            "own": shown(int(asked.token)) if own and asked.token is not None else None,
            "of": len(p),
        }

    def attend(self, asked: Attending) -> Events:
        """Yield the weights of a head, or the mean of a layer's: row i of what token i attends to, up to itself.

        start: the first token of the text that the model still sees, where the text is longer than its context.
        """
        if asked.layer >= len(self.heads):
            raise BadInput(f"layer = {asked.layer}: expected a number from 0 to {len(self.heads) - 1}")
        heads = self.heads[asked.layer]
        if not heads:
            raise BadInput(f"layer {asked.layer} has no attention weights to show: choose another one")
        if asked.head is not None and asked.head >= heads:
            raise BadInput(f"head = {asked.head}: expected a number from 0 to {heads - 1}")
        tokens, context = self._known(asked.tokens), self.model.config.seq_len
        start = first_read(len(tokens), context) if len(tokens) > context else 0
        found, *_ = nn.attention_maps(self.model, mx.array([tokens[start:]]), asked.layer)
        weights = found.weights[0].mean(axis=0) if asked.head is None else found.weights[0, asked.head]
        rows = np.array(weights.astype(mx.float32)).astype(np.float64).round(4)
        yield {"start": start, "rows": [row[: i + 1].tolist() for i, row in enumerate(rows)]}

    def _known(self, tokens: list[int]) -> list[int]:
        """Return tokens that the model has embeddings of. Raises BadInput."""
        numbers: Any = self.model.config
        patches = 1 << (numbers.patch_size**2 + 3) if isinstance(self.model, nn.Patched) else 0
        most = numbers.vocab_size + patches
        if unknown := next((token for token in tokens if token >= most), None):
            raise BadInput(f"token {unknown} is unknown: expected ids below {most}")
        return tokens
