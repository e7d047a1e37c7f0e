"""`gorgon demo`: demonstrations of about a minute each, offline on the sandbox."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from gorgon_common import lazy
from gorgon_common.application.runs import Submitted
from gorgon_common.cli import terminal
from gorgon_common.cli.backends import local_session
from gorgon_common.cli.in_process import compile_file, here, own_sandbox, run_embedded, vacate
from gorgon_common.cli.outline import elapsed
from gorgon_common.cli.runs import conclude
from gorgon_common.cli.screen import cut_lines, ending
from gorgon_common.cli.sources import Workflow, find_workflow
from gorgon_common.clock import SYSTEM_CLOCK
from gorgon_common.errors import InputInvalid, Unavailable
from gorgon_common.settings import Settings, get_settings

_FAN = 8
_KILL_AFTER = 3
"""Number of finished steps after which `demo resume` kills the run: plan, checkpoint, build."""

_PARALLEL = """
name: {name}
steps:
  - id: look
    role: analyst
    map: {{over: ["orders", "refunds", "stock", "prices", "clicks", "mails", "calls", "returns"], as: topic,
          max_parallel: {lanes}}}
    prompt: "What stands out in this week's {{{{topic}}}}?"
  - id: report
    role: reporter
    prompt: "Bring this together: {{{{look.output}}}}"
outputs: {{report: "{{{{report.summary}}}}"}}
"""

_ROLES = """
name: three-roles
inputs:
  request: {type: string, default: "Customers can export their orders as CSV"}
steps:
  - {id: plan, role: planner, prompt: "Plan this: {{inputs.request}}"}
  - {id: build, role: builder, prompt: "Build this: {{plan.output}}"}
  - {id: review, role: reviewer, prompt: "Review the code from {{build.output}}"}
outputs: {planner: "{{plan.output}}", builder: "{{build.output}}", reviewer: "{{review.output}}"}
"""

_TOPICS = ("orders", "refunds", "stock", "prices", "clicks", "mails", "calls", "returns")
_TIGHT_USD, _WIDE_USD = 0.035, 0.5

_LIMITED_MODEL, _LIMIT, _CALLS = "gpt-5-mini", 120, 24
_LIMITS = f"""
name: many-at-once
inputs: {{parts: {{type: array, default: {list(range(1, _CALLS + 1))}}}}}
steps:
  - id: ask
    provider: openai
    model: {_LIMITED_MODEL}
    max_tokens: 200
    map: {{over: "{{{{inputs.parts}}}}", as: part, max_parallel: {_CALLS}}}
    prompt: "Sum up part {{{{part}}}}."
