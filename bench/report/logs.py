"""Read logs in one form: `migrate` gives a log of schema version 1 the keys and names of version 2."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from mlx_transformer.nn.config import SIZES
from mlx_transformer.utils.errors import BadInput

KEYS = {  # version 1 -> version 2
    "contestants": "workers",
    "training_pieces_read": "training_tokens_read",
}
TUNE_KEYS = {"rates": "learning_rates", "recipe_rate": "recipe_learning_rate"}
COMPARE_KEYS = {"rates": "throughput", "tokens_over_rate": "tokens_over_throughput"}  # of a comparison alone
_DROPPED = ("pace",)  # of a recipe
_ADD_ONE = re.compile(r"(^|[/:])alone_(?=\w)")
_PHASE = re.compile(r"phase (\d+)")


def read_log(path: Path) -> Any:
    """Read a log in version 2: the value of a .json, the lines' values of a .jsonl, else the text. Raises BadInput."""
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines()]
        return migrate(json.loads(text)) if path.suffix == ".json" else text
    except ValueError as error:
        raise BadInput(f"'{path.name}' is not valid {path.suffix[1:].upper()} ({error})") from error


def migrate(log: Any, phase: int | None = None) -> Any:
    """Return a log of either version in version 2. phase: that of the part of a log that `log` is."""
    if isinstance(log, list):
        return [migrate(value, phase) for value in log]
    if isinstance(log, str):
        return _migrate_name(log, phase)
    if not isinstance(log, dict):
        return log
    phase = log["phase"] if isinstance(log.get("phase"), int) else phase
    log = _migrate_names(log) if log.get("schema_version") == 1 else log
    keys = _new_keys(log)
    new = {
        keys.get(key) or _migrate_name(key, phase): migrate(value, phase)
        for key, value in log.items()
        if key not in _DROPPED
    }
    if "recipe_name" in new:
        new.setdefault("code", None)
    return new | ({"schema_version": 2} if "schema_version" in new else {})


def _new_keys(log: dict[str, Any]) -> dict[str, str]:
    keys = dict(KEYS)
    if {"optimizer", "select"} <= log.keys():  # a group of a recipe
        keys["rate"] = "lr_multiplier"
    if log.get("measures") == "tune":
        keys |= TUNE_KEYS
    if {"speedups", "tokens_over_rate"} & log.keys():
        keys |= COMPARE_KEYS
    if isinstance(log.get("rows"), int):
        keys["rows"] = "batch_size"
    return keys


def _migrate_names(log: dict[str, Any]) -> dict[str, Any]:
    """Name the variant in every run of `length` and setting of `sweep`; make a log of `longcontext` one of a sweep."""
    if log.get("measures") == "length":
        names = {
            branch: f"phase {log['phase']}" + (f"/{branch}" if branch != "trunk" else "") for branch in log["branches"]
        }
        runs = [{"name": names[row["branch"]], **row} for row in log["rows"]]
        rest = {key: value for key, value in log.items() if key not in ("rows", "branches")}
        return rest | {"names": list(names.values()), "runs": runs}
    if log.get("measures") == "sweep":
        name = {"name": f"phase {log['phase']}"}
        return log | {key: [name | one for one in log[key]] for key in ("settings", "best")} | {"names": [name["name"]]}
    if log.get("measures") != "longcontext":
        return log
    settings = []
    for row in log["rows"]:
        branch = "" if row["name"] == "trunk" else f"/{row['name']}"
        setting = {"name": f"phase {log['phase']}{branch}", "seq_len": row["length"], "batch_size": 1}
        setting |= {"d_model": SIZES[log["size"]]["d_model"], "status": row["status"]}
        if row["status"] == "done":
            setting["pass_seconds"] = {"gradients": row["pass_seconds"], "decode": row["decode_seconds"]}
            setting["peak_bytes"] = {"gradients": statistics.median(row["peak_bytes"])}
        settings.append(setting)
    return {key: value for key, value in log.items() if key != "rows"} | {"measures": "sweep", "settings": settings}


def _migrate_name(name: str, phase: int | None) -> str:
    """`phase 6/alone_softcap` -> `phase 6/phase_5_with_softcap`: the previous phase with one addition."""
    if found := _PHASE.match(name):
        phase = int(found[1])
    return name if phase is None else _ADD_ONE.sub(rf"\1phase_{phase - 1}_with_", name)
