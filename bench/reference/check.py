"""Check which runs have a reference, in a process of its own that loads PyTorch: `python -m bench.reference.check`.

stdin: a JSON list of tasks with phase, branch and recipe; stdout: for each null, or why it has none.
"""

import json
import sys
from typing import Any

from bench.reference import find
from bench.reference.train import stop_rule


def why_not(task: dict[str, Any]) -> str | None:
    """Say what the reference lacks for a run; None if nothing."""
    try:
        find(task["phase"], task["branch"])[0].rules(task["recipe"])
        stop_rule(task["recipe"]["stop"])
    except ValueError as error:
        return str(error)
    return None


if __name__ == "__main__":
    print(json.dumps([why_not(task) for task in json.load(sys.stdin)]))
