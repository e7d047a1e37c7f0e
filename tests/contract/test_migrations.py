"""The migrations make exactly the tables that the code knows, on both databases, once, whoever else migrates."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg import sql
from sqlalchemy import inspect, text

from gorgon_common.errors import ConfigurationError, Unavailable
from gorgon_common.persistence import migrate
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.tables import metadata
from tests.support import servers

FOLDER = Path(migrate.__file__).with_name("migrations")
_numbers = itertools.count()


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database with nothing in it."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'new' / 'gorgon.db'}"
        return
    admin = request.getfixturevalue("postgres_admin")
    name = f"gorgon_test_{os.getpid()}_empty{next(_numbers)}"
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        yield servers._with_database(admin, name)
        connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def differences(database: Database) -> list[object]:
    with database.read() as connection:
        options = {"compare_type": True, "target_metadata": metadata}
        context = MigrationContext.configure(connection, opts=options)
        return list(compare_metadata(context, metadata))


def test_head_is_the_newest_file() -> None:
    config = Config()
    config.set_main_option("script_location", str(FOLDER))
    scripts = ScriptDirectory.from_config(config)
    assert scripts.get_heads() == [migrate.HEAD]
    revisions = [entry.revision for entry in scripts.walk_revisions()]
    assert [
        path.name.partition("_")[0] for path in sorted((FOLDER / "versions").glob("*.py"), reverse=True)
    ] == revisions


def test_the_first_migration_is_written_out() -> None:
    """It must not change with the tables: a database that is there already would not change with it."""
    assert "metadata" not in (FOLDER / "versions" / "0001_first.py").read_text()


def test_a_migrated_database_has_the_tables_of_the_code(empty_url: str) -> None:
    assert migrate.upgrade(empty_url) == ""
    database = Database(empty_url)
    assert differences(database) == []
    assert migrate.current(database) == migrate.HEAD
    migrate.check(database)
    database.close()


def test_the_short_way_and_the_long_way_make_the_same_file(tmp_path: Path) -> None:
    """A new SQLite file does not pass through Alembic."""
    shapes = []
    for name in ("short", "long"):
        database = Database(f"sqlite:///{tmp_path / name}.db")
        migrate._create(database) if name == "short" else migrate._alembic(database, "upgrade")
        assert differences(database) == []
        with database.read() as connection:
            look = inspect(connection)
            shapes.append(
                {
                    table: (
                        {column["name"]: (str(column["type"]), column["nullable"], column["default"])
                         for column in look.get_columns(table)},
                        look.get_pk_constraint(table)["constrained_columns"],
                        sorted(str(sorted(entry["column_names"])) for entry in look.get_unique_constraints(table)),
                        sorted((entry["name"], tuple(entry["column_names"])) for entry in look.get_indexes(table)),
                    )
                    for table in look.get_table_names()
                }
            )  # fmt: skip
        database.close()
    assert shapes[0] == shapes[1]
    assert set(metadata.tables) < set(shapes[0])


def test_steps_leave_room_on_their_pages(postgres_url: str) -> None:
    """Every update of a step must fit beside it (HOT); Alembic does not compare that."""
    database = Database(postgres_url)
    with database.read() as connection:
        assert connection.scalar(text("select reloptions from pg_class where relname = 'steps'")) == ["fillfactor=70"]
    database.close()


def test_to_migrate_again_changes_nothing(empty_url: str) -> None:
    migrate.upgrade(empty_url)
    database = Database(empty_url)
    with database.write() as connection:
        connection.execute(text("insert into plans (hash, body, created_at) values ('x', '{}', '2026-01-01 00:00:00')"))
    assert migrate.upgrade(empty_url) == migrate.HEAD
    with database.read() as connection:
        assert connection.scalar(text("select count(*) from plans")) == 1
    database.close()


def test_two_processes_may_migrate_at_once(empty_url: str) -> None:
    code = "import sys; from gorgon_common.persistence import upgrade; sys.stdin.readline(); upgrade(sys.argv[1])"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, empty_url], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=60)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    database = Database(empty_url)
    assert differences(database) == []
    database.close()


def test_functions_of_another_version_are_replaced_by_an_upgrade(empty_url: str) -> None:
    migrate.upgrade(empty_url)
    database = Database(empty_url)
    if database.sqlite:
        migrate.check(database)
    else:
        with database.write() as connection:
            connection.execute(text("comment on function gorgon_claim_and_finish is 'older'"))
        with pytest.raises(ConfigurationError, match="SQL functions") as raised:
            migrate.check(database)
        assert "gorgon db upgrade" in raised.value.hint
        assert migrate.upgrade(empty_url) == migrate.HEAD
        migrate.check(database)
    database.close()


def test_everything_can_be_taken_back(empty_url: str) -> None:
    database = Database(empty_url, pool_size=1)
    migrate._alembic(database, "upgrade")
    migrate._alembic(database, "downgrade", "base")
    with database.read() as connection:
        assert set(inspect(connection).get_table_names()) <= {"alembic_version"}
    database.close()


def test_an_empty_or_older_database_is_told_apart(empty_url: str) -> None:
    database = Database(empty_url)
    assert migrate.current(database) is None
    with pytest.raises(ConfigurationError, match="at version none"):
        migrate.check(database)
    migrate.upgrade(empty_url)
    with database.write() as connection:
        connection.execute(text("update alembic_version set version_num = '0000'"))
    with pytest.raises(ConfigurationError, match="at version 0000") as raised:
        migrate.check(database)
    assert "gorgon db upgrade" in raised.value.hint
    database.close()


def test_a_database_that_is_away_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="cannot be used") as raised:
        migrate.upgrade("postgresql://nobody@127.0.0.1:1/none")
    assert "GORGON_DATABASE_URL" in raised.value.hint
