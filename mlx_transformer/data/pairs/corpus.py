"""Parallel text: the built-in pairs or somebody's own, prepared as a training and a validation text.

A prepared text has one pair per line: source, tab, translation. Beside train.txt and valid.txt may lie further splits,
test.txt and longer.txt, which no run trains on or chooses weights by.
"""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from mlx_transformer.data import fables
from mlx_transformer.data.corpus import VALID_SHARE, Corpus, Say, Tally, cache_key, open_prepared, write_facts
from mlx_transformer.data.pairs import generate
from mlx_transformer.data.sources import check_file, open_file
from mlx_transformer.data.store import SEPARATOR, cached_folder, sha256_of
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.files import write_json
from mlx_transformer.utils.text import plural

NAME = "pairs"  # of the built-in corpus
TRAINING_PAIRS = 60_000
HELD_OUT = {"valid": 1000, "test": 1000, "longer": 1000}
TESTS = {"held out": "test", "longer": "longer"}  # what is translated and scored -> the split that holds it
_DIGITS = {"numbers": r"\d+", "dates": r"\d+-\d+-\d+", "times": r"\d+:\d+", "sums": r"\d.* = \d+"}  # kind -> its form
_TAKEN = "UTF-8 text, also as .gz, with a source, a tab and its translation in each line"

Pair = tuple[str, str]


def load_pairs(data: str = "auto", valid: str | None = None, stories: int | None = None, say: Say = print) -> Corpus:
    """Prepare the parallel text of `--data --valid --stories`.

    data: `auto` or `pairs` (built in), or the path of a text. stories: number of training pairs to keep.
    Raises BadInput if a text cannot be read, or has too few pairs.
    """
    if stories is not None and stories < 1:
        raise BadInput(f"--stories {stories} is not a number of pairs; give 1 or more")
    if data in ("fables", "tinystories"):
        raise BadInput(f"--data {data} has no translations; a translator takes {NAME}, or the path of {_TAKEN}")
    if is_built_in(data):
        if valid is not None:
            raise BadInput(f"--valid {valid} goes with --data PATH; {NAME} brings its own validation pairs")
        corpus = _built_in(stories or TRAINING_PAIRS)
    else:
        corpus = _own(Path(data).expanduser(), None if valid is None else Path(valid).expanduser(), stories)
    say(corpus.note)
    return corpus


def read_pairs(corpus: Corpus, split: str) -> list[Pair]:
    """Return the pairs of a split, "train", "valid" or a further one; none if the corpus lacks it."""
    path = corpus.train.parent / f"{split}.txt"
    return list(_read(path)[0]) if path.exists() else []


def is_built_in(data: object) -> bool:
    """Whether `--data` names the built-in pairs."""
    return str(data or "auto") in ("auto", NAME)


def kind_of(pair: Pair) -> str:
    """Return the kind of a built-in pair: numbers, dates, times, sums or sentences."""
    found = (kind for kind, form in _DIGITS.items() if any(re.fullmatch(form, side) for side in pair))
    return next(found, "sentences")


def read_parallel(path: str, say: Say = print) -> list[Pair]:
    """Return the pairs of a text; says how many lines have none. Raises BadInput if it cannot be read or has none."""
    place = Path(path).expanduser()
    _check(place)
    pairs, bad = _read(place)
    if not pairs:
        raise BadInput(_nothing(place, 0, bad, least=1))
    if bad:
        say(f"{path}: left out: {_counted(bad)}")
    return pairs


def _built_in(count: int) -> Corpus:
    package = Path(generate.__file__).parent
    sources = [package / "generate.py", package / "language.py", package / "numbers.py"]
    sources.append(Path(fables.__file__).parent / "teller.py")  # the random generator

    def build(folder: Path) -> None:
        splits: dict[str, list[Pair]] = {name: [] for name in (*HELD_OUT, "train")}
        for split, pair in generate.generate({**HELD_OUT, "train": count}):
            splits[split].append(pair)
        _write(folder, NAME, splits, floor_bits=0.0)  # a source has one translation

    key = cache_key(NAME, [sha256_of(source) for source in sources], count, HELD_OUT)
    folder = cached_folder("corpora", f"{NAME}-{key}", build)
    return _described(folder, "pairs, the built-in language pair")


