"""`gorgon flower`: Flower on Gorgon's broker, password-protected, on loopback by default."""

from __future__ import annotations

import ipaddress
import secrets

from gorgon_common import errors, lazy
from gorgon_common.cli import terminal
from gorgon_common.settings import get_settings

USER = "gorgon"


def flower(*, host: str | None, port: int | None) -> None:
    """Serve Flower until stopped.  Raises ConfigurationError."""
    settings = get_settings()
    if settings.embedded:
        raise errors.ConfigurationError(
            "Flower watches workers through a broker, and none is set.",
            hint="Set GORGON_REDIS_URL, and start workers with `gorgon worker --events`.",
        )
    lazy.load("flower.command")  # or raises an error that explains how to install it
    address = host or settings.host
    key = settings.api_key.get_secret_value() if settings.api_key else None
    if key is None:
        if not _is_loopback(address):
            raise errors.ConfigurationError(
                f"Flower on {address} needs a password: it can stop workers.", hint="Set GORGON_API_KEY."
            )
        key = secrets.token_urlsafe(24)
        terminal.note(f"No GORGON_API_KEY is set; the password of this start is {key}")
    chosen = settings.flower_port if port is None else port
    terminal.note(f"Flower at http://{address}:{chosen}   (user {USER}, password: the API key)")
    app = lazy.load("gorgon_worker.app:app")
    # Passed inside this process, so it does not appear in process listings.
    app.start(["flower", f"--address={address}", f"--port={chosen}", f"--basic-auth={USER}:{key}"])


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
