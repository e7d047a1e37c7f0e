"""Runs of workflows for end-to-end tests: a worker inside this process, real SDKs, a sandbox process."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from gorgon_common import queues
from gorgon_common.errors import Unavailable
from gorgon_common.settings import EMBEDDED_BROKER, Settings
from gorgon_worker.embedded import embedded
from gorgon_worker.process_owner import new_home
from tests.support.sandbox import Sandbox
from tests.support.services import Services, build

FINISHED = frozenset({"succeeded", "failed", "cancelled"})
POLL = 0.01
Value = TypeVar("Value")


def eventually(look: Callable[[], Value], *, within: float = 20.0, what: str = "it") -> Value:
    """Call `look` until it returns something, and return that.  Fails after `within` seconds."""
    until = time.monotonic() + within
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > until:
            raise AssertionError(f"{what} did not happen within {within:g} s")
        time.sleep(POLL)


@dataclass
class Ran:
    """A run that has ended: the documented JSON form, with short methods for what tests check."""

    document: dict[str, Any]
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def id(self) -> str:
        return str(self.document["run_id"])

    @property
    def status(self) -> str:
        return str(self.document["status"])

    @property
    def outputs(self) -> dict[str, Any]:
        """The outputs of a successful run."""
        assert self.status == "succeeded", json.dumps(self.document, indent=1)[:6000]
        outputs: dict[str, Any] = self.document["outputs"]
        return outputs

    @property
    def error(self) -> dict[str, Any]:
        """The error of a failed run."""
        assert self.status == "failed", json.dumps(self.document, indent=1)[:6000]
        error: dict[str, Any] = self.document["error"]
        return error

    def all(self, name: str) -> list[dict[str, Any]]:
        """Return the step with its items or iterations, in order."""
        return [step for step in self.document["steps"] if step["id"] == name]

    def items(self, name: str) -> list[dict[str, Any]]:
        """Return a step's items or iterations."""
        return [step for step in self.all(name) if step["item"] is not None]

    def step(self, name: str) -> dict[str, Any]:
        """Return the only step with that name; for a map or loop, the step as a whole."""
        found = self.all(name)
        whole = [step for step in found if step["item"] is None] or found
        assert len(whole) == 1, f"{name}: {whole}"
        return whole[0]

    def output(self, name: str) -> Any:
        return self.step(name)["output"]

    def states(self) -> dict[str, str]:
        """Return how each step of the file ended: `{id: status}`, with `id[0]` for items and iterations."""
        return {
            step["id"] if step["item"] is None else f"{step['id']}[{step['item']}]": step["status"]
            for step in self.document["steps"]
        }

    def kinds(self, step: str) -> list[str]:
        """Return the kinds of a step's events, oldest first."""
        return [event["kind"] for event in self.events if event["step"] == step]


class Lab:
    """Runs workflow texts on the worker in this process."""

    def __init__(self, services: Services, sandbox: Sandbox, home: str) -> None:
        self.services = services
        self.sandbox = sandbox
        self.home = home

    def start(self, text: str, inputs: Mapping[str, Any] | None = None) -> str:
        """Submit a run; returns its id."""
        plan, _ = self.services.read(text)
        return self.services.submit(plan, inputs or {}, home=self.home).run_id

    def wait(self, run_id: str, *, within: float = 30.0) -> Ran:
        """Return the run once it has ended."""
        eventually(lambda: self._ended(run_id), within=within, what=f"the end of {run_id}")
        return Ran(self.services.run(run_id, steps=True), self.services.events(run_id, limit=5000))

    def _ended(self, run_id: str) -> bool:
        try:
            return self.services.run(run_id)["status"] in FINISHED
        except Unavailable:
            return False  # the database is away, which is what some tests are about

    def run(self, text: str, inputs: Mapping[str, Any] | None = None, *, within: float = 30.0) -> Ran:
        return self.wait(self.start(text, inputs), within=within)

    def resume(self, run_id: str, text: str | None = None) -> Ran:
        """Resume a run, with another text if one is given."""
        plan = None if text is None else self.services.read(text)[0]
        return self.wait(self.services.resume(run_id, plan=plan, home=self.home).run_id)

    def until(self, run_id: str, name: str, status: str, *, within: float = 20.0) -> dict[str, Any]:
        """Return a step as soon as it has the given status."""

        def look() -> dict[str, Any] | None:
            steps = self.services.run(run_id, steps=True)["steps"]
            return next((step for step in steps if step["id"] == name and step["status"] == status), None)

        return eventually(look, within=within, what=f"{name} {status}")

    def calls(self, **fields: Any) -> int:
        """Return the number of requests that the sandbox has seen, restricted to those with the given fields."""
        return len(self.sandbox.log(**fields))


@contextlib.contextmanager
def laboratory(folder: Path, sandbox: Sandbox, *, database_url: str | None = None, slots: int = 16) -> Iterator[Lab]:
    """Run an embedded worker on SQLite for the duration of the context."""
    settings = Settings(
        _env_file=None,
        home=folder,
        database_url=database_url or f"sqlite:///{folder}/gorgon.db",
        broker_url=EMBEDDED_BROKER,
        commands_allow="*",
        lease_seconds=10,
        grace_seconds=2,
    )
    services = build(settings)
    home = new_home()
    served = sorted({queues.OPENAI, queues.ANTHROPIC, queues.COMMAND, queues.CONTROL})
    with (
        contextlib.closing(services),
        embedded(services, queues=served, slots=slots, home=home, target="sandbox", sandbox_url=sandbox.url),
    ):
        yield Lab(services, sandbox, home)
