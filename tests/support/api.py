"""The API over real HTTP in this process, with a worker beside it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import uvicorn

from gorgon_api.app import create_app
from gorgon_api.auth import KeyRing
from tests.support.services import Services


@contextlib.contextmanager
def serve(services: Services, keys: KeyRing) -> Iterator[str]:
    """Serve the API on a free port until the end of the block; yields its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(services, keys), log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
