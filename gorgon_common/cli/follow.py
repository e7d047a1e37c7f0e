"""Follows a run to its end, wherever it runs; Ctrl-C ends the run or only the watching."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

from gorgon_common import errors
from gorgon_common.cli import terminal
from gorgon_common.cli.screen import View
from gorgon_common.client.http import Client
from gorgon_common.client.schemas import RUN_FINISHED

_FASTEST, _SLOWEST = 0.08, 2.0
_PATIENCE = 30.0
"""Seconds for which a server may be unreachable before following ends."""
_UNCLAIMED = 5.0
"""Seconds after which a message points out that no worker has begun the run."""


class Runs(Protocol):
    """The source of a run: `application.session.Session`, or `client.http.Client`."""

    def run(self, run_id: str, *, steps: bool = False) -> dict[str, Any]:
        """Return one run."""
        ...

    def cancel(self, run_id: str) -> dict[str, Any]:
        """Request the cancellation of the run."""
        ...


Wait = Callable[[float], None]
"""Waits that many seconds, or less if something happens."""


class Interrupts:
    """Counts Ctrl-C (and SIGTERM); the second one exits immediately."""

    def __init__(self, last_words: Callable[[], None]) -> None:
        self.count = 0
        self._first = 0.0
        self._last_words = last_words

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        """Record an interrupt."""
        self.count += 1
        if self.count > 1:
            self._leave()
        self._first = time.monotonic()

    def leave_after(self, seconds: float) -> None:
        """Exit if the first interrupt was that long ago."""
        if self.count and time.monotonic() - self._first > seconds:
            self._leave()

    def _leave(self) -> None:
        self._last_words()
        # A call in flight that cannot be aborted would keep the interpreter waiting for its thread.
        os._exit(terminal.EXIT_INTERRUPTED)


@contextmanager
def interrupts(last_words: Callable[[], None]) -> Iterator[Interrupts]:
    """Count interrupts instead of raising KeyboardInterrupt, in the main thread only."""
    counter = Interrupts(last_words)
    if threading.current_thread() is not threading.main_thread():
        yield counter
        return
    before = {number: signal.signal(number, counter) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield counter
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def follow(
    runs: Runs,
    run_id: str,
    view: View,
    *,
    cancels: bool,
    wait: Wait = time.sleep,
    expect_worker: bool = False,
    grace: float | None = None,
    trouble: Callable[[], str] = lambda: "",
) -> tuple[dict[str, Any], bool]:
    """Show a run until it has finished; returns the run with its steps, and whether it was interrupted.

    `cancels`: Ctrl-C ends the run; otherwise it only ends the watching, and the run is returned unfinished.
    `expect_worker`: the run needs a worker elsewhere; say so if none takes it.  `grace`: seconds after which an
    interrupted run that has not ended is left behind; None for never.  `trouble`: returns what keeps this process from
    going on with the run, in a sentence, or raises if it cannot go on.
    """
    begun = reached = time.monotonic()
    said = ""

    def say(text: str) -> None:
        nonlocal said
        if text != said:
            said = text
            view.say(text)

    asked = False
    with interrupts(view.close) as counter:
        while True:
            before = time.monotonic()
            if grace is not None:
                counter.leave_after(grace)
            wrong = trouble()
            try:
                run = runs.run(run_id, steps=True)
                reached = time.monotonic()
            except errors.Unavailable:
                if time.monotonic() - reached > _PATIENCE:
                    raise
                say("The connection is lost; trying again…")
                wait(_SLOWEST)
                continue
            view.update(run)
            if run["status"] in RUN_FINISHED:
                return run, counter.count > 0
            if counter.count and not cancels:
                return run, True
            if run.get("orphaned") and not cancels:
                return run, True
            if counter.count:
                say("Cancelling: waiting for calls in flight. Press Ctrl-C again to leave immediately.")
                asked = asked or _cancel(runs, run_id)
            elif wrong:
                say(wrong)
            else:
                begun = begun if not run.get("waits_for") else time.monotonic()
                say(_remark(run, time.monotonic() - begun if expect_worker else 0.0))
            # The cost of a poll determines the interval: a run of ten thousand steps is polled less often.
            wait(min(_SLOWEST, max(_FASTEST, 8 * (time.monotonic() - before))))


def _remark(run: Mapping[str, Any], unclaimed: float) -> str:
    """Return what keeps a run from starting; `unclaimed`: seconds for which a worker could have claimed it."""
    if run.get("waits_for"):
        return f"The run {run['waits_for']['what']}."
    if unclaimed > _UNCLAIMED and _untouched(run):
        return "No worker has taken it yet. Is one running? `gorgon worker` starts one."
    return ""


def _untouched(run: Mapping[str, Any]) -> bool:
    return all(step["status"] in ("pending", "ready") for step in run.get("steps") or ())


def _cancel(runs: Runs, run_id: str) -> bool:
    """Ask the run to end; returns whether that was understood."""
    try:
        runs.cancel(run_id)
    except errors.Conflict:
        return True  # the run ended before the request
    except errors.Unavailable:
        return False
    return True


class EventWait:
    """Waits for the next event of a run on a server, for at most the given time."""

    def __init__(self, client: Client, run_id: str) -> None:
        self._happened = threading.Event()
        thread = threading.Thread(target=self._listen, args=(client, run_id), name="gorgon-events", daemon=True)
        thread.start()

    def __call__(self, seconds: float) -> None:
        """Wait for an event, but at least for a short time."""
        time.sleep(min(seconds, _FASTEST))
        self._happened.wait(max(seconds, 1.0) - _FASTEST)
        self._happened.clear()

    def _listen(self, client: Client, run_id: str) -> None:
        try:
            with client.copy() as own:
                for _ in own.events(run_id):
                    self._happened.set()
        except errors.GorgonError:
            return  # polling continues and reports the error
        finally:
            self._happened.set()
