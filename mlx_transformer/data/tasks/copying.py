"""Copying a sequence, and selective copying."""

from mlx_transformer.data.fables.teller import SplitMix64
from mlx_transformer.data.tasks.base import Level, Task, sample

LETTERS = tuple(f"s{i}" for i in range(112))
BLANK = "_"


class Copying(Task):
    """Different symbols, to be written again; or, selectively, those among as many blanks.

    Copying: Jelassi et al. 2024, arXiv 2402.01032, sec. 3. Selective copying: Gu & Dao 2023, arXiv 2312.00752, sec.
    3.1. Differs from the papers: no symbol occurs twice, so that the copy has one rule at every length.
    """

    name = "copying"
    asks = "Write the symbols again, without the blanks."
    source = "Jelassi et al. 2024, arXiv 2402.01032; Gu & Dao 2023, arXiv 2312.00752"
    symbols = ("copy", "pick", ">", ".", BLANK, *LETTERS)
    levels = (
        *(Level(name=f"copy {n}", size=n, kind="copy") for n in (7, 14, 28)),
        Level(name="pick 14 of 28", size=14, kind="pick"),
        Level(name="copy 56, 2x length", size=56, kind="copy", trained=False),
        Level(name="copy 112, 4x length", size=112, kind="copy", trained=False),
        Level(name="pick 28 of 56, 2x length", size=28, kind="pick", trained=False),
    )

    def example(self, random: SplitMix64, level: Level) -> str:
        letters = sample(random, LETTERS, level.size)
        shown = letters
        if level.kind == "pick":
            places = set(sample(random, range(2 * level.size), level.size))
            remaining = iter(letters)
            shown = [next(remaining) if place in places else BLANK for place in range(2 * level.size)]
        return f"{level.kind} {' '.join(shown)} > [{' '.join(letters)} .]"
