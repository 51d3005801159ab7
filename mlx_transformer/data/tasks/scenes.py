"""Captions of drawn scenes, and scenes from captions: text and pictures in one sequence."""

from math import comb

from mlx_transformer.data.fables.teller import SplitMix64
from mlx_transformer.data.tasks.base import Level, Task, sample

COLORS = {"red": 0b001, "green": 0b010, "blue": 0b100, "yellow": 0b011}  # bits: red, green, blue
SHAPES = {  # 5 x 5 pixels
    "square": ("#####", "#####", "#####", "#####", "#####"),
    "ring": ("#####", "#...#", "#...#", "#...#", "#####"),
    "plus": ("..#..", "..#..", "#####", "..#..", "..#.."),
    "cross": ("#...#", ".#.#.", "..#..", ".#.#.", "#...#"),
}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
CELL, PATCH = 6, 3  # pixels: side of a cell, and of a patch
EMPTY = "_"

Scene = dict[tuple[int, int], tuple[str, str]]  # row and column of a cell: color and shape of the object in it


def draw(scene: Scene, offsets: dict[tuple[int, int], tuple[int, int]]) -> list[list[int]]:
    """Draw a scene as 18 x 18 pixels, each three bits of color; offsets: of each object in its cell, 0 or 1."""
    pixels = [[0] * (3 * CELL) for _ in range(3 * CELL)]
    for place, (color, shape) in scene.items():
        top, left = (CELL * cell + offset for cell, offset in zip(place, offsets[place], strict=True))
        for y, line in enumerate(SHAPES[shape]):
            for x, mark in enumerate(line):
                if mark == "#":
                    pixels[top + y][left + x] = COLORS[color]
    return pixels


def patches(pixels: list[list[int]]) -> list[str]:
    """Cut a picture into patches of 3 x 3 pixels, in reading order, each a word: # and three hexadecimal digits.

    The lower nine bits say which pixels are colored, the upper three are the color: an object is of one color, and no
    patch touches two objects.
    """
    words = []
    for top in range(0, len(pixels), PATCH):
        for left in range(0, len(pixels), PATCH):
            inside = [pixels[top + y][left + x] for y in range(PATCH) for x in range(PATCH)]
            bits = sum(1 << i for i, pixel in enumerate(inside) if pixel)
            words.append(f"#{max(inside) << PATCH * PATCH | bits:03x}")
    return words


def _level(kind: str, objects: int) -> Level:
    trained = objects < 4
    name = f"{kind} {objects} objects{'' if trained else ', more'}"
    choices = comb(9, objects) * (len(COLORS) * len(SHAPES)) ** objects
    return Level(name=name, size=objects, kind=kind, trained=trained, floor=1 / choices)


class Scenes(Task):
    """A picture of 3 x 3 cells with colored shapes: its sentence from its patches, or its cells from a sentence.

    Patches enter by a linear map of their pixels beside the words' embeddings (ViT: Dosovitskiy et al. 2020, arXiv
    2010.11929, sec. 3.1): the model sees no number of a patch. Differs from the paper: causal, and a picture is written
    as a grid of cells, since the model predicts words alone.
    """

    name = "scenes"
    asks = "Describe the picture, or lay out the cells that a sentence describes."
    source = "Dosovitskiy et al. 2020, arXiv 2010.11929"
    symbols = (
        *("see", "draw", ":", "a", ";", ".", EMPTY, *COLORS, *SHAPES, *ROWS, *COLUMNS),
        *(f"{color}-{shape}" for color in COLORS for shape in SHAPES),
    )
    levels = tuple(_level(kind, n) for kind in ("see", "draw") for n in (2, 3, 4))
    train_examples = 30_000
    patches = True

    def example(self, random: SplitMix64, level: Level) -> str:
        cells = [(row, column) for row in range(3) for column in range(3)]
        scene: Scene = {
            place: (list(COLORS)[random.below(len(COLORS))], list(SHAPES)[random.below(len(SHAPES))])
            for place in sorted(sample(random, cells, level.size))
        }
        sentence = " ; ".join(
            f"a {color} {shape} {ROWS[row]} {COLUMNS[column]}" for (row, column), (color, shape) in scene.items()
        )
        if level.kind == "draw":
            grid = ("-".join(scene[place]) if place in scene else EMPTY for place in cells)
            return f"draw {sentence} : [{' '.join(grid)} .]"
        offsets = {place: (random.below(2), random.below(2)) for place in scene}
        return f"see {' '.join(patches(draw(scene, offsets)))} : [{sentence} .]"
