"""Tools that a model calls while it decodes: the runtime's tokens take the place of sampled ones."""

from collections import deque
from collections.abc import Callable, Sequence

from mlx_transformer.data.tasks import calculator
from mlx_transformer.data.tokenizers import SymbolTokenizer, Tokenizer

Respond = Callable[[list[int]], list[int]]  # the tokens just sampled, one of each sequence -> those that stand there


class CalculatorRuntime:
    """Answer the calls `( a + b =` of each sequence: the digits of the result, then `)`."""

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]) -> None:
        self.tokenizer = tokenizer
        self.calls: list[list[str] | None] = [None for _ in prompts]  # the words of an open call
        self.pending: list[deque[int]] = [deque() for _ in prompts]  # what the runtime has still to write
        for i, prompt in enumerate(prompts):
            for token in prompt:
                self._read(i, token)

    def __call__(self, sampled: list[int]) -> list[int]:
        """Return each sequence's next token: the runtime's while it answers, else the one sampled."""
        tokens = []
        for i, token in enumerate(sampled):
            if self.pending[i]:
                tokens.append(self.pending[i].popleft())
            else:
                tokens.append(token)
                self._read(i, token)
        return tokens

    def _read(self, i: int, token: int) -> None:
        word, call = self.tokenizer.token(token), self.calls[i]
        if word == calculator.OPEN:
            self.calls[i] = []
        elif word == calculator.EQUALS and call is not None:
            answer = " ".join([*calculator.answer(call), calculator.CLOSE])
            self.pending[i].extend(self.tokenizer.encode(answer))
            self.calls[i] = None
        elif call is not None:
            call.append(word)


def runtime(tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]) -> Respond | None:
    """Return the runtime of the tool that a task's tokenizer names, for these prompts; None without one."""
    if isinstance(tokenizer, SymbolTokenizer) and tokenizer.tool == "calculator":
        return CalculatorRuntime(tokenizer, prompts)
    return None
