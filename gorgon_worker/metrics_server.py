"""A worker process's Prometheus metrics: `GET /metrics` on a separate port."""

from __future__ import annotations

import hmac
import ipaddress
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gorgon_common import metrics
from gorgon_common.errors import ConfigurationError
from gorgon_common.logs import get_logger
from gorgon_common.settings import Settings

log = get_logger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MetricsServer:
    """Serves this process's metrics until closed; `port` 0 takes any free one.

    It listens on GORGON_HOST.  Beyond loopback it requires GORGON_API_KEY, as the API does, because labels name
    workflows and teams.  Raises ConfigurationError if it cannot listen there.
    """

    def __init__(self, settings: Settings, port: int) -> None:
        key = settings.api_key.get_secret_value() if settings.api_key else None
        open_to_others = not _is_loopback(settings.host)
        if open_to_others and key is None:
            raise ConfigurationError(
                f"Metrics on {settings.host} need a key: labels name workflows and teams.",
                hint="Set GORGON_API_KEY, or let GORGON_HOST be 127.0.0.1.",
            )
        handler = type("Handler", (_Handler,), {"key": key if open_to_others else None})
        try:
            self._server = _Server((settings.host, port), handler)
        except OSError as error:
            raise ConfigurationError(
                f"Metrics cannot be served on {settings.host} port {port}: {error.strerror or error}.",
                hint="Each worker on a machine needs a port of its own: --metrics-port N; 0 takes any free one.",
            ) from None
        self._thread = threading.Thread(target=self._server.serve_forever, name="gorgon-metrics", daemon=True)
        self.url = f"http://{settings.host}:{self._server.server_address[1]}/metrics"

    def start(self) -> None:
        """Start serving."""
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the error; the default prints it."""
        log.exception("metrics could not be told", client=str(client_address))


class _Handler(BaseHTTPRequestHandler):
    key: str | None = None
    server_version = "gorgon"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer a scrape."""
        if self.path.partition("?")[0] != "/metrics":
            self._answer(404, b"GET /metrics is all that there is.\n")
        elif not self._allowed():
            self._answer(401, b"This needs the API key: Authorization: Bearer KEY.\n")
        else:
            self._answer(200, metrics.exposition())

    def _allowed(self) -> bool:
        if self.key is None:
            return True
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.key.encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Do not log scrapes."""


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
