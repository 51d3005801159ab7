"""The application behind the page: its files, and three questions to the model, each a POST of a JSON object.

    GET  /api/model        what the model is
    POST /api/write        a continuation, a JSON object a line as it comes
    POST /api/look         the distribution of a token
    POST /api/attend       attention weights over a text

Every error is {"error": a sentence}. Nothing is sent to, or loaded from, another machine: the page's
Content-Security-Policy lets it ask this server alone, and a request must name this machine as its host and origin.
"""

import json
import sys
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_transformer.serve import bodies
from mlx_transformer.serve.player import Events, Player
from mlx_transformer.serve.worker import Busy, Worker
from mlx_transformer.utils.errors import BadInput, is_out_of_memory

LOCAL = ("127.0.0.1", "localhost", "[::1]")
_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def make_app(player: Player, worker: Worker) -> Starlette:
    """Return the application; `player` computes on the thread of `worker`."""
    described = player.describe()

    def answer(read: Callable[[bytes], Any], steps: Callable[[Any], Events]) -> Callable:
        async def endpoint(request: Request) -> Response:
            async with aclosing(worker.events(steps(read(await _body(request))))) as events:
                return JSONResponse(await anext(events))

        return endpoint

    async def write(request: Request) -> Response:
        events = worker.events(player.write(bodies.read_writing(await _body(request))))
        first = await anext(events)  # bad input is raised here, before the response has begun
        return StreamingResponse(_lines(first, events), media_type="application/x-ndjson")

    async def model(request: Request) -> Response:
        return JSONResponse(described)

    routes = [
        Route("/api/model", model),
        Route("/api/write", write, methods=["POST"]),
        Route("/api/look", answer(bodies.read_looking, player.look), methods=["POST"]),
        Route("/api/attend", answer(bodies.read_attending, player.attend), methods=["POST"]),
        *(Route(f"/{name}", _file(content, kind)) for name, (content, kind) in read_page().items()),
    ]
    handlers: dict[Any, Any] = {
        BadInput: lambda request, error: _refuse(400, str(error)),
        Busy: lambda request, error: _refuse(503, str(error)),
        HTTPException: lambda request, error: _refuse(error.status_code, error.detail),
        Exception: lambda request, error: _refuse(500, _explain(error)),
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.add_middleware(Guard)
    return app


class Guard:
    """Refuse requests that another site makes a browser send, and add the headers that keep the page on this machine.

    A site whose name is made to resolve to 127.0.0.1 (DNS rebinding) is known by the Host header, another site that
    posts to this server by Origin.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in _HEADERS.items()),
                ]
            await send(message)

        refused = _foreign(Request(scope))
        await (self.app if refused is None else _refuse(403, refused))(scope, receive, send_guarded)


def _foreign(request: Request) -> str | None:
    """Return why a request is refused, or None."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if host.rpartition(":")[0] not in LOCAL and host not in LOCAL:
        return f"host {host!r} is not this machine: open http://127.0.0.1 with the port that the server printed"
    if origin is not None and origin != f"http://{host}":
        return f"origin {origin!r} is another site: only the page of this server may ask it"
    return None


async def _body(request: Request) -> bytes:
    """Read the body of a request. Raises BadInput if it is large or not declared as JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "the request is not declared as application/json")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > bodies.MOST_BYTES:
            raise HTTPException(413, f"the request has more than {bodies.MOST_BYTES:,} bytes: shorten the text")
    return body


async def _lines(first: dict[str, Any], events: AsyncGenerator[dict[str, Any], None]) -> AsyncIterator[bytes]:
    """Yield events as lines of JSON; an error becomes the last one. Ends the job when the reader has gone."""
    try:
        yield _line(first)
        async for event in events:
            yield _line(event)
    except Exception as error:
        yield _line({"error": _explain(error)})
    finally:
        await events.aclose()


def _line(event: dict[str, Any]) -> bytes:
    return json.dumps(event).encode() + b"\n"


def _refuse(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": " ".join(sentence.split())}, status)


def _explain(error: Exception) -> str:
    """Return a sentence on an error that is not the reader's; its traceback goes to the terminal."""
    if is_out_of_memory(error):
        return f"out of memory ({error}): shorten the text, or start the server with --device cpu"
    traceback.print_exception(error, file=sys.stderr)
    return f"the server failed ({type(error).__name__}): its terminal says more"


def read_page() -> dict[str, tuple[bytes, str]]:
    """Return the content and type of the page's files by path; the page itself is the empty one."""
    found = {one.name: one for one in files("mlx_transformer.serve").joinpath("page").iterdir()}
    kinds = {name: _TYPES.get(name.rpartition(".")[2]) for name in found}
    page = {name: (found[name].read_bytes(), kind) for name, kind in kinds.items() if kind is not None}
    return {"" if name == "index.html" else name: content for name, content in page.items()}


def _file(content: bytes, kind: str) -> Callable:
    async def endpoint(request: Request) -> Response:
        return Response(content, media_type=kind)

    return endpoint