"""

_INTRODUCTION = """\
A planner splits a request into tasks, builders work on them side by side, a tester and a security auditor
look at the result together, a reviewer decides, a documenter writes it up. It runs offline: the sandbox
stands in for OpenAI and Anthropic with invented replies; everything else is real.
"""


def demo(which: str) -> None:
    """Run one of the demonstrations."""
    shows = {
        "": _feature,
        "parallel": _parallel,
        "cost": _cost,
        "limits": _limits,
        "roles": _roles,
        "resume": _resume,
    }
    if which not in shows:
        raise InputInvalid(
            f"There is no demo {which!r}.",
            hint=f"Demos: {', '.join(name for name in shows if name)}; or no name at all.",
        )
    shows[which]()


def _say(text: str) -> None:
    terminal.draw(lazy.load("rich.text:Text").from_markup(text))


@contextmanager
def _sandbox(settings: Settings) -> Iterator[Callable[[], str]]:
    """A sandbox for a whole demonstration; yields a function that waits for its address."""
    with ExitStack() as stack:
        sandbox = own_sandbox(stack, settings, needed=True)
        assert sandbox is not None  # it is needed
        yield sandbox


def _run(
    settings: Settings,
    sandbox: Callable[[], str],
    workflow: Workflow,
    *,
    resumed: str | None = None,
    may_fail: bool = False,
) -> dict[str, Any]:
    """Run a workflow, or resume a run with it, with its own session and worker; returns the finished run.

    A failed run ends the demonstration unless `may_fail` is set.
    """
    with local_session(here(settings)) as session:
        plan = compile_file(session, workflow)
        if resumed is not None:
            vacate(session, resumed)

        def submit(home: str) -> Submitted:
            if resumed is not None:
                return session.resume(resumed, plan=plan, home=home)
            return session.submit(plan, {}, target="sandbox", home=home)

        document, interrupted = run_embedded(session, plan, submit, target="sandbox", sandbox=sandbox)
    if interrupted or (document["status"] != "succeeded" and not may_fail):
        conclude(document, left=interrupted, full=False, as_json=False)
    return document


def _feature() -> None:
    _say("[bold]A team of agents builds a feature.[/]")
    _say(_INTRODUCTION)
    settings = get_settings()
    with _sandbox(settings) as sandbox:
        document = _run(settings, sandbox, find_workflow("feature-build"))
    conclude(document, left=False, full=False, as_json=False)
    steps = (
        ("gorgon runs show last --step plan", "what the planner said"),
        ("gorgon workflows show feature-build", "the file behind it"),
        ("gorgon demo parallel | cost | limits …", "more to see"),
        ("gorgon init", "your own workflow"),
    )
    _say("\n[bright_black]What next[/]")
    for command, what in steps:
        _say(f"  {command:<39} [bright_black]{what}[/]")


def _parallel() -> None:
    _say(f"[bold]In parallel instead of one after the other.[/]  {_FAN} analysts, then a reporter, 400 ms a call.\n")
    settings = get_settings().model_copy(update={"sandbox_latency": 0.4})
    with _sandbox(settings) as sandbox:
        for sdk in ("openai", "anthropic"):
            lazy.load(sdk)  # the first import takes seconds and would distort the comparison
        times = []
        for name, lanes in (("one-after-the-other", 1), ("side-by-side", _FAN)):
            document = _run(settings, sandbox, Workflow(_PARALLEL.format(name=name, lanes=lanes), name))
            times.append(elapsed(document, SYSTEM_CLOCK.now()) or 0.0)
            _say("")
    serial, parallel = times
    _say(f"One after the other   {terminal.seconds(serial):>8}")
    faster = f"{serial / max(parallel, 0.001):.1f} times as fast"
    _say(f"In parallel           {terminal.seconds(parallel):>8}   [green]{faster}[/]")
    _say("\nThe only difference in the file is [bold]max_parallel[/] of the map.")


def _cost() -> None:
    _say(f"[bold]A budget that stops a run.[/]  {len(_TOPICS)} reports; the file says budget_usd: {_TIGHT_USD}.")
    _say("The most that a call can cost is reserved before it is made, so the limit cannot be exceeded.\n")
    settings = get_settings()
    with _sandbox(settings) as sandbox:
        stopped = _run(settings, sandbox, _reports(_TIGHT_USD), may_fail=True)
        terminal.say()
        terminal.draw(ending(stopped, full=False, now=SYSTEM_CLOCK.now()))
        done = sum(step["status"] == "succeeded" for step in stopped["steps"])
        _say(f"\nThe next report could have exceeded the limit, so it was not requested; {done} are paid for and kept.")
        _say(f"Raise the limit to {terminal.money(_WIDE_USD)} and continue:\n")
        finished = _run(settings, sandbox, _reports(_WIDE_USD), resumed=stopped["run_id"])
    _say(f"\n[green]✓[/] finished as {finished['run_id']}")
    _say(f"  the stopped run cost  {terminal.cost(stopped)}, of {terminal.money(_TIGHT_USD)}")
    _say(f"  the rest cost         {terminal.cost(finished)}")
    _say("\n[bright_black]gorgon plan FILE says before a run what it will cost; gorgon costs report what was spent.[/]")


def _reports(usd: float) -> Workflow:
    steps = "".join(
        f'  - {{id: {topic}, role: reporter, max_tokens: 2000, prompt: "Report on this week\'s {topic}."'
        + (f", depends_on: {before}}}\n" if before else "}\n")
        for before, topic in zip(("", *_TOPICS), _TOPICS, strict=False)
    )
    return Workflow(f"name: weekly-reports\nlimits: {{budget_usd: {usd}}}\nsteps:\n{steps}", "weekly-reports")


def _limits() -> None:
    _say(
        f"[bold]{_CALLS} calls at once, where the provider lets in {_LIMIT} a minute.[/]  Twice; it is overloaded, too."
    )
    _say("Nothing is configured: the provider's replies state the limit, and the workers share what they learn.\n")
    settings = get_settings().model_copy(update={"sandbox_url": None})  # this sandbox is configured to misbehave
    rule = {"provider": "openai", "model": _LIMITED_MODEL}
    told = []
    with _sandbox(settings) as sandbox:
        _tell(sandbox(), "/_limits", {**rule, "requests": _LIMIT, "burst": 0.05})
        _tell(sandbox(), "/_faults", {**rule, "status": 503, "after": 30, "times": 2})
        before: Counter[int] = Counter()
        for which in ("The first time", "The second time"):
            document = _run(settings, sandbox, Workflow(_LIMITS, "many-at-once"))
            terminal.say()
            counts = Counter(entry["status"] for entry in _tell(sandbox(), "/_log")["entries"])
            told.append((which, counts - before, elapsed(document, SYSTEM_CLOCK.now()) or 0.0))
            before = counts
    for which, seen, seconds in told:
        line = (
            f"{seen[200]} done in {terminal.seconds(seconds)}, {seen[429]} refused as too many, {seen[503]} overloaded"
        )
        _say(f"[green]✓[/] {which:<16} {line}")
    _say(
        "\nThe first calls found the limit; after that each call waits until there is room, without occupying"
        " a worker's slot."
    )
    _say(
        "[bright_black]gorgon limits ls: what is left of each quota; gorgon runs explain last: where the time went.[/]"
    )


def _tell(url: str, path: str, rule: Any = None) -> Any:
    """Send a control request to the sandbox, optionally with a rule to set."""
    body = None if rule is None else json.dumps(rule).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
    with opener.open(urllib.request.Request(url + path, data=body), timeout=10) as reply:
        return json.load(reply)


def _roles() -> None:
    _say("[bold]The same request, three roles.[/]  Each has its own prompt, model and output format.\n")
    settings = get_settings()
    with _sandbox(settings) as sandbox:
        document = _run(settings, sandbox, Workflow(_ROLES, "three-roles"))
    for role, answer in (document["outputs"] or {}).items():
        _say(f"\n[bold]{role}[/]")
        lines, more = cut_lines(answer, full=False)
        for line in lines:
            terminal.say(f"  {line}")
        if more:
            _say(f"  [bright_black]… {more}[/]")
    _say("\n[bright_black]`gorgon roles show planner` prints a role's prompt and the schema of its answer.[/]")


def _resume() -> None:
    _say("[bold]A run is killed in the middle, and continued.[/]")
    _say("A second process runs feature-build; when the builders have finished, it is killed with SIGKILL.\n")
    settings = get_settings().model_copy(update={"sandbox_latency": 0.6})
    with _sandbox(settings) as sandbox:
        run_id = _killed_run(sandbox())
        with local_session(here(settings)) as session:
            before = session.run(run_id, steps=True)
        paid = sum(step["kind"] == "agent" and step["status"] == "succeeded" for step in before["steps"])
        _say(f"Killed {run_id}: {paid} agents had finished and are paid for. Resuming the run here.\n")
        document = _run(settings, sandbox, find_workflow("feature-build"), resumed=run_id)
    terminal.say()
    _say(f"[green]✓[/] finished as {document['run_id']}")
    _say(f"  the killed run cost   {terminal.cost(before)}")
    _say(f"  the rest cost         {terminal.cost(document)}")
    _say("  finished steps were taken over from their checkpoints and not paid for again")


def _killed_run(url: str) -> str:
    """Run feature-build in a separate process and kill it; returns the run's id."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gorgon_common.cli", "run", "feature-build"],
        env={**os.environ, "GORGON_SANDBOX_URL": url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None  # it is a pipe
    run_id, finished = "", 0
    try:
        for line in process.stdout:
            words = line.split()
            if not run_id and words and words[0].startswith("run_"):
                run_id = words[0]
            terminal.say(f"  {line.rstrip()}")
            finished += len(words) > 1 and words[1] == "succeeded" and "[" not in words[0]
            if finished >= _KILL_AFTER:
                break
    finally:
        os.kill(process.pid, signal.SIGKILL)
        _, said = process.communicate()
    if not run_id:
        raise Unavailable(f"The second process did not start a run. {said.strip()}")
    terminal.say()
    return run_id
