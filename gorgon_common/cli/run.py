"""`gorgon run` and `gorgon runs resume`: starts a run here or on a server, and follows it to its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import typer

from gorgon_common import errors, logs, telemetry
from gorgon_common.application.session import Session
from gorgon_common.application.workflows import Plan, capped
from gorgon_common.cli import terminal
from gorgon_common.cli.backends import chosen_server, connect, local_session, resolve_run
from gorgon_common.cli.follow import EventWait, follow
from gorgon_common.cli.in_process import compile_file, here, own_sandbox, require_keys, run_embedded, vacate
from gorgon_common.cli.inputs import read_inputs
from gorgon_common.cli.plans import checked_limit, warn_of_limit
from gorgon_common.cli.runs import choose_view, conclude
from gorgon_common.cli.sources import asked_of_server, find_workflow
from gorgon_common.client.http import Client
from gorgon_common.ids import new_id
from gorgon_common.settings import Settings, get_settings


def run(
    file: str,
    *,
    inputs: Sequence[str],
    inputs_file: str | None,
    live: bool,
    server: str | None,
    detach: bool,
    full: bool,
    as_json: bool,
    max_cost: float | None = None,
    team: str | None = None,
) -> None:
    """Run a workflow and display it; ends the command with the exit code for the outcome.

    `max_cost`: US dollars that the run may spend, including all its resumes.  `team` owns it, by default the file's
    `team:`.
    """
    target = "live" if live else "sandbox"
    checked_limit(max_cost)
    server = chosen_server(server)
    if server is not None:
        with connect(server) as client:
            _run_on_server(
                client,
                file,
                inputs,
                inputs_file,
                target=target,
                detach=detach,
                full=full,
                as_json=as_json,
                max_cost=max_cost,
                team=team,
            )
        return
    settings = get_settings()
    _observe(settings)
    with ExitStack() as stack:
        sandbox = own_sandbox(stack, settings, needed=not live and not detach)
        session = stack.enter_context(local_session(settings if detach else here(settings)))
        workflow = find_workflow(file)
        named = file if workflow.name is None and file != "-" else None
        plan = compile_file(session, workflow, quiet=as_json)
        if live:
            require_keys(plan, settings)
        values = read_inputs(inputs, inputs_file, plan.inputs)
        if max_cost is not None:
            plan = capped(plan, max_cost)
            if not as_json:
                warn_of_limit(session.estimate(plan, values, target=target, team=team), max_cost)
        if not live and not as_json:
            terminal.whisper("Offline, on the sandbox: replies are invented. --live calls the real providers.")
        if detach:
            _detach(session, plan, values, target=target, team=team, as_json=as_json)
        document, interrupted = run_embedded(
            session,
            plan,
            lambda home: session.submit(plan, values, target=target, team=team, home=home),
            target=target,
            sandbox=sandbox,
            as_json=as_json,
        )
    conclude(document, left=interrupted, full=full, as_json=as_json, file=named)


def _observe(settings: Settings) -> None:
    """Log events as a worker does, if the settings ask for logs; the user follows them in the drawing of the run."""
    if settings.model_fields_set & {"log_level", "log_format"}:
        logs.configure(settings.log_level, settings.log_format)
        telemetry.subscribe(logs.record)


def _detach(
    session: Session, plan: Plan, values: Mapping[str, Any], *, target: str, team: str | None, as_json: bool
) -> None:
    if session.settings.embedded:
        raise errors.ConfigurationError(
            "--detach leaves the run to a worker, but no worker can be reached: messages stay in this process.",
            hint="Set GORGON_REDIS_URL and start `gorgon worker`, or use --server.",
        )
    submitted = session.submit(plan, values, target=target, team=team)
    waits = session.run(submitted.run_id).get("waits_for")
    if waits and not as_json:
        terminal.note(f"The run {waits['what']}.")
    _left(submitted.run_id, None, as_json=as_json)


def _left(run_id: str, server: str | None, *, as_json: bool) -> None:
    if as_json:
        terminal.emit({"run_id": run_id, "status": "queued"})
    else:
        terminal.say(run_id)
        where = f" --server {server}" if server else ""
        terminal.note(f"The run goes on by itself: gorgon runs watch {run_id}{where}")
    raise typer.Exit


def _run_on_server(
    client: Client,
    file: str,
    inputs: Sequence[str],
    inputs_file: str | None,
    *,
    target: str,
    detach: bool,
    full: bool,
    as_json: bool,
    max_cost: float | None,
    team: str | None,
) -> None:
    asked = asked_of_server(file)
    plan = client.plan(**asked)
    if plan["unavailable"]:
        raise errors.NotAvailable("This workflow cannot run yet: " + " ".join(plan["unavailable"]))
    values = read_inputs(inputs, inputs_file, plan["inputs"])
    # With the key, a request that is repeated after a lost reply returns the same run.
    submitted = client.submit(
        **asked, inputs=values, target=target, team=team, max_cost_usd=max_cost, idempotency_key=new_id("cli")
    )
    run_id = str(submitted["run_id"])
    if detach:
        _left(run_id, client.base_url, as_json=as_json)
    view = choose_view(as_json=as_json, target=target)
    try:
        wait = EventWait(client, run_id)
        document, interrupted = follow(client, run_id, view, cancels=True, wait=wait, expect_worker=True)
    finally:
        view.close()
    conclude(document, left=interrupted, full=full, as_json=as_json, server=client.base_url)


def resume(run: str, *, file: str | None, detach: bool, server: str | None, as_json: bool) -> None:
    """Continue a run as a new one, here or on the server that stores it."""
    server = chosen_server(server)
    if server is not None:
        with connect(server) as client:
            _resume_on_server(client, run, file=file, detach=detach, as_json=as_json)
        return
    settings = get_settings()
    _observe(settings)
    with ExitStack() as stack:
        session = stack.enter_context(local_session(settings if detach else here(settings)))
        run_id = resolve_run(session, run)
        vacate(session, run_id)
        before = session.run(run_id)
        target = str(before.get("target") or "sandbox")
        plan = session.plan_of(run_id) if file is None else compile_file(session, find_workflow(file), quiet=as_json)
        if target == "live":
            require_keys(plan, settings)
        if detach:
            if settings.embedded:
                raise errors.ConfigurationError(
                    "--detach leaves the run to a worker, but no worker can be reached: messages stay in this process.",
                    hint="Set GORGON_REDIS_URL and start `gorgon worker`, or use --server.",
                )
            _left(session.resume(run_id, plan=plan).run_id, None, as_json=as_json)
        sandbox = own_sandbox(stack, settings, needed=target == "sandbox")
        document, interrupted = run_embedded(
            session,
            plan,
            lambda home: session.resume(run_id, plan=plan, home=home),
            target=target,
            sandbox=sandbox,
            as_json=as_json,
        )
    conclude(document, left=interrupted, full=False, as_json=as_json, file=file)


def _resume_on_server(client: Client, run: str, *, file: str | None, detach: bool, as_json: bool) -> None:
    if file is not None:
        raise errors.NotAvailable(
            "--file cannot be used with --server yet.", hint="Resume it without --file, as it was."
        )
    submitted = client.resume(resolve_run(client, run))
    run_id = str(submitted["run_id"])
    if not as_json:
        terminal.note(f"{submitted['reused']} reused, {submitted['to_run']} to run")
    if detach:
        _left(run_id, client.base_url, as_json=as_json)
    view = choose_view(as_json=as_json)
    try:
        wait = EventWait(client, run_id)
        document, interrupted = follow(client, run_id, view, cancels=True, wait=wait, expect_worker=True)
    finally:
        view.close()
    conclude(document, left=interrupted, full=False, as_json=as_json, server=client.base_url)
