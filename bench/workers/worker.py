"""The program of a worker process: `python -m bench.workers.worker MODULE:CLASS`, driven by lines of JSON (process.py).

Imports nothing but the module to measure, so that no worker gets a BLAS, an allocator or threads from another.
"""

import importlib
import json
import os
import re
import resource
import sys
import time
from pathlib import Path


def main() -> None:
    """Make the object to measure from the first request, answer with its facts, then time a round for each request."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries that print to stdout must not break the answers
    module, name = sys.argv[1].split(":")
    measured = None
    for line in sys.stdin:
        request = json.loads(line)
        if measured is None:
            measured = getattr(importlib.import_module(module), name)(**request)
            answer = measured.facts()
        else:
            start = time.perf_counter()
            answer = measured.round(**request)  # synchronizes with its device
            answer["seconds"] = time.perf_counter() - start
            answer["max_rss_bytes"] = _peak_rss()
        print(json.dumps(answer), file=answers, flush=True)


def _peak_rss() -> int:
    """Return this process's peak resident memory in bytes. On Linux ru_maxrss includes that of the parent."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii"))[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


if __name__ == "__main__":
    main()
