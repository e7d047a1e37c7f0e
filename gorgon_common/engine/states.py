"""The states of a step and of a run, and every transition between them.

Steps::

    pending → ready → running → succeeded | failed | skipped | cancelled
              running → ready | waiting | in_doubt
              waiting → ready | succeeded | failed | skipped
              in_doubt → ready | succeeded | skipped | failed
    pending | ready → skipped | failed          (conditions, propagated skips, deadlines)
    any unfinished state → cancelled

Runs::

    queued → running ⇄ paused → finishing → succeeded | failed | cancelled
    running → succeeded | failed                (no step has failed, so there was nothing to stop)
    queued | running | paused → failed | cancelled    (the process that ran it has died)
    queued → cancelled                          (it never held its concurrency key, so nothing has to finish)

A run that waits for its concurrency key is queued.

A finished state is written once.  The database stores these numbers: do not renumber them.
"""

from __future__ import annotations

from enum import IntEnum


class StepStatus(IntEnum):
    """The state of a step."""

    PENDING = 0  # waits for its dependencies
    READY = 1  # may be claimed by a worker
    RUNNING = 2  # claimed: `owner` holds it under `token`
    WAITING = 3  # occupies no worker: waits for a retry, for its children, …
    IN_DOUBT = 4  # it is unknown whether its effect happened
    SUCCEEDED = 5
    FAILED = 6
    SKIPPED = 7
    CANCELLED = 8


class RunStatus(IntEnum):
    """The state of a run."""

    QUEUED = 0  # no step has started yet; the run may be waiting for its concurrency key
    RUNNING = 1
    PAUSED = 2
    FINISHING = 3  # only on_error and finally steps may still run
    SUCCEEDED = 4
    FAILED = 5
    CANCELLED = 6


S = StepStatus

FINISHED_STEP = frozenset({S.SUCCEEDED, S.FAILED, S.SKIPPED, S.CANCELLED})
FINISHED_RUN = frozenset({RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED})

STEP_TRANSITIONS: dict[StepStatus, frozenset[StepStatus]] = {
    S.PENDING: frozenset({S.READY, S.RUNNING, S.SKIPPED, S.FAILED, S.CANCELLED}),
    S.READY: frozenset({S.RUNNING, S.SKIPPED, S.FAILED, S.CANCELLED, S.SUCCEEDED}),
    S.RUNNING: frozenset({S.READY, S.WAITING, S.IN_DOUBT, S.SUCCEEDED, S.FAILED, S.SKIPPED, S.CANCELLED}),
    S.WAITING: frozenset({S.READY, S.RUNNING, S.SUCCEEDED, S.FAILED, S.SKIPPED, S.CANCELLED}),
    S.IN_DOUBT: frozenset({S.READY, S.SUCCEEDED, S.SKIPPED, S.FAILED, S.CANCELLED}),
    S.SUCCEEDED: frozenset(),
    S.FAILED: frozenset(),
    S.SKIPPED: frozenset(),
    S.CANCELLED: frozenset(),
}
"""`pending → running` and `waiting → running` are `→ ready → running` in one transaction (the hand-over); `ready →
succeeded` is a late finish after the lease expired, for a step that no worker has claimed since.
"""

_DIED = (RunStatus.FAILED, RunStatus.CANCELLED)
"""The process that ran it has died; the run is cancelled if the user asked for that, and failed otherwise."""

RUN_TRANSITIONS: dict[RunStatus, frozenset[RunStatus]] = {
    RunStatus.QUEUED: frozenset({RunStatus.RUNNING, RunStatus.FINISHING, *_DIED}),
    RunStatus.RUNNING: frozenset({RunStatus.PAUSED, RunStatus.FINISHING, RunStatus.SUCCEEDED, *_DIED}),
    RunStatus.PAUSED: frozenset({RunStatus.RUNNING, RunStatus.FINISHING, *_DIED}),
    RunStatus.FINISHING: FINISHED_RUN,
    RunStatus.SUCCEEDED: frozenset(),
    RunStatus.FAILED: frozenset(),
    RunStatus.CANCELLED: frozenset(),
}
