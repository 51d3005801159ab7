"""Scores of tasks: the share of right answers at each level, beside its floor and ceiling."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_transformer.data.tasks import HELD_OUT, Example, Level, Task, find_task
from mlx_transformer.data.tokenizers import SymbolTokenizer, Tokenizer
from mlx_transformer.generate.decoding import Decoder
from mlx_transformer.generate.tools import runtime
from mlx_transformer.nn.model import Model
from mlx_transformer.train.evaluate import without_dropout
from mlx_transformer.utils.errors import BadInput

EXAMPLES = 200  # of each level
_BATCH_TOKENS = 8192  # of a forward pass that answers are read off


@dataclass(frozen=True, kw_only=True)
class LevelScore:
    """Accuracy at one level, in [0, 1]; references: other predictors on the same examples, such as least squares."""

    level: str
    trained: bool  # whether the training text has examples of this level
    tokens: int  # of an example, the longest one
    answers: int  # that were scored
    accuracy: float
    floor: float  # of a guess that does not solve the task
    ceiling: float  # of the best possible predictor
    references: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of a model on a task."""

    task: str
    accuracy: float  # mean over the levels of the training text
    levels: list[LevelScore]

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def score(model: Model, tokenizer: Tokenizer, task: str, *, examples: int = EXAMPLES) -> Score:
    """Score a model on held-out examples of every level of a task, "task:NAME" or "NAME".

    Raises BadInput for an unknown task, and for a model that was not trained on it.
    """
    return Scorer(find_task(task), tokenizer, examples=examples)(model)


class Scorer:
    """Held-out examples of a task, encoded once. trained_only: leave out the levels that the training text lacks.

    An answer is right if all of it is, as greedy decoding writes it. Where answers are single tokens after the true
    text, all are read off one forward pass, which gives the same tokens. Raises BadInput for another task's tokenizer,
    and for more examples than are held out.
    """

    def __init__(
        self, task: Task, tokenizer: Tokenizer, *, examples: int = EXAMPLES, trained_only: bool = False
    ) -> None:
        if not isinstance(tokenizer, SymbolTokenizer) or tokenizer.task != task.name:
            own = f"task:{tokenizer.task}" if isinstance(tokenizer, SymbolTokenizer) else "a text"
            raise BadInput(f"task:{task.name} scores models that were trained on it; this one was trained on {own}")
        if not 1 <= examples <= HELD_OUT:
            raise BadInput(f"examples = {examples}: expected 1 to {HELD_OUT}, which are held out of the training text")
        self.task, self.tokenizer = task, tokenizer
        levels = [level for level in task.levels if level.trained or not trained_only]
        self.examples = [(level, [Example.read(text) for text in task.held_out(level, examples)]) for level in levels]

    def __call__(self, model: Model) -> Score:
        """Score the model's present weights, without dropout; its mode does not change."""
        count = self._read_off if self.task.read_off else self._decoded
        with without_dropout(model):
            decoder = Decoder(model)
            levels = [self._level(level, examples, count(decoder, examples)) for level, examples in self.examples]
        trained = [level.accuracy for level in levels if level.trained]
        return Score(task=self.task.name, accuracy=sum(trained) / len(trained), levels=levels)

    def _level(self, level: Level, examples: Sequence[Example], right: list[bool]) -> LevelScore:
        bounds = self.task.bounds(level, examples)
        return LevelScore(
            level=level.name,
            trained=level.trained,
            tokens=max(len(each.words) for each in examples),
            answers=len(right),
            accuracy=sum(right) / len(right),
            floor=bounds.pop("floor"),
            ceiling=bounds.pop("ceiling"),
            references=bounds,
        )

    def _encode(self, words: Sequence[str]) -> list[int]:
        return self.tokenizer.encode(" ".join(words))

    def _read_off(self, decoder: Decoder, examples: Sequence[Example]) -> list[bool]:
        """Compare the most probable token before each answer with it; examples of a level have equal lengths."""
        tokens = np.array([[self.tokenizer.eos_id, *self._encode(each.words)] for each in examples])
        scored = np.array([each.scored for each in examples])
        size = max(1, _BATCH_TOKENS // tokens.shape[1])
        right = []
        for i in range(0, len(tokens), size):
            batch = tokens[i : i + size]
            predicted = np.array(mx.argmax(decoder.model(mx.array(batch[:, :-1])), axis=-1))
            right += (predicted == batch[:, 1:])[scored[i : i + size]].tolist()
        return right

    def _decoded(self, decoder: Decoder, examples: Sequence[Example]) -> list[bool]:
        """Decode the answer of each example, greedily and all at once, and compare its final part."""
        prompts = [[self.tokenizer.eos_id, *self._encode(each.prompt)] for each in examples]
        written: list[list[str]] = [[] for _ in examples]
        ended = [False] * len(examples)
        longest = max(len(each.rest) for each in examples)
        for tokens in decoder(prompts, longest, respond=runtime(self.tokenizer, prompts)):
            for i, token in enumerate(tokens):
                if not ended[i]:
                    written[i].append(self.tokenizer.token(token))
                    ended[i] = written[i][-1] == self.task.end
            if all(ended):
                break
        final = self.task.final
        return [final(own) == final(each.rest) for own, each in zip(written, examples, strict=True)]
