"""Generating one story from its seed, or a training and a validation text with their entropy floor."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import fsum
from pathlib import Path

from mlx_transformer.data.fables.plots import tell
from mlx_transformer.data.fables.teller import Author, SplitMix64, Story
from mlx_transformer.utils.errors import BadInput

VERSION = 1  # of the grammar: raised with every change of the bytes that a seed gives
SEPARATOR = "<|endoftext|>"
_STREAMS = {"train": 0, "valid": 1}


def generate(seed: int) -> Story:
    """Generate the story of a seed (any integer, taken modulo 2**64): the same bytes on every machine."""
    author = Author(SplitMix64(seed))
    tell(author)
    return Story(author.text, author.log2_prob, author.derivation, author.plot)


@dataclass(frozen=True)
class FablesInfo:
    """Sizes of a written corpus and the entropy floor of its validation text; saved beside it as fables.json.

    The floor is -log2 of the probability with which this generator writes each document, end included (a story's end
    follows from its text), so no model can expect to need fewer bits. A repeated document is drawn again; the most
    probable story seen has 2**-99, so no probability changes within the precision of a float.
    """

    version: int
    seed: int
    train_stories: int
    valid_stories: int
    train_bytes: int  # UTF-8 bytes of the documents, without separators and line ends after them
    valid_bytes: int
    valid_document_bits: tuple[float, ...]  # of each validation document, in the order of the file
    valid_document_bytes: tuple[int, ...]

    @property
    def valid_bits(self) -> float:
        """Entropy floor of the whole validation text in bits."""
        return fsum(self.valid_document_bits)

    @property
    def floor_bpb(self) -> float:
        """Entropy floor of the whole validation text in bits per byte."""
        return self.valid_bits / self.valid_bytes

    @staticmethod
    def load(folder: Path) -> "FablesInfo":
        """Read the fables.json that `write_corpus` saved in a folder."""
        saved = json.loads((folder / "fables.json").read_text(encoding="utf-8"))
        for key in ("valid_document_bits", "valid_document_bytes"):
            saved[key] = tuple(saved[key])
        return FablesInfo(**saved)


def write_corpus(folder: Path, *, stories: int, valid_stories: int, seed: int = 0) -> FablesInfo:
    """Write train.txt, valid.txt (documents, each followed by a line `<|endoftext|>`) and fables.json into a folder.

    No story occurs twice, so train and valid are disjoint. Raises BadInput if there are fewer than 1 of either.
    """
    for name, number in (("stories", stories), ("valid_stories", valid_stories)):
        if number < 1:
            raise BadInput(f"{name} is {number}, but fables need at least 1: give a positive number of stories")
    seen: set[bytes] = set()
    valid = list(_distinct("valid", valid_stories, seed, seen))
    valid_bytes = tuple(_write(folder / "valid.txt", valid))
    train_bytes = sum(_write(folder / "train.txt", _distinct("train", stories, seed, seen)))
    info = FablesInfo(
        version=VERSION,
        seed=seed,
        train_stories=stories,
        valid_stories=valid_stories,
        train_bytes=train_bytes,
        valid_bytes=sum(valid_bytes),
        valid_document_bits=tuple(-story.log2_prob for story in valid),
        valid_document_bytes=valid_bytes,
    )
    (folder / "fables.json").write_text(json.dumps(asdict(info)) + "\n", encoding="utf-8")
    return info


def _distinct(split: str, number: int, seed: int, seen: set[bytes]) -> Iterator[Story]:
    """Yield `number` stories from a split's own random stream that are not in `seen`, and add them to it."""
    seeds = SplitMix64(2 * seed + _STREAMS[split])
    while number:
        story = generate(seeds.next())
        digest = hashlib.blake2b(story.text.encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            number -= 1
            yield story


def _write(path: Path, stories: Iterator[Story] | list[Story]) -> Iterator[int]:
    """Write the stories and yield the number of UTF-8 bytes of each."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for story in stories:
            file.write(f"{story.text}\n{SEPARATOR}\n")
            yield len(story.text.encode())
