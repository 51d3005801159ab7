"""The server of the page, which ends the texts that are being written when it is ended."""

import socket

import uvicorn
from starlette.applications import Starlette

from mlx_transformer.serve.worker import Worker


class Server(uvicorn.Server):
    """uvicorn.Server for the readers of one worker."""

    def __init__(self, app: Starlette, worker: Worker) -> None:
        config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=5)
        super().__init__(config)
        self.worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.worker.end()
        await super().shutdown(sockets)
