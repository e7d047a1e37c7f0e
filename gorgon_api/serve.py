"""`gorgon api` and `gorgon sandbox`: start a listening server from the settings."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import runpy
import socket
import sys
from types import FrameType

import uvicorn

from gorgon_api.app import create_app
from gorgon_api.auth import Principal, SingleKey, generate_key
from gorgon_common import logs, metrics, telemetry
from gorgon_common.application.health import measure
from gorgon_common.application.session import open_session
from gorgon_common.cli import terminal
from gorgon_common.errors import ConfigurationError
from gorgon_common.scope import Scope
from gorgon_common.settings import Settings, get_settings

_GRACE = 5
"""Seconds that open streams get when the server stops."""
_DATE_SECONDS = 1.0
"""How exact the `Date` header is."""


def api(*, host: str | None, port: int | None) -> None:
    """Serve the REST API until stopped."""
    settings = get_settings()
    address = host or settings.host
    key, generated = key_for(settings, address)
    logs.configure(settings.log_level, settings.log_format, secrets=[key])
    telemetry.subscribe(logs.record)
    telemetry.subscribe(metrics.record)
    listener = listen(address, settings.api_port if port is None else port)
    session = open_session(settings, Scope(actor="api"))
    services = session.services

    metrics.watch(functools.partial(measure, services))
    sweeps = services.sweeps()
    try:
        for sweep in sweeps:
            sweep.start()
        shown = f"[{address}]" if ":" in address else address
        terminal.note(f"Gorgon API at http://{shown}:{listener.getsockname()[1]}   (docs: /docs)")
        if generated:
            terminal.reveal(f"No GORGON_API_KEY is set; the key of this start is {key}")
        if settings.embedded:
            terminal.note("No broker is set: runs wait until GORGON_REDIS_URL names one and a worker listens there.")
        config = uvicorn.Config(
            create_app(session, SingleKey(key, principal_of(settings)), access_log=settings.access_log),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=_GRACE,
            server_header=False,
        )
        _Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        return  # uvicorn has closed everything and raises the signal again; ending here is the intended reaction
    finally:
        for sweep in sweeps:
            sweep.stop()
        session.close()
        metrics.close()


class _Server(uvicorn.Server):
    """Told when to stop; uvicorn looks ten times a second.  It wakes only for the `Date` header."""

    _loop: asyncio.AbstractEventLoop | None = None

    async def main_loop(self) -> None:
        """Wait until the server is to stop."""
        self._told = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        while not await self.on_tick(0):  # 0: the header is renewed at each
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait(), _DATE_SECONDS)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; in a signal handler."""
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._told.set)


def principal_of(settings: Settings) -> Principal:
    """Return the principal of GORGON_API_KEY."""
    return Principal("api-key", None if "*" in settings.api_teams else frozenset(settings.api_teams))


def key_for(settings: Settings, address: str) -> tuple[str, bool]:
    """Return the key and whether it was generated, which is allowed only if no other machine can reach the server."""
    if settings.api_key is not None:
        return settings.api_key.get_secret_value(), False
    if not _loopback(address):
        raise ConfigurationError(
            f"Listening on {address} needs a key: others could start runs at your expense.",
            hint=f"Set GORGON_API_KEY, for example to {generate_key()}",
        )
    return generate_key(), True


def _loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def listen(address: str, port: int) -> socket.socket:
    """Return a listening socket.  Raises ConfigurationError with a clear message if the port is taken."""
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(2048)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ConfigurationError(
            f"Cannot listen on {address} port {port}: {error.strerror or error}.",
            hint="Another server may have it; --port 0 takes any free one.",
        ) from None
    return listener


def sandbox(*, host: str | None, port: int | None) -> None:
    """Serve the sandbox until stopped."""
    settings = get_settings()
    arguments = ["--host", host or settings.host, "--port", str(settings.sandbox_port if port is None else port)]
    sys.argv = ["gorgon sandbox", *arguments]
    runpy.run_module("gorgon_api.sandbox", run_name="__main__", alter_sys=True)
