"""The command in a process of its own."""

import contextlib
import re
import signal
import subprocess
import sys

from tests.faults.runs import ROOT


@contextlib.contextmanager
def served(run, *flags):
    """Yield the process of `python -m mlx_transformer.serve RUN` and its address; end it by Ctrl-C.

    What it then has written to stderr is `process.said`.
    """
    line = [sys.executable, "-m", "mlx_transformer.serve", str(run), "--port", "0", "--no-browser", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, cwd=ROOT, **pipes) as process:
        try:
            found = re.search(r"open (http://127\.0\.0\.1:\d+) \(Ctrl-C ends\)", process.stdout.readline())
            assert found, process.communicate()
            yield process, found[1]
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            try:
                _, process.said = process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
