"""Record what a command prints on a terminal, with its timing, and draw it as an animated GIF.

`python -m bench recording` runs the command in a pseudo-terminal and writes docs/img/run.cast (asciicast version 2, all
that came and when) and docs/img/run.gif; with `--draw` it only draws the cast again. Needs the extra `docs` (pyte).
"""

import json
import os
import pty
import select
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_transformer.run.flags import Switch, parse
from mlx_transformer.utils.errors import BadInput, RunFailed
from mlx_transformer.utils.files import atomic_write

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS, LINES = 100, 22
LONGEST_WAIT = 1.5  # seconds that a picture stays, whatever the command waited
LAST_STAYS = 6.0
_SHORTEST = 0.5  # seconds between two pictures
_COLORS = {"default": "#d8dee9", "black": "#4c566a", "red": "#e06c75", "green": "#98c379", "brown": "#e5c07b"}
_COLORS |= {"yellow": "#e5c07b", "blue": "#61afef", "magenta": "#c678dd", "cyan": "#56b6c2", "white": "#ffffff"}
_GROUND = "#20242c"


@dataclass
class Flags:
    """Record a command on a terminal as an asciicast and an animated GIF."""

    command: str = "python -m phases.phase6 --size nano --data fables --max-seconds 20 --out results/fast"
    """what to run"""
    out: Path = Path("docs/img/run.gif")
    """the GIF; the cast lies beside it"""
    draw: Switch = False
    """draw the cast again, run nothing"""


def record(command: str) -> list[dict[str, Any] | list[Any]]:
    """Run a command in a pseudo-terminal; the lines of its asciicast. Raises RunFailed if it fails."""
    lines: list[dict[str, Any] | list[Any]] = [{"version": 2, "width": COLUMNS, "height": LINES, "title": command}]
    words = shlex.split(command)
    words[:1] = [sys.executable] if words[0] == "python" else words[:1]
    child, terminal = pty.fork()
    if child == 0:
        size = {"COLUMNS": str(COLUMNS), "LINES": str(LINES), "TERM": "xterm-256color"}
        os.execvpe(words[0], words, {**os.environ, **size})
    started = time.monotonic()
    while True:
        select.select([terminal], [], [])
        try:
            data = os.read(terminal, 65536)
        except OSError:  # Linux raises when the other end closes
            data = b""
        if not data:
            break
        lines.append([round(time.monotonic() - started, 3), "o", data.decode(errors="replace")])
    _, status = os.waitpid(child, 0)
    if status:
        raise RunFailed(f"'{command}' failed with exit code {os.waitstatus_to_exitcode(status)}")
    return lines


def screens(cast: list[Any]) -> Iterator[tuple[float, list[list[tuple[str, str]]]]]:
    """Yield how long each screen stays (seconds) and its lines as characters and colors; the prompt first."""
    import pyte

    head, *events = cast
    screen = pyte.Screen(head["width"], head["height"])
    stream = pyte.Stream(screen)
    stream.feed(f"$ {head['title']}\r\n")
    shown, at = _lines(screen), 0.0
    for i, (when, _, text) in enumerate(events):
        stream.feed(text)
        if i + 1 < len(events) and events[i + 1][0] - at < _SHORTEST:
            continue  # more comes at once
        if (now := _lines(screen)) != shown:
            yield min(max(when - at, _SHORTEST), LONGEST_WAIT), shown
            shown, at = now, when
    yield LAST_STAYS, shown


def _lines(screen: Any) -> list[list[tuple[str, str]]]:
    return [
        [(screen.buffer[y][x].data, screen.buffer[y][x].fg) for x in range(screen.columns)] for y in range(screen.lines)
    ]


def draw(cast: list[Any], path: Path) -> None:
    """Write the GIF of a cast. Raises OSError."""
    from io import BytesIO

    stays, pictures = zip(*((stay, _picture(lines)) for stay, lines in screens(cast)), strict=True)
    data = BytesIO()
    milliseconds = [round(100 * stay) * 10 for stay in stays]
    first, *others = pictures
    first.save(data, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0, optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, data.getvalue())


def _picture(lines: list[list[tuple[str, str]]]) -> "Image":
    """Draw a screen; 16 colors are enough, and make it small."""
    import matplotlib as mpl
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(Path(mpl.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf", 14)
    wide, high = font.getlength("m"), 19
    picture = Image.new("RGB", (round(wide * len(lines[0])) + 24, high * len(lines) + 20), _GROUND)
    pen = ImageDraw.Draw(picture)
    for y, line in enumerate(lines):
        for x, (letter, color) in enumerate(line):
            if letter != " ":
                shade = _COLORS.get(color, f"#{color}" if len(color) == 6 else _COLORS["default"])
                pen.text((12 + x * wide, 10 + y * high), letter, font=font, fill=shade)
    return picture.quantize(16, dither=Image.Dither.NONE)


def main(prog: str = "python -m bench recording", args: list[str] | None = None) -> None:
    """Run the command line."""
    flags = parse(Flags, prog, args=args)
    path = flags.out.with_suffix(".cast")
    if flags.draw:
        if not path.is_file():
            raise BadInput(f"'{path}' is not there: expected a cast, as python -m bench recording writes")
        cast = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        cast = record(flags.command)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in cast))
    draw(cast, flags.out)
