"""SQLite and PostgreSQL do the same, whatever happens: random histories, given to both at the same moments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from gorgon_common.persistence import claim_and_finish_sqlite, functions
from tests.support import servers
from tests.support.histories import Difference, History
from tests.support.twins import Twin

HISTORIES = 2000
PARTS = 8
COMMANDS = 14


@pytest.fixture(scope="module")
def twins(sqlite_template: Path, postgres_admin: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Twin]]:
    path = tmp_path_factory.mktemp("twins") / "gorgon.db"
    path.write_bytes(sqlite_template.read_bytes())
    with servers.fresh_database(postgres_admin) as url:
        made = [Twin(f"sqlite:///{path}"), Twin(url)]
        yield made
        for twin in made:
            twin.store.close()


@pytest.mark.parametrize("part", range(PARTS))
def test_random_histories(twins: list[Twin], part: int) -> None:
    for seed in range(part, HISTORIES, PARTS):
        History(twins, seed).run(COMMANDS)


# The histories find what they are for: three differences, planted one at a time.


def found(twins: list[Twin], *, within: int = HISTORIES) -> str:
    """Return the first difference that the histories find."""
    for seed in range(within):
        try:
            History(twins, seed).run(COMMANDS)
        except Difference as difference:
            return str(difference)
    raise AssertionError(f"{within} histories found nothing")


@contextlib.contextmanager
def planted(twin: Twin, before: str, after: str) -> Iterator[None]:
    """Put something else into the SQL functions of a database."""
    source = functions.source()
    assert source.count(before) == 1
    with contextlib.closing(twin.database.connect()) as connection:
        connection.execute(source.replace(before, after))
        try:
            yield
        finally:
            connection.execute(source)


def test_a_suspect_that_is_pulled_unasked_is_found(twins: list[Twin]) -> None:
    with planted(twins[1], "p_suspects OR (SELECT s.crashes < 2 FROM steps s WHERE s.id = b.step_id)", "true"):
        assert "suspects False" in found(twins)


def test_room_that_is_given_to_a_later_step_is_found(twins: list[Twin]) -> None:
    with planted(twins[1], "AND w.step_id < p_step AND", "AND"):
        assert "reserve" in found(twins)


def test_a_place_that_is_counted_twice_is_found(twins: list[Twin], monkeypatch: pytest.MonkeyPatch) -> None:
    pull = claim_and_finish_sqlite._Taker.pull
    monkeypatch.setattr(
        claim_and_finish_sqlite._Taker, "pull", lambda self, brought, **given: pull(self, brought + 1, **given)
    )
    assert "pull" in found(twins)
