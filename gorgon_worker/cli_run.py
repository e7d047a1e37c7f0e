"""`gorgon run`, `gorgon runs resume` and `gorgon worker`: starts runs and the workers that execute them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import typer

from gorgon_common import errors, lazy, logs, queues, telemetry
from gorgon_common.bootstrap import Services, Submitted
from gorgon_common.cli import terminal
from gorgon_common.cli.backends import chosen_server, connect, local_services, resolve_run
from gorgon_common.cli.follow import EventWait, follow
from gorgon_common.cli.inputs import read_inputs
from gorgon_common.cli.plans import checked_limit, warn_of_limit
from gorgon_common.cli.runs import choose_view, conclude
from gorgon_common.cli.sources import Workflow, asked_of_server, find_workflow
from gorgon_common.client.http import Client
from gorgon_common.client.schemas import RUN_FINISHED
from gorgon_common.ids import new_id
from gorgon_common.operations.providers import SERVERS
from gorgon_common.settings import EMBEDDED_BROKER, Settings, get_settings
from gorgon_common.workflow.plan import Plan
from gorgon_worker.process_owner import is_deserted, new_home
from gorgon_worker.providers import CLIENTS
from gorgon_worker.sandbox_process import SandboxProcess

_ABANDON = 3.0
"""Seconds that a run gets to end once nothing watches it any more."""


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
        services = stack.enter_context(local_services(settings if detach else here(settings)))
        workflow = find_workflow(file)
        named = file if workflow.name is None and file != "-" else None
        plan = compile_file(services, workflow, quiet=as_json)
        if live:
            require_keys(plan, settings)
        values = read_inputs(inputs, inputs_file, plan.inputs)
        if max_cost is not None:
            plan = lazy.load("gorgon_common.engine.estimate:capped")(plan, max_cost)
            if not as_json:
                warn_of_limit(services.estimate(plan, values, target=target, team=team), max_cost)
        if not live and not as_json:
            terminal.whisper("Offline, on the sandbox: replies are invented. --live calls the real providers.")
        if detach:
            _detach(services, plan, values, target=target, team=team, as_json=as_json)
        document, interrupted = run_embedded(
            services,
            plan,
            lambda home: services.submit(plan, values, target=target, team=team, home=home),
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
    return stack.enter_context(SandboxProcess(settings)).url


def compile_file(services: Services, workflow: Workflow, *, quiet: bool = False) -> Plan:
    """Return the plan of a workflow that can run now; warnings are printed to stderr.

    Raises WorkflowInvalid, and NotAvailable if a step cannot be executed yet.
    """
    plan, warnings = services.read(workflow.text, file=workflow.file)
    if warnings and not quiet:
        terminal.tell_problems(warnings, stream=sys.stderr, source=workflow.text)
    if plan.unavailable:
        raise errors.NotAvailable(
            "This workflow cannot run yet:" + "".join(f"\n  {sentence}" for sentence in plan.unavailable),
            hint="It is valid, and `gorgon graph` shows it; remove these steps to run the rest.",
        )
    return plan


def plan_of(services: Services, run_id: str) -> Plan:
    """Return the stored plan of a run.  Raises NotFound."""
    return services.knowledge.run(services.views.number(run_id)).plan


def vacate(services: Services, run_id: str) -> bool:
    """Release a run whose process was killed, instead of waiting for its lease to expire.

    Returns whether its process was dead.
    """
    home = services.knowledge.run(services.views.number(run_id)).info.home
    if not home or not is_deserted(home):
        return False
    services.store.vacate(home)
    return True


def require_keys(plan: Plan, settings: Settings) -> None:
    """Raise ConfigurationError naming the variables of all keys that the plan needs and that are not set."""
    needed = {str(node.queue) for node in plan.nodes} & SERVERS.keys()
    missing = [
        (name, server.key_variable)
        for name, server in sorted(SERVERS.items())
        if name in needed and server.key(settings) is None and not (server.keyless and server.url(settings))
    ]
    if missing:
        told = ", ".join(f"{variable} (for {name})" for name, variable in missing)
        raise errors.ConfigurationError(
            f"--live needs {told}, which {'is' if len(missing) == 1 else 'are'} not set.",
            hint="Export it or write it into .env; without --live the sandbox is used and no key is needed.",
        )


def run_embedded(
    services: Services,
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
    home = new_home()
    needed = {node.queue for node in plan.nodes if node.queue}
    served = sorted({*needed, queues.CONTROL})
    lazy.preload(CLIENTS[name] for name in served if name in CLIENTS)
    url = sandbox() if sandbox is not None else None
    embedded = lazy.load("gorgon_worker.embedded:embedded")
    slots = services.settings.slots
    with embedded(services, queues=served, slots=slots, home=home, target=target, sandbox_url=url) as runtime:
        submitted = _submitted(services, submit, home)
        if submitted.reused and not as_json:
            terminal.note(f"{submitted.reused} reused, {submitted.to_run} to run")
        view = choose_view(as_json=as_json, target=target)
        try:
            grace = services.settings.grace_seconds
            return follow(services, submitted.run_id, view, cancels=True, grace=grace, trouble=runtime.trouble)
        except BaseException as error:
            with suppress(errors.GorgonError):
                runtime.cancel(services.views.number(submitted.run_id))  # calls end though nothing can be stored
            final = runtime.machine.outage.final
            if isinstance(error, errors.GorgonError) and error is final:
                raise _resumable(error, submitted.run_id) from error
            _abandon(services, submitted.run_id)
            raise
        finally:
            view.close()


def _submitted(services: Services, submit: Callable[[str], Submitted], home: str) -> Submitted:
    """Submit a run; runs of killed processes on this machine do not keep it from its concurrency key."""
    try:
        submitted = submit(home)
    except errors.KeyTaken as taken:
        gone = [holder for holder in taken.held_by if vacate(services, holder)]
        if not gone:
            raise
        return submit(home)
    waits = services.run(submitted.run_id).get("waits_for")
    for holder in waits["held_by"] if waits else ():
        vacate(services, holder["run_id"])  # the sweep does the rest
    return submitted


def _resumable(error: errors.GorgonError, run_id: str) -> errors.GorgonError:
    hint = f"{error.hint} Then `gorgon runs resume {run_id}` continues the run."
    return type(error)(error.message, hint=hint)


def _abandon(services: Services, run_id: str) -> None:
    """Cancel a run that nothing watches any more (a closed pipe, an internal error), so that it spends nothing more."""
    until = time.monotonic() + _ABANDON
    with suppress(errors.GorgonError):
        services.cancel(run_id)
        while services.run(run_id)["status"] not in RUN_FINISHED and time.monotonic() < until:
            time.sleep(0.02)


def _detach(
    services: Services, plan: Plan, values: Mapping[str, Any], *, target: str, team: str | None, as_json: bool
) -> None:
    if services.settings.embedded:
        raise errors.ConfigurationError(
            "--detach leaves the run to a worker, but no worker can be reached: messages stay in this process.",
            hint="Set GORGON_REDIS_URL and start `gorgon worker`, or use --server.",
        )
    submitted = services.submit(plan, values, target=target, team=team)
    waits = services.run(submitted.run_id).get("waits_for")
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
        services = stack.enter_context(local_services(settings if detach else here(settings)))
        run_id = resolve_run(services, run)
        vacate(services, run_id)
        before = services.run(run_id)
        target = str(before.get("target") or "sandbox")
        plan = plan_of(services, run_id) if file is None else compile_file(services, find_workflow(file), quiet=as_json)
        if target == "live":
            require_keys(plan, settings)
        if detach:
            if settings.embedded:
                raise errors.ConfigurationError(
                    "--detach leaves the run to a worker, but no worker can be reached: messages stay in this process.",
                    hint="Set GORGON_REDIS_URL and start `gorgon worker`, or use --server.",
                )
            _left(services.resume(run_id, plan=plan).run_id, None, as_json=as_json)
        sandbox = own_sandbox(stack, settings, needed=target == "sandbox")
        document, interrupted = run_embedded(
            services,
            plan,
            lambda home: services.resume(run_id, plan=plan, home=home),
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


def worker(
    *,
    queues: Sequence[str] | None,
    slots: int | None,
    live: bool,
    events: bool | None = None,
    metrics_port: int | None = None,
) -> None:
    """Run steps from the broker until stopped."""
    settings = get_settings()
    known = lazy.load("gorgon_common.queues:ALL")
    unknown = [name for name in queues or () if name not in known]
    if unknown:
        raise errors.InputInvalid(f"There is no queue {unknown[0]!r}.", hint=f"Queues: {', '.join(known)}.")
    if settings.embedded:
        raise errors.ConfigurationError(
            "A worker needs a broker that others can reach.",
            hint="Set GORGON_REDIS_URL, for example to redis://127.0.0.1:6379/0. `gorgon run` needs none.",
        )
    lazy.load("gorgon_worker.worker:main")(
        queues=list(queues or known),
        slots=slots or settings.slots,
        target="live" if live else "sandbox",
        events=settings.flower_events if events is None else events,
        metrics_port=settings.metrics_port if metrics_port is None else metrics_port,
    )
