"""What several suites of the store share: an empty database of each kind, and two processes' stores on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gorgon_common.persistence.store import Store
from tests.support import servers
from tests.support.engine import Desk, empty, open_store


@pytest.fixture(scope="module")
def one_postgres(postgres_admin: str) -> Iterator[tuple[Store, Store]]:
    """Two stores on one database that is emptied after each test: to make one takes longer than most tests."""
    with servers.fresh_database(postgres_admin) as url:
        stores = open_store(url), open_store(url)
        yield stores
        for store in stores:
            store.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def stores(request: pytest.FixtureRequest) -> Iterator[tuple[Store, Store]]:
    """Two processes' stores on one empty database."""
    if request.param == "sqlite":
        url = request.getfixturevalue("sqlite_url")
        made = open_store(url), open_store(url)
        yield made
        for store in made:
            store.close()
        return
    made = request.getfixturevalue("one_postgres")
    yield made
    empty(made[0])


@pytest.fixture
def desks(stores: tuple[Store, Store]) -> tuple[Desk, Desk]:
    """The same as desks of workers."""
    return Desk(stores[0]), Desk(stores[1])
