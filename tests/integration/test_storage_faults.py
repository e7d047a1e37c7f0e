"""A PostgreSQL that is there and cannot store anything is Unavailable, whatever its driver calls the error."""

from __future__ import annotations

import psycopg
import pytest
from sqlalchemy import text

from gorgon_common.errors import StorageFault
from gorgon_common.persistence.database import Database

FAILING = """
CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'could not extend file "base/1/2": No space left on device' USING ERRCODE = '{code}'; END $$;
CREATE TABLE notes (note text);
CREATE TRIGGER failing BEFORE INSERT ON notes EXECUTE FUNCTION fail();
"""


@pytest.mark.parametrize(("code", "words"), [("53100", "is full"), ("58030", "reports an error")])
def test_a_disk_of_the_server_that_takes_nothing(postgres_url: str, code: str, words: str) -> None:
    database = Database(postgres_url)
    try:
        with database.write() as connection:
            connection.execute(text(FAILING.format(code=code).replace(":", r"\:")))
        with pytest.raises(StorageFault, match=words) as caught, database.write() as connection:
            connection.execute(text("INSERT INTO notes VALUES ('a')"))
        assert caught.value.hint
    finally:
        database.close()


def create(database: Database, *, past_sqlalchemy: bool) -> None:
    with database.write() as connection:
        connection.execute(text("SET TRANSACTION READ ONLY"))
        if past_sqlalchemy:  # as the busiest statements go
            driver = connection.connection.driver_connection
            assert isinstance(driver, psycopg.Connection)
            driver.execute("CREATE TABLE notes (note text)")
        else:
            connection.execute(text("CREATE TABLE notes (note text)"))


@pytest.mark.parametrize("past_sqlalchemy", [False, True])
def test_a_server_that_became_read_only(postgres_url: str, past_sqlalchemy: bool) -> None:
    database = Database(postgres_url)
    try:
        with pytest.raises(StorageFault, match="read-only"):
            create(database, past_sqlalchemy=past_sqlalchemy)
    finally:
        database.close()
