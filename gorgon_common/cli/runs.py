"""`gorgon runs …`: lists, shows and ends runs; `resume` is in `run`, because it runs steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import typer

from gorgon_common import errors
from gorgon_common.application.session import Session
from gorgon_common.cli import tables, terminal
from gorgon_common.cli.backends import resolve_run, runs_of
from gorgon_common.cli.follow import EventWait, follow
from gorgon_common.cli.inputs import read_json
from gorgon_common.cli.outline import elapsed, error_text, label, standing
from gorgon_common.cli.screen import Plain, RunDrawing, Silent, Tree, View, cut_lines, ending, usage_of
from gorgon_common.client.http import Client
from gorgon_common.client.schemas import RUN_FINISHED
from gorgon_common.clock import SYSTEM_CLOCK

_PAUSE = 0.2
_COLUMNS = (
    tables.exact("run"),
    tables.text("workflow", least=10),
    tables.exact("status"),
    tables.exact("target", drop=1),
    tables.exact("started", drop=4),
    tables.number("took", drop=3),
    tables.number("tokens", drop=5),
    tables.number("cost", drop=2),
)
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
    tell_page(page, SYSTEM_CLOCK.now())


def tell_page(page: Mapping[str, Any], now: datetime) -> None:
    """Print a page of runs for people."""
    tables.show(_COLUMNS, [_row(run, now) for run in page["items"]])
    died = [run for run in page["items"] if run.get("orphaned")]
    if died:
        terminal.note("\nTo continue a run whose process died:")
        terminal.note(f"  gorgon runs resume {died[0]['run_id']}")
    if page.get("next"):
        terminal.note(f"\nOlder ones: gorgon runs ls --cursor {page['next']}")


def _row(run: Mapping[str, Any], now: datetime) -> list[Any]:
    died = bool(run.get("orphaned"))
    took = None if died else elapsed(run, now)
    tokens = terminal.tokens_of(run)
    status = "died" if died else str(run["status"])
    return [
        run["run_id"],
        run["workflow"],
        terminal.styled(status, "bad" if died else _STYLES.get(status, "quiet")),
        run.get("target") or "",
        str(run.get("started_at") or "")[:19].replace("T", " "),
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
    terminal.draw(RunDrawing(document, now, whole=True, note=standing(document, now)))
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
    """Watch a run to its end.  Exit code 1 if it failed, 3 if it continues unwatched."""
    with runs_of(server) as runs:
        document, left = watch_run(runs, resolve_run(runs, run), as_json=as_json)
    conclude(document, left=left, full=False, as_json=as_json, server=server)


def watch_run(runs: Session | Client, run_id: str, *, as_json: bool) -> tuple[dict[str, Any], bool]:
    """Follow a run that is executed elsewhere; returns it, and whether the watching was interrupted."""
    view = choose_view(as_json=as_json)
    try:
        if isinstance(runs, Client):
            return follow(runs, run_id, view, cancels=False, wait=EventWait(runs, run_id), expect_worker=True)
        return follow(runs, run_id, view, cancels=False, expect_worker=True)
    finally:
        view.close()


def choose_view(*, as_json: bool, target: str = "") -> View:
    """Return the view for a run: nothing for --json, a tree on a terminal, lines in a pipe."""
    if as_json:
        return Silent()
    if terminal.interactive():
        return Tree(terminal.console(), target=target)
    return Plain()


def conclude(
    document: Mapping[str, Any],
    *,
    left: bool,
    full: bool,
    as_json: bool,
    server: str | None = None,
    file: str | None = None,
) -> None:
    """Print how a run ended, and exit with the corresponding code.

    `left`: the user pressed Ctrl-C; the run may continue.  `file`: the workflow's file, if it is known.
    """
    status = str(document["status"])
    if as_json:
        terminal.emit(document)
    elif status in RUN_FINISHED:
        terminal.say()
        terminal.draw(ending(document, full=full, now=SYSTEM_CLOCK.now(), server=server, file=file))
    if status not in RUN_FINISHED:
        if not as_json:
            where = f" --server {server}" if server else ""
            goes_on = f"The run goes on: gorgon runs watch {document['run_id']}{where}"
            terminal.note(f"\n{standing(document, SYSTEM_CLOCK.now()) if document.get('orphaned') else goes_on}")
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
                    tell_event(event)
        except KeyboardInterrupt:
            raise typer.Exit(terminal.EXIT_WAITING) from None


def _journal(runs: Session | Client, run_id: str, *, follow: bool) -> Iterator[dict[str, Any]]:
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


def tell_event(event: Mapping[str, Any]) -> None:
    """Print one line of a journal; on a terminal, a long message continues below, indented."""
    step = event.get("step") or ""
    head = f"{str(event['at'])[11:23]}  {event['kind']:<16}{'  ' if step else ''}{step}"
    message = " ".join(str(event.get("message") or "").split())
    if terminal.interactive() and len(head) + len(message) + 2 > terminal.console().width:
        terminal.say(head.rstrip())
        terminal.paragraph(message, indent=14)
    else:
        terminal.say(f"{head}  {message}".rstrip())


def signal(run: str, name: str, data: str | None, *, server: str | None, as_json: bool) -> None:
    """Send an event to a run."""
    value = None if data is None else read_json("--data", data)
    with runs_of(server) as runs:
        document = runs.send_event(resolve_run(runs, run), name, value)
    if as_json:
        terminal.emit(document)
    else:
        terminal.say(f"{document['run_id']}: the event {name} was sent")


def cancel(run: str, *, server: str | None, as_json: bool) -> None:
    """End a run."""
    with runs_of(server) as runs:
        document = runs.cancel(resolve_run(runs, run))
    if as_json:
        terminal.emit(document)
    else:
        ended = document["status"] in RUN_FINISHED
        terminal.say(f"{document['run_id']}: {document['status'] if ended else 'cancelling…'}")
