"""Associative recall: which value stood beside a key?"""

from mlx_transformer.data.fables.teller import SplitMix64
from mlx_transformer.data.tasks.base import Level, Task, sample

KEYS = tuple(f"k{i}" for i in range(64))
VALUES = tuple(f"v{i}" for i in range(64))


def _level(pairs: int, queries: int, name: str, *, trained: bool) -> Level:
    return Level(name=name, size=pairs, kind=str(queries), trained=trained, floor=1 / pairs)


class Recall(Task):
    """Key-value pairs, then keys whose values are to be named: multi-query associative recall.

    Arora et al. 2023 (Zoology), arXiv 2312.04927, sec. 3. Differs from the paper: queries follow the pairs at once
    instead of at distances by a power law; the number of pairs varies within the training text.
    """

    name = "recall"
    asks = "Name the value that stood beside each queried key."
    source = "Arora et al. 2023, arXiv 2312.04927"
    symbols = (*KEYS, *VALUES)
    read_off = True
    levels = (
        *(_level(n, 31 - n, f"{n} pairs", trained=True) for n in (2, 4, 8, 16)),
        _level(16, 1, "16 pairs, 1 query", trained=True),
        _level(32, 31, "32 pairs, 2x length", trained=False),
        _level(64, 63, "64 pairs, 4x length", trained=False),
    )
    training = levels[:4]

    def example(self, random: SplitMix64, level: Level) -> str:
        keys = sample(random, KEYS, level.size)
        values = {key: VALUES[random.below(len(VALUES))] for key in keys}
        asked = [keys[random.below(len(keys))] for _ in range(int(level.kind))]
        return " ".join([f"{key} {values[key]}" for key in keys] + [f"{key} [{values[key]}]" for key in asked])