def _own(train: Path, valid: Path | None, count: int | None) -> Corpus:
    identity = [_check(path) for path in (train, valid) if path is not None]

    def build(folder: Path) -> None:
        pairs, bad = _read(train)
        if valid is not None:
            held_out, more = _read(valid)
            bad = bad + more
        else:
            if len(pairs) < 2:
                raise BadInput(_nothing(train, len(pairs), bad))
            at = len(pairs) - max(1, len(pairs) // VALID_SHARE)
            pairs, held_out = pairs[:at], pairs[at:]
        known = {source for source, _ in held_out}
        kept = [pair for pair in pairs if pair[0] not in known]
        if not kept or not held_out:
            raise BadInput(_nothing(train if not kept else valid or train, 0, bad))
        _write(folder, "text", {"train": kept[:count], "valid": held_out}, len(pairs) - len(kept), bad)

    folder = cached_folder("corpora", f"parallel-{cache_key(identity, count)}", build)
    label = f"{train}" + (f" and {valid}" if valid is not None else ", its end held out")
    return replace(_described(folder, label), name=train.resolve().name)


def _nothing(path: Path, count: int, bad: Counter[str], least: int = 2) -> str:
    left_out = f" ({_counted(bad)})" if bad else ""
    enough = "and at least two such lines" if least > 1 else "and at least one such line"
    return f"{path} has {plural(count, 'pair')} to use{left_out}: expected {_TAKEN}, {enough}"


def _check(path: Path) -> str:
    """Return the hash of a file. Raises BadInput unless it is readable UTF-8."""
    try:
        if not path.is_file():
            raise BadInput(f"{path} is no file; a translator takes {NAME}, or the path of {_TAKEN}")
    except OSError as error:
        raise BadInput(f"cannot read {path} ({error.strerror or error})") from error
    return check_file(path)[0]


def _read(path: Path) -> tuple[list[Pair], Counter[str]]:
    """Return the pairs of a text, and how many lines have none; columns after the second are not read."""
    pairs: list[Pair] = []
    bad: Counter[str] = Counter()
    with open_file(path, "rt", encoding="utf-8-sig") as file:
        for line in file:
            source, tab, rest = line.partition("\t")
            target = rest.partition("\t")[0]
            if line.strip() in ("", SEPARATOR):
                continue
            if not tab:
                bad["without a tab"] += 1
            elif not (source.strip() and target.strip()):
                bad["with an empty side"] += 1
            else:
                pairs.append((source.strip(), target.strip()))
    return pairs, bad


def _counted(bad: Counter[str]) -> str:
    """Describe lines without a pair: "3 lines without a tab, 1 line with an empty side"."""
    return ", ".join(f"{plural(count, 'line')} {what}" for what, count in bad.items())


def _write(
    folder: Path,
    name: str,
    splits: dict[str, list[Pair]],
    duplicates: int = 0,
    bad: Counter[str] | None = None,
    floor_bits: float | None = None,
) -> None:
    """Write the splits and what is known of them."""
    tallies = {}
    for split, pairs in splits.items():
        text = "".join(f"{source}\t{target}\n" for source, target in pairs)
        (folder / f"{split}.txt").write_text(f"{text}{SEPARATOR}\n", encoding="utf-8", newline="\n")
        tallies[split] = Tally(len(pairs), len(text.encode()), 0)
    tallies["train"].duplicates = duplicates
    write_facts(folder, name, tallies["train"], tallies["valid"], floor_bits)
    write_json(folder / "left_out.json", dict(bad or {}))


def _described(folder: Path, label: str) -> Corpus:
    corpus, bad = open_prepared(folder, label), Counter(json.loads((folder / "left_out.json").read_text()))
    note = f"data: {label}: {corpus.train_documents:,} training and {corpus.valid_documents:,} validation pairs"
    if corpus.duplicates_removed:
        note += f", {plural(corpus.duplicates_removed, 'training pair')} removed whose source is a validation source"
    if bad:
        note += f"; left out: {_counted(bad)}"
    return replace(corpus, note=note)
