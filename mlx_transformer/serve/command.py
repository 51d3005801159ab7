"""`python -m mlx_transformer.serve RUN`: a page on this machine to play with a trained model."""

import os
import re
import socket
import sys
import threading
import webbrowser
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated

from mlx_transformer.run.flags import Device, Place, RunArgument, Switch, optional, parse
from mlx_transformer.utils.errors import BadInput, explain_out_of_memory

_ADDRESS = "127.0.0.1"  # loopback: no other machine can connect
_PORT = 8765


def _read_port(text: str) -> int:
    port = int(text) if re.fullmatch(r"\d{1,5}", text, re.ASCII) else -1
    if not 0 <= port <= 65535:
        raise ValueError(f"{text!r}: expected a whole number from 0 to 65535")
    return port


@dataclass
class Flags:
    """Open a page on this machine: watch a model write, with the probabilities of each token and its attention."""

    run: RunArgument
    """a run folder, or its model/"""
    port: Annotated[int, optional(_read_port, "N")] = _PORT
    """port of the page; 0: any that is free"""
    no_browser: Switch = False
    """print the address alone, and open no browser"""
    code: Place = None
    """file that defines the model, for a model of your own; kept: the copy in the run folder"""
    device: Device = "auto"
    """device to compute on (default: auto)"""


@explain_out_of_memory("try a smaller model, or --device cpu")
def main(prog: str = "python -m mlx_transformer.serve", args: list[str] | None = None) -> None:
    """Run the command line: serve the page until Ctrl-C."""
    flags = parse(Flags, prog, args=args)
    try:
        from mlx_transformer.serve.app import make_app
        from mlx_transformer.serve.player import Player
        from mlx_transformer.serve.server import Server
        from mlx_transformer.serve.worker import Worker
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mlx_transformer"):
            raise
        raise BadInput(
            f"the page needs {error.name}, which is not installed: pip install 'mlx-transformer[serve]' "
            "(in a checkout: pip install -e '.[serve]')"
        ) from None
    with _listen(flags.port) as listener:
        worker = Worker()
        try:
            with suppress(KeyboardInterrupt):  # uvicorn raises it again at its end, unless Ctrl-C is ignored
                player = worker.call(lambda: Player(flags.run, flags.code, flags.device or "auto"))
                server = Server(make_app(player, worker), worker)
                address = f"http://{_ADDRESS}:{listener.getsockname()[1]}"
                print(f"{flags.run}: open {address} (Ctrl-C ends)", flush=True)
                if not flags.no_browser:
                    _open_browser(address)
                server.run(sockets=[listener])
            print("ended", file=sys.stderr)
        finally:
            worker.close()


def _listen(port: int) -> socket.socket:
    """Return a socket that listens. Raises BadInput if the port is taken or not allowed."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_ADDRESS, port))
    except OSError as error:
        listener.close()
        raise BadInput(
            f"--port {port}: cannot be used ({error.strerror}); give another one, or --port 0 for any that is free"
        ) from error
    listener.listen()
    return listener


def _open_browser(address: str) -> None:
    """Open a browser of the desktop, if there is one, beside the server's thread."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return  # webbrowser would start a text browser in this terminal
    threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
