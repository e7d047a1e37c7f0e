"""`gorgon runs …`: what ran, what runs, and how to end it; `resume` is the worker's, because it runs steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import typer

from gorgon_common import errors
from gorgon_common.bootstrap import Services
from gorgon_common.cli import terminal
from gorgon_common.cli.backends import resolve_run, runs_of
from gorgon_common.cli.follow import EventWait, follow
from gorgon_common.cli.outline import elapsed, error_text, label
from gorgon_common.cli.screen import Plain, RunDrawing, Silent, Tree, View, cut_lines, ending, usage_of
from gorgon_common.client.http import Client
from gorgon_common.client.schemas import RUN_FINISHED
from gorgon_common.clock import SYSTEM_CLOCK

_PAUSE = 0.2
_STYLES = {"succeeded": "ok", "failed": "bad", "cancelled": "wait", "running": "busy"}


def ls(
    *, status: str | None, workflow: str | None, limit: int, cursor: str | None, server: str | None, as_json: bool
) -> None:
    """List runs."""
    with runs_of(server) as runs:
        page = runs.runs(status=status, workflow=workflow, limit=limit, cursor=cursor)
    if as_json:
        terminal.emit(page)
        return
    if not page["items"]:
        terminal.note("No runs." if status or workflow or cursor else "No runs yet. `gorgon demo` makes one.")
        return
    columns = ("run", "workflow", "status", "started", "took", "tokens", "cost")
    terminal.table(columns, [_row(run) for run in page["items"]], right=("took", "tokens", "cost"))
    if page.get("next"):
        terminal.note(f"\nOlder ones: gorgon runs ls --cursor {page['next']}")


def _row(run: Mapping[str, Any]) -> list[Any]:
    took = elapsed(run, SYSTEM_CLOCK.now())
    started = str(run.get("started_at") or "")[:19].replace("T", " ")
    tokens = terminal.tokens_of(run)
    return [
        run["run_id"],
        run["workflow"],
        terminal.styled(str(run["status"]), _STYLES.get(str(run["status"]), "quiet")),
        started,
        terminal.seconds(took) if took is not None else "",
        terminal.number(tokens) if tokens else "",
        terminal.cost(run, short=True) if terminal.has_cost(run) else "",
    ]


def show(run: str, *, step: str | None, full: bool, server: str | None, as_json: bool) -> None:
    """Show one run, or one step of it."""
    with runs_of(server) as runs:
        document = runs.run(resolve_run(runs, run), steps=True)
    if step is not None:
        _show_step(document, step, full=full, as_json=as_json)
    elif as_json:
        terminal.emit(document)
    else:
        tell_whole(document, full=full)


def tell_whole(document: Mapping[str, Any], *, full: bool) -> None:
    """Print a run with all its steps and its outputs."""
    now = SYSTEM_CLOCK.now()
    waits = document.get("waits_for")
    terminal.draw(RunDrawing(document, now, whole=True, note=f"It {waits['what']}." if waits else ""))
    terminal.say()
    if document["status"] in RUN_FINISHED:
        terminal.draw(ending(document, full=full, now=now))


def _show_step(document: Mapping[str, Any], wanted: str, *, full: bool, as_json: bool) -> None:
    found = [step for step in document["steps"] if wanted in (step["id"], label(step))]
    if not found:
        names = ", ".join(dict.fromkeys(label(step) for step in document["steps"]))
        raise errors.NotFound(f"The run has no step {wanted!r}.", hint=f"Its steps: {names}.")
    if as_json:
        terminal.emit(found[0] if len(found) == 1 else found)
        return
    for step in found:
        terminal.say(f"{label(step)}  {step['status']}  {'  '.join(usage_of(step))}".rstrip())
        for name in ("kind", "role", "provider", "model", "reason", "attempts", "started_at", "finished_at"):
            if step.get(name) not in (None, 0):
                terminal.say(f"  {name}: {step[name]}")
        message, hint = error_text(step.get("error"))
        for line in (message, hint):
            if line:
                terminal.say(f"  {line}")
        lines, more = cut_lines(step.get("output"), full=full)
        for line in lines:
            terminal.say(f"  {line}")
        if more:
            terminal.say(f"  … {more}; --full shows all")


def watch(run: str, *, server: str | None, as_json: bool) -> None:
    """Watch a run to its end.  Exit code 1 if it failed, 3 if it goes on unwatched."""
    with runs_of(server) as runs:
        document, left = watch_run(runs, resolve_run(runs, run), as_json=as_json)
    conclude(document, left=left, full=False, as_json=as_json, server=server)


def watch_run(runs: Services | Client, run_id: str, *, as_json: bool) -> tuple[dict[str, Any], bool]:
    """Follow a run that goes on elsewhere; returns it, and whether the watching was interrupted."""
    view = choose_view(as_json=as_json)
    try:
        if isinstance(runs, Client):
            return follow(runs, run_id, view, cancels=False, wait=EventWait(runs, run_id), expect_worker=True)
        return follow(runs, run_id, view, cancels=False, expect_worker=True)
    finally:
        view.close()


def choose_view(*, as_json: bool, target: str = "") -> View:
    """Return what shows a run here: nothing for --json, a tree on a terminal, lines in a pipe."""
    if as_json:
        return Silent()
    if terminal.interactive():
        return Tree(terminal.console(), target=target)
    return Plain()


def conclude(document: Mapping[str, Any], *, left: bool, full: bool, as_json: bool, server: str | None = None) -> None:
    """Print how a run ended, and exit with the code that says so.

    `left`: somebody pressed Ctrl-C; the run may go on.
    """
    status = str(document["status"])
    if as_json:
        terminal.emit(document)
    elif status in RUN_FINISHED:
        terminal.say()
        terminal.draw(ending(document, full=full, now=SYSTEM_CLOCK.now(), server=server))
    if status not in RUN_FINISHED:
        if not as_json:
            where = f" --server {server}" if server else ""
            terminal.note(f"\nThe run goes on: gorgon runs watch {document['run_id']}{where}")
        raise typer.Exit(terminal.EXIT_WAITING)
    if status != "succeeded":
        raise typer.Exit(terminal.EXIT_INTERRUPTED if left else terminal.EXIT_RUN_FAILED)


def logs(run: str, *, follow: bool, server: str | None, as_json: bool) -> None:
    """Print the journal of a run."""
    with runs_of(server) as runs:
        run_id = resolve_run(runs, run)
        state = str(runs.run(run_id)["status"])
        events = _journal(runs, run_id, follow=follow and state not in RUN_FINISHED)
        if as_json and not follow:
            terminal.emit(list(events))
            return
        try:
            for event in events:
                if as_json:
                    terminal.emit_line(event)
                else:
                    terminal.say(_event(event))
        except KeyboardInterrupt:
            raise typer.Exit(terminal.EXIT_WAITING) from None


def _journal(runs: Services | Client, run_id: str, *, follow: bool) -> Iterator[dict[str, Any]]:
    if isinstance(runs, Client):
        yield from runs.events(run_id, follow=follow)
        return
    after = 0
    while True:
        ended = not follow or str(runs.run(run_id)["status"]) in RUN_FINISHED
        found = runs.events(run_id, after=after)
        for event in found:
            after = int(event["seq"])
            yield event
        if not found and ended:
            return
        if not found:
            time.sleep(_PAUSE)


def _event(event: Mapping[str, Any]) -> str:
    at = str(event["at"])[11:23]
    parts = [at, str(event["kind"]).ljust(16), str(event.get("step") or ""), str(event.get("message") or "")]
    return "  ".join(part for part in parts if part).rstrip()


def cancel(run: str, *, server: str | None, as_json: bool) -> None:
    """End a run."""
    with runs_of(server) as runs:
        document = runs.cancel(resolve_run(runs, run))
    if as_json:
        terminal.emit(document)
    else:
        ended = document["status"] in RUN_FINISHED
        told = f"is {document['status']}" if ended else f"is told to end; it is {document['status']}"
        terminal.say(f"{document['run_id']} {told}.")
