"""Where runs live: the configured database, or a server."""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator
from contextlib import contextmanager

from gorgon_common import errors
from gorgon_common.application.session import Session, open_session
from gorgon_common.client.http import Client
from gorgon_common.scope import Scope
from gorgon_common.settings import Settings, get_settings


@contextmanager
def local_session(settings: Settings | None = None) -> Iterator[Session]:
    """Yield a session of the person at this terminal on the configured database, and close it afterwards."""
    session = open_session(settings or get_settings(), person())
    try:
        yield session
    finally:
        session.close()


def person() -> Scope:
    """Return the scope of the person who runs the command: `cli:` and the login name, or the number of the user."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError, ImportError):  # no such user in a container; Python 3.13 raises OSError alone
        name = str(os.getuid())
    return Scope(actor=f"cli:{name}")


@contextmanager
def runs_of(server: str | None) -> Iterator[Session | Client]:
    """Yield the source of runs: a server if one is given, otherwise the configured database."""
    server = chosen_server(server)
    if server is None:
        with local_session() as session:
            yield session
    else:
        with connect(server) as client:
            yield client


def chosen_server(given: str | None) -> str | None:
    """Return the URL of the server that a command uses; None for the configured database.

    `--server` decides: a URL, `default` for GORGON_API_URL, `none` for the database.  Without it, GORGON_API_URL is
    used if it is set.
    """
    settings = get_settings()
    if given is None:
        return settings.api_url if "api_url" in settings.model_fields_set else None
    return None if given == "none" else settings.api_url if given == "default" else given


def connect(server: str) -> Client:
    """Return a client of a server, which sends GORGON_API_KEY.  Raises InputInvalid if it is not a URL."""
    if not server.startswith(("http://", "https://")):
        raise errors.InputInvalid(
            f"--server {server} is not a URL.", hint="Write it with its scheme: --server http://127.0.0.1:8000"
        )
    key = get_settings().api_key
    return Client(server, api_key=key.get_secret_value() if key else None)


def resolve_run(runs: Session | Client, given: str) -> str:
    """Return a run's id; `last` is the newest run.  Raises NotFound."""
    if given != "last":
        return given
    items = runs.runs(limit=1)["items"]
    if not items:
        raise errors.NotFound("There are no runs yet.", hint="`gorgon demo` makes one.")
    return str(items[0]["run_id"])
