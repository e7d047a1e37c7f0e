"""Executes a run inside the process of a command, with a worker and, without --live, a sandbox of its own."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Any, Protocol

from gorgon_common import errors, lazy, queues
from gorgon_common.application.runs import Submitted
from gorgon_common.application.session import Session
from gorgon_common.application.workflows import Plan
from gorgon_common.cli import terminal
from gorgon_common.cli.follow import follow
from gorgon_common.cli.runs import choose_view
from gorgon_common.cli.sources import Workflow
from gorgon_common.client.schemas import RUN_FINISHED
from gorgon_common.settings import EMBEDDED_BROKER, Settings, variable_of

_ABANDON = 3.0
"""Seconds that a run gets to end once nothing watches it any more."""
_KEYS = {queues.OPENAI: "openai_api_key", queues.ANTHROPIC: "anthropic_api_key"}
_BASE_URLS = {queues.OPENAI: "openai_base_url"}


class LocalWorker(Protocol):
    """The worker of an embedded run."""

    given_up: errors.GorgonError | None

    def cancel(self, number: int) -> None:
        """Abort the calls of a run immediately, even if nothing can be stored."""
        ...

    def trouble(self) -> str:
        """Return what keeps the steps from going on, in a sentence; empty if nothing does."""
        ...


class Local(Protocol):
    """`gorgon_worker.local`: what a command needs of the worker's package, which the core does not import."""

    SandboxProcess: Callable[[Settings], AbstractContextManager[Any]]

    def new_home(self) -> str:
        """Return a new home name for this process."""
        ...

    def is_deserted(self, home: str) -> bool:
        """Return whether the process of a home is known to be dead."""
        ...

    def preload(self, queues: Sequence[str]) -> None:
        """Import the SDKs of these queues in the background."""
        ...

    def worker(
        self, services: Any, *, queues: Sequence[str], slots: int, home: str, target: str, sandbox_url: str | None
    ) -> AbstractContextManager[LocalWorker]:
        """Run the steps of a home in this process until the context ends."""
        ...


def _local() -> Local:
    """Return the worker's side.  Raises ConfigurationError if the package is not installed."""
    local: Local = lazy.load("gorgon_worker.local")
    return local


def here(settings: Settings) -> Settings:
    """Return the settings for a run in this process: its messages stay here even if a broker is configured."""
    return settings.model_copy(update={"broker_url": EMBEDDED_BROKER})


def own_sandbox(stack: ExitStack, settings: Settings, *, needed: bool) -> Callable[[], str] | None:
    """Start a sandbox in the background unless one is configured; returns a function that waits for its address."""
    if not needed:
        return None
    if settings.sandbox_url is not None:
        url = settings.sandbox_url
        return lambda: url
    url_of: Callable[[], str] = stack.enter_context(_local().SandboxProcess(settings)).url
    return url_of


def compile_file(session: Session, workflow: Workflow, *, quiet: bool = False) -> Plan:
    """Return the plan of a workflow that can run now; warnings are printed to stderr.

    Raises WorkflowInvalid, and NotAvailable if a step cannot be executed yet.
    """
    plan, warnings = session.read(workflow.text, file=workflow.file)
    if warnings and not quiet:
        terminal.tell_problems(warnings, stream=sys.stderr, source=workflow.text)
    if plan.unavailable:
        raise errors.NotAvailable(
            "This workflow cannot run yet:" + "".join(f"\n  {sentence}" for sentence in plan.unavailable),
            hint="It is valid, and `gorgon graph` shows it; remove these steps to run the rest.",
        )
    return plan


def vacate(session: Session, run_id: str) -> bool:
    """Release a run whose process was killed; returns whether it was.  See `application.runs.vacate`."""
    return session.vacate(run_id, _local().is_deserted)


def require_keys(plan: Plan, settings: Settings) -> None:
    """Raise ConfigurationError naming the variables of all keys that the plan needs and that are not set."""
    needed = {node.queue for node in plan.nodes} & _KEYS.keys()
    missing = [
        (name, variable_of(_KEYS[name]))
        for name in sorted(str(queue) for queue in needed)
        if getattr(settings, _KEYS[name]) is None and not getattr(settings, _BASE_URLS.get(name, ""), None)
    ]
    if missing:
        told = ", ".join(f"{variable} (for {name})" for name, variable in missing)
        raise errors.ConfigurationError(
            f"--live needs {told}, which {'is' if len(missing) == 1 else 'are'} not set.",
            hint="Export it or write it into .env; without --live the sandbox is used and no key is needed.",
        )


def run_embedded(
    session: Session,
    plan: Plan,
    submit: Callable[[str], Submitted],
    *,
    target: str,
    sandbox: Callable[[], str] | None,
    as_json: bool = False,
) -> tuple[dict[str, Any], bool]:
    """Submit a run and execute it in this process, displayed live; returns the run and whether it was interrupted.

    `plan` determines the queues that are needed.  `submit` receives the name of this process's home, so no other worker
    takes the run.
    """
    local = _local()
    home = local.new_home()
    needed = {node.queue for node in plan.nodes if node.queue}
    served = sorted({*needed, queues.CONTROL})
    local.preload(served)
    url = sandbox() if sandbox is not None else None
    slots = session.settings.slots
    with local.worker(
        session.services, queues=served, slots=slots, home=home, target=target, sandbox_url=url
    ) as worker:
        submitted = _submitted(session, submit, home)
        if submitted.reused and not as_json:
            terminal.note(f"{submitted.reused} reused, {submitted.to_run} to run")
        view = choose_view(as_json=as_json, target=target)
        try:
            grace = session.settings.grace_seconds
            return follow(session, submitted.run_id, view, cancels=True, grace=grace, trouble=worker.trouble)
        except BaseException as error:
            with suppress(errors.GorgonError):
                worker.cancel(session.number(submitted.run_id))  # calls end though nothing can be stored
            if isinstance(error, errors.GorgonError) and error is worker.given_up:
                raise _resumable(error, submitted.run_id) from error
            _abandon(session, submitted.run_id)
            raise
        finally:
            view.close()


def _submitted(session: Session, submit: Callable[[str], Submitted], home: str) -> Submitted:
    """Submit a run; runs of killed processes on this machine do not keep it from its concurrency key."""
    try:
        submitted = submit(home)
    except errors.KeyTaken as taken:
        gone = [holder for holder in taken.held_by if vacate(session, holder)]
        if not gone:
            raise
        return submit(home)
    waits = session.run(submitted.run_id).get("waits_for")
    for holder in waits["held_by"] if waits else ():
        vacate(session, holder["run_id"])  # the sweep does the rest
    return submitted


def _resumable(error: errors.GorgonError, run_id: str) -> errors.GorgonError:
    hint = f"{error.hint} Then `gorgon runs resume {run_id}` continues the run."
    return type(error)(error.message, hint=hint)


def _abandon(session: Session, run_id: str) -> None:
    """Cancel a run that nothing watches any more (a closed pipe, an internal error), so that it spends nothing more."""
    until = time.monotonic() + _ABANDON
    with suppress(errors.GorgonError):
        session.cancel(run_id)
        while session.run(run_id)["status"] not in RUN_FINISHED and time.monotonic() < until:
            time.sleep(0.02)
