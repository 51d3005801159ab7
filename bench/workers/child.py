"""One contestant in a process of its own: `python -m bench.child MODULE:CLASS`, driven by lines of JSON (rounds.py).

Imports nothing but the contestant's module, so that none gets a BLAS, an allocator or threads that another brought.
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
    """The first line makes the contestant, and its facts are the answer; every further one is a round, timed here."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to stderr, and the answers stay whole
    module, name = sys.argv[1].split(":")
    worker = None
    for line in sys.stdin:
        request = json.loads(line)
        if worker is None:
            worker = getattr(importlib.import_module(module), name)(**request)
            answer = worker.facts()
        else:
            start = time.perf_counter()
            answer = worker.round(**request)  # waits for its device
            answer["seconds"] = time.perf_counter() - start
            answer["max_rss_bytes"] = _peak_rss()
        print(json.dumps(answer), file=answers, flush=True)


def _peak_rss() -> int:
    """The most bytes of memory that this process held. On Linux ru_maxrss begins with what the *parent* once held."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii"))[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


if __name__ == "__main__":
    main()
