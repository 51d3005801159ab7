"""The Hugging Face hub: asking it within seconds, and fetching a data set by its name."""

import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mlx_transformer.backend import cache_dir
from mlx_transformer.data.store import unwritable
from mlx_transformer.utils.errors import BadInput
from mlx_transformer.utils.files import write_json
from mlx_transformer.utils.text import plural

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo

T = TypeVar("T")
Say = Callable[[str], None]

REACH_SECONDS = 5.0  # until the hub counts as out of reach, name resolution included
_OTHER_SPLITS = {"valid", "validation", "val", "dev", "test", "testing", "eval", "evaluation"}
_NO_TEXTS = {"license", "readme", "requirements", "config", "infos", "info"}  # words in names of files about the data


class Unanswered(Exception):
    """The hub gave no answer; the message says why."""


def endpoint() -> str | None:
    """Return the address in HF_ENDPOINT; None: the hub's own."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def ask(request: Callable[[], T]) -> T:
    """Return the answer to a request. Raises Unanswered after REACH_SECONDS, on refusal and where there is no hub."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        raise Unanswered("HF_HUB_OFFLINE is set")
    answers: list[T] = []
    reason = f"no answer from the hub within {REACH_SECONDS:g} s"

    def run() -> None:
        nonlocal reason
        try:
            answers.append(request())
        except HfHubHTTPError as error:
            reason = f"the hub answered {error.response.status_code} to {error.response.url.copy_with(query=None)}"
        except Exception as error:  # whatever it is (a bad URL, a proxy, TLS), it means that there is no hub here
            reason = sentence(error)

    # In a thread, because looking up a host name can take longer than any timeout of the HTTP client.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    if not answers:
        raise Unanswered(reason)
    return answers[0]


def sentence(error: Exception) -> str:
    """Write another library's error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


# Data sets


def is_name(text: str, suffixes: Sequence[str]) -> bool:
    """Whether a text that is no path here has the form of a data set's name, OWNER/NAME."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text, re.ASCII) or text.lower().endswith((*suffixes, ".gz")):
        return False
    return not os.path.exists(text.partition("/")[0])


@dataclass(frozen=True)
class Listing:
    """The files of a data set's training split. sizes: bytes, by name, in order."""

    name: str
    revision: str
    sizes: dict[str, int]


def find(name: str, formats: Sequence[Sequence[str]]) -> Listing:
    """Ask the hub for the files of a data set's training split.

    formats: suffixes of files that can be read, the preferred format first. Raises Unanswered; BadInput if the data set
    has no such files.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint())
    info = ask(lambda: api.dataset_info(name, timeout=REACH_SECONDS, files_metadata=True))
    return Listing(name, str(info.sha), _choose(name, info, formats))


def fetch(name: str, formats: Sequence[Sequence[str]], say: Say) -> list[Path]:
    """Return the files of a data set's training split, from the cache or the hub.

    formats: as in `find`. Raises BadInput if the hub does not answer and the cache lacks a file, or if the data set has
    no such files.
    """
    record = cache_dir() / "hub" / f"{name.replace('/', '--')}.json"
    try:
        found = find(name, formats)
    except Unanswered as error:
        if (held := _held(name, record)) is not None:
            return held
        raise out_of_reach(name, error) from None
    files = [*found.sizes]
    say(f"{name} of the hub: {plural(len(files), 'file')}, {sum(found.sizes.values()) / 1e6:,.1f} MB: {_some(files)}")
    paths = [download(found, file) for file in files]
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, {"revision": found.revision, "files": files})
    except OSError as error:
        raise unwritable(record.parent, error) from error
    return paths


def out_of_reach(name: str, error: Unanswered) -> BadInput:
    """Make the error for a data set that is nowhere."""
    return BadInput(f"{name} does not exist here, and is out of reach as a data set of the hub: {error}")


def download(listing: Listing, file: str, folder: Path | None = None) -> Path:
    """Fetch one file; folder: where to put it, instead of the cache of huggingface_hub. Raises BadInput."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    where: dict[str, Any] = {
        "repo_type": "dataset",
        "revision": listing.revision,
        "endpoint": endpoint(),
        "local_dir": folder,
    }
    try:
        return Path(hf_hub_download(listing.name, file, **where))
    except (HTTPError, OSError, ValueError) as error:
        sentence_of = sentence(error)
        raise BadInput(f"{listing.name}: {file} could not be fetched ({sentence_of}); the next run resumes") from error


def _held(name: str, listing: Path) -> list[Path] | None:
    """Return the files that an earlier run fetched, if all are in the cache of huggingface_hub."""
    from huggingface_hub import constants, try_to_load_from_cache

    try:
        facts = json.loads(listing.read_text())
        found = [
            try_to_load_from_cache(name, file, constants.HF_HUB_CACHE, facts["revision"], "dataset")
            for file in facts["files"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    paths = [Path(path) for path in found if isinstance(path, str)]
    return paths if len(paths) == len(found) else None


def _choose(name: str, info: "DatasetInfo", formats: Sequence[Sequence[str]]) -> dict[str, int]:
    """Return the bytes of the training files, by name, in order and of one format."""
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    for train in (True, False):  # without a file named for training, those that are named for nothing else
        for suffixes in formats:
            chosen = [file for file in sorted(sizes) if _suits(file, suffixes, train)]
            if chosen:
                return {file: sizes[file] for file in chosen}
    if any(file.endswith(".parquet") for file in sizes):
        raise BadInput(f"{name} has Parquet files only, which would need pyarrow; write it as .jsonl and give that")
    raise BadInput(f"{name} has no .jsonl, .csv or .txt to train on; it has {_some(sorted(sizes)) or 'no files'}")


def _some(files: Sequence[str]) -> str:
    return ", ".join(files[:5]) + (", …" if len(files) > 5 else "")


def _suits(file: str, suffixes: Sequence[str], train: bool) -> bool:
    words = set(re.findall(r"[a-z]+", file.lower()))
    if not file.lower().removesuffix(".gz").endswith(tuple(suffixes)):
        return False
    return bool(words & {"train", "training"}) if train else not words & (_OTHER_SPLITS | _NO_TEXTS)
