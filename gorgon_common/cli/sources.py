"""Where commands find things: workflow texts, the services of this machine, or a server."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gorgon_common import bootstrap, errors
from gorgon_common.bootstrap import Services
from gorgon_common.client.http import Client
from gorgon_common.settings import Settings, get_settings
from gorgon_common.workflow import catalogue

_MAX_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Workflow:
    """A workflow's text, and what it is called in messages; `name` where it is a bundled one."""

    text: str
    file: str
    name: str | None = None


def find_workflow(given: str) -> Workflow:
    """Return the text of a file, of stdin (`-`) or of a bundled workflow.  Raises NotFound, InputInvalid."""
    if given == "-":
        return Workflow(sys.stdin.read(_MAX_BYTES), "<stdin>")
    path = Path(given)
    if path.is_file():
        return Workflow(read_text(path), given)
    if path.is_dir():
        raise errors.InputInvalid(f"{given} is a directory; a workflow is a YAML file.")
    if looks_like_path(given):
        near = [entry.name for entry in path.parent.glob("*.y*ml")][:5] if path.parent.is_dir() else []
        hint = f"YAML files there: {', '.join(sorted(near))}." if near else "`gorgon init` writes a first workflow."
        raise errors.NotFound(f"There is no file {given}.", hint=hint)
    return Workflow(catalogue.source(given), given, given)


def looks_like_path(given: str) -> bool:
    """Tell whether somebody means a file and not a bundled workflow."""
    return given.endswith((".yaml", ".yml", ".json")) or os.sep in given


def read_text(path: Path) -> str:
    """Return a workflow file's text.  Raises InputInvalid."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise errors.InputInvalid(f"{path} is too large for a workflow file.")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise errors.InputInvalid(f"{path} is not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise errors.InputInvalid(f"{path}: {error.strerror}.") from None


@contextmanager
def local_services(settings: Settings | None = None) -> Iterator[Services]:
    """Give the services of the configured database, closed afterwards."""
    services = bootstrap.build(settings or get_settings())
    try:
        yield services
    finally:
        services.close()


@contextmanager
def runs_of(server: str | None) -> Iterator[Services | Client]:
    """Give what knows the runs: the server where one is named, else the configured database."""
    if server is None:
        with local_services() as services:
            yield services
    else:
        with connect(server) as client:
            yield client


def connect(server: str) -> Client:
    """Return a client of a server; it sends GORGON_API_KEY.  Raises InputInvalid."""
    if not server.startswith(("http://", "https://")):
        raise errors.InputInvalid(
            f"--server {server} is not a URL.", hint="Write it with its scheme: --server http://127.0.0.1:8000"
        )
    key = get_settings().api_key
    return Client(server, api_key=key.get_secret_value() if key else None)


def resolve_run(runs: Services | Client, given: str) -> str:
    """Return a run's id; `last` is the newest run.  Raises NotFound."""
    if given != "last":
        return given
    items = runs.runs(limit=1)["items"]
    if not items:
        raise errors.NotFound("There are no runs yet.", hint="`gorgon demo` makes one.")
    return str(items[0]["run_id"])
