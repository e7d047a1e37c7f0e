"""The migrations make exactly the tables that the code knows, on both databases, once, whoever else migrates."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg import sql
from sqlalchemy import insert, inspect, select, text

from gorgon_common.engine.records import ClaimCapacity, Finish, Result, step_id
from gorgon_common.engine.states import StepStatus
from gorgon_common.errors import ConfigurationError, Unavailable
from gorgon_common.persistence import migrate
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.store import Store
from gorgon_common.persistence.tables import metadata
from tests.support import servers
from tests.support.engine import NOW, OPENAI, new_run

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


# Upgrades of a database in which there is something

OLDER = [f"{number:04d}" for number in range(1, int(migrate.HEAD))]
DONE, READY = step_id(1, 0), step_id(1, 1)
ROWS: dict[str, list[dict[str, Any]]] = {
    "plans": [{"hash": "p", "body": '{"nodes": []}', "created_at": NOW}],
    "runs": [
        {"id": 1, "public_id": "run_1", "team": "blue", "workflow": "w", "plan_hash": "p", "inputs": '{"a": 1}',
         "target": "sandbox", "home": "", "root_id": 1, "status": 1, "active": True, "cancelled": False, "next_row": 2,
         "idempotency_key": "k", "request_hash": "h", "created_at": NOW, "max_parallel": 3, "trace_id": "0" * 32}
    ],
    "run_slots": [{"run_id": 1, "holders": "[]"}],
    "steps": [
        {"id": key, "due": NOW, "token": 1, "node": number, "deps_left": 0, "status": status, "attempt": 1,
         "crashes": 0, "weight": 1, "queue": OPENAI, "grouped": False, "carried": False, "successors": after}
        for number, (key, status, after) in enumerate([(DONE, 5, [1]), (READY, 1, [])])
    ],
    "checkpoints": [
        {"step_id": DONE, "status": 5, "attempts": 1, "started_at": NOW, "finished_at": NOW, "output": '{"b": [1]}',
         "detail": '{"provider": "openai"}'}
    ],
    "fingerprints": [{"root_id": 1, "hash": "f", "step_id": DONE}],
    "events": [{"run_id": 1, "row": 0, "kind": "step.succeeded", "at": NOW}],
    "ledger": [
        {"step_id": DONE, "token": 1, "ordinal": 1, "at": NOW, "provider": "openai", "model": "m", "role": None,
         "attempt": 1, "input_tokens": 7, "cache_read_tokens": 0, "cache_write_tokens": 0, "output_tokens": 3,
         "reasoning_tokens": 0, "cost_micro": 42, "price_version": "1", "latency_ms": 5, "outcome": "ok"}
    ],
    "workers": [
        {"id": 7, "name": "old", "target": "sandbox", "home": "", "queues": "0", "slots": 1, "started_at": NOW,
         "lease_until": NOW, "reaped": False}
    ],
    "backlog": [{"queue": OPENAI, "rank": 4, "step_id": READY}],
    "shares": [{"queue": OPENAI, "team": "blue", "next_rank": 5}],
    "leaders": [{"name": "sweep", "owner": "x", "until": NOW}],
    "concurrency_keys": [{"id": 3, "target": "sandbox", "digest": "d", "shown": "deploy"}],
    "concurrency_places": [{"run_id": 1, "key_id": 3, "state": 2, "most": 1, "on_conflict": "queue"}],
    "budgets": [
        {"id": 5, "scope": "team", "name": "blue", "period": "month", "timezone": "UTC", "usd_limit": 100,
         "token_limit": None, "updated_at": NOW}
    ],
    "budget_periods": [
        {"id": 6, "key": "budget:5:live:2026-01", "budget_id": 5, "level": 20, "label": "l", "usd_limit": 100,
         "usd_wall": 100, "usd_spent": 42, "usd_reserved": 10}
    ],
    "reservations": [
        {"step_id": READY, "token": 1, "ordinal": 1, "at": NOW, "state": 0, "usd": 10, "tokens": 0, "max_tokens": 9,
         "accounts": [6]}
    ],
    "postings": [
        {"period_id": 6, "step_id": READY, "token": 1, "ordinal": 1, "kind": 0, "usd_reserved": 10, "usd_spent": 0,
         "usd_overrun": 0, "token_reserved": 0, "token_spent": 0, "token_overrun": 0, "at": NOW}
    ],
    "limit_rules": [{"provider": "openai", "model": "*", "body": '{"requests": 1}', "at": NOW}],
    "token_ratios": [
        {"target": "live", "provider": "openai", "model": "m", "calls": 2, "log_ratio": 0.5, "log_square": 0.25,
         "updated_at": NOW}
    ],
    "run_events": [{"id": 2, "run_id": 1, "name": "go", "at": NOW, "data": "1"}],
}  # fmt: skip


def filled(database: Database) -> dict[str, list[str]]:
    """Insert rows into the tables and columns that this revision has; returns these columns."""
    known: dict[str, list[str]] = {}
    with database.write() as connection:
        look = inspect(connection)
        for name in sorted(set(ROWS) & set(look.get_table_names())):
            there = {column["name"] for column in look.get_columns(name)}
            rows = [{key: value for key, value in entry.items() if key in there} for entry in ROWS[name]]
            connection.execute(insert(metadata.tables[name]), rows)
            known[name] = sorted(there & {column.name for column in metadata.tables[name].c})
    return known


def stored(database: Database, known: dict[str, list[str]]) -> dict[str, list[str]]:
    with database.read() as connection:
        return {
            name: sorted(repr(tuple(row)) for row in connection.execute(
                select(*[metadata.tables[name].c[column] for column in columns])))
            for name, columns in known.items()
        }  # fmt: skip


@pytest.mark.parametrize("revision", OLDER)
def test_an_upgrade_from_every_revision_keeps_what_is_stored(empty_url: str, revision: str) -> None:
    database = Database(empty_url, pool_size=2)
    migrate._alembic(database, "upgrade", revision)
    known = filled(database)
    before = stored(database, known)
    assert migrate.upgrade(empty_url) == revision
    changed = {"steps"} if revision < "0011" else set()  # that one marks the joins that wait
    after = stored(database, known)
    assert {name for name in known if before[name] != after[name]} <= changed
    migrate.check(database)
    assert differences(database) == []
    with contextlib.closing(Store(database)) as store:
        works_on(store)


def works_on(store: Store) -> None:
    """The engine goes on with the run where it was."""
    info = store.info(1)
    assert (info.public_id, info.org, info.team, info.inputs) == ("run_1", 1, "blue", {"a": 1})
    assert store.plan_body("p") == '{"nodes": []}'
    assert store.checkpoints([DONE])[DONE].output == {"b": [1]}
    again, created = store.create(new_run(idempotency_key="k", request_hash="h"), [])
    assert (again, created) == (1, False)
    worker = store.register("new", target="sandbox", home="", queues=[OPENAI], slots=1, lease=60)
    (step,) = store.claim_and_finish(worker, ClaimCapacity(pull=1)).mine
    assert (step.id, step.token) == (READY, 2)
    ended = store.claim_and_finish(worker, ClaimCapacity(), finishes=[Finish(step, Result(StepStatus.SUCCEEDED))])
    assert not ended.refused
    assert store.states([READY])[READY][0] == StepStatus.SUCCEEDED
