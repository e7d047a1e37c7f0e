"""Operations of the store are functions on a connection: a caller's own transaction can hold several of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, func, insert, select

from gorgon_common import telemetry
from gorgon_common.engine.records import ClaimCapacity, Finish, KeyRequest, Result, step_id
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.persistence import runs, tables, transitions
from gorgon_common.persistence.store import Store
from gorgon_common.scope import SYSTEM, Scope
from tests.support.engine import NOTHING, Desk, elapse, fan, new_run, row


class Undone(Exception):
    """The caller changes its mind."""


@contextlib.contextmanager
def undone(desk: Desk, scope: Scope = SYSTEM) -> Iterator[Connection]:
    """A transaction of the caller, who changes its mind at the end."""
    with contextlib.suppress(Undone), desk.store.database.write(scope) as connection:
        yield connection
        raise Undone


@pytest.fixture
def desk(stores: tuple[Store, Store]) -> Desk:
    return Desk(stores[0])


@pytest.fixture
def ended() -> Iterator[list[telemetry.RunEnded]]:
    """The ends of runs that were reported."""
    found: list[telemetry.RunEnded] = []

    def note(event: object) -> None:
        if isinstance(event, telemetry.RunEnded):
            found.append(event)

    telemetry.subscribe(note)
    yield found
    telemetry.unsubscribe(note)


def rows(desk: Desk) -> dict[str, int]:
    """Return how many rows each table has."""
    with desk.store.database.read() as connection:
        counts = {
            table.name: connection.scalar(select(func.count()).select_from(table)) or 0
            for table in tables.metadata.sorted_tables
        }
    return {name: count for name, count in counts.items() if name != "workers"}


def test_a_run_that_is_created_in_a_callers_transaction_goes_with_it(desk: Desk) -> None:
    before = rows(desk)
    new = new_run(hold=KeyRequest("k"), max_parallel=2, idempotency_key="i", request_hash="r")
    with undone(desk, Scope(7, actor="key:ops")) as connection:
        run, created = runs.create(connection, new, fan(3))
        assert created
        assert connection.scalar(select(tables.runs.c.org_id).where(tables.runs.c.id == run)) == 7
        assert runs.create(connection, new, fan(3)) == (run, False)
    assert rows(desk) == before
    assert desk.store.create(new, fan(3))[1]


def test_a_run_and_a_row_of_the_caller_are_committed_together(desk: Desk) -> None:
    with desk.store.database.write() as connection:
        run, _ = runs.create(connection, new_run(), [row(0)])
        connection.execute(insert(tables.run_events).values(run_id=run, name="mine", at=tables.db_now(), data="1"))
    assert [entry.name for entry in desk.all(tables.run_events, tables.run_events.c.run_id == run)] == ["mine"]
    assert desk.claim(run, 0)


def test_a_claim_and_its_end_that_are_rolled_back_did_not_happen(desk: Desk) -> None:
    run = desk.create([row(0, 1), row(1, deps=1)])
    before = rows(desk)
    with undone(desk) as connection:
        (step,) = transitions.claim_and_finish(connection, desk.worker, NOTHING, claims=[step_id(run, 0)]).mine
        done = Finish(step, Result(StepStatus.SUCCEEDED))
        after = transitions.claim_and_finish(connection, desk.worker, ClaimCapacity(0, 1), finishes=[done])
        assert [entry.row for entry in after.mine] == [1]
    assert rows(desk) == before
    assert list(desk.statuses(run).values()) == [StepStatus.READY, StepStatus.PENDING]


def test_every_end_of_a_run_is_reported_once_it_is_committed(desk: Desk, ended: list[telemetry.RunEnded]) -> None:
    """The last step ends it; it is stopped, or superseded, while it waits for its key; its process dies."""
    last = desk.create([row(0)], public_id="last")
    step = desk.one(last, 0)
    with undone(desk) as connection:
        runs.finish_run(
            connection, desk.worker, Finish(step, Result(StepStatus.SUCCEEDED)), status=RunStatus.SUCCEEDED,
            outputs=None, error=None,
        )  # fmt: skip
    assert ended == []
    desk.store.finish_run(
        desk.worker, Finish(step, Result(StepStatus.SUCCEEDED)), status=RunStatus.SUCCEEDED, outputs=None, error=None
    )
    hold = KeyRequest("k", on_conflict="cancel_running")
    desk.create([row(0)], hold=hold)
    desk.create([row(0)], hold=hold, public_id="superseded")
    stopped = desk.create([row(0)], hold=hold, public_id="stopped")
    desk.store.stop(stopped, gate=0, keeps=frozenset(), error=None, reason="r")
    other = Desk(desk.store, home="elsewhere")
    orphan = other.create([row(0)], public_id="orphan")
    elapse(desk.store, 100)
    assert desk.store.close_orphan(orphan)
    assert [(event.run.run_id, event.status) for event in ended] == [
        ("last", "succeeded"),
        ("superseded", "cancelled"),
        ("stopped", "cancelled"),
        ("orphan", "failed"),
    ]
