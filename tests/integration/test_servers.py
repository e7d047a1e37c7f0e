"""The test servers are the real ones, and fresh."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from tests.support import servers


def test_a_database_is_fresh_and_gone_afterwards(postgres_admin: str) -> None:
    with servers.fresh_database(postgres_admin) as url:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("create table mine (id int)")
        name = url.split("/")[3].split("?")[0]
    with servers.fresh_database(postgres_admin) as url, psycopg.connect(url) as connection:
        assert connection.execute("select to_regclass('mine')").fetchone() == (None,)
        query = "select count(*) from pg_database where datname = %s"
        assert connection.execute(query, [name]).fetchone() == (0,)


def test_the_test_server_does_not_sync(postgres_url: str) -> None:
    if os.environ.get(servers.POSTGRES_VARIABLE):
        pytest.skip("the server was given from outside")
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("show fsync").fetchone() == ("off",)


def test_a_server_of_ones_own_syncs() -> None:
    with servers.postgres(fsync=True) as url, psycopg.connect(url) as connection:
        assert connection.execute("show fsync").fetchone() == ("on",)
        pid = connection.info.backend_pid
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("unix", [False, True])
def test_redis_is_empty_and_never_evicts(unix: bool) -> None:
    with servers.redis_server(unix=unix) as url, redis.Redis.from_url(url) as client:
        assert client.dbsize() == 0
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        pid = client.info("server")["process_id"]
    assert not psutil.pid_exists(pid)


def test_redis_dies_with_its_owner(tmp_path: Path) -> None:
    program = """
        import sys, redis
        from tests.support import servers
        with servers.redis_server() as url, redis.Redis.from_url(url) as client:
            print(client.info("server")["process_id"], flush=True)
            sys.stdin.read()
    """
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=servers.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    server = psutil.Process(int(owner.stdout.readline()))
    owner.send_signal(signal.SIGKILL)
    server.wait(timeout=10)
    owner.communicate()


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setattr("sys.prefix", "/nowhere")
    with pytest.raises(servers.ServerMissing, match="apt-get install redis-server"):
        servers.redis_executable()


def test_a_template_that_was_left_half_made_is_made_again(postgres_admin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"gorgon_template_half_{os.getpid()}"
    monkeypatch.setattr(servers, "_TEMPLATE", name)
    with psycopg.connect(postgres_admin, autocommit=True) as connection:
        connection.execute(f"create database {name}")
        try:
            assert servers.ensure_template(postgres_admin) == name
            with servers.fresh_database(postgres_admin) as url, psycopg.connect(url) as fresh:
                tables = fresh.execute("select count(*) from pg_tables where schemaname = 'public'").fetchone()
                assert tables is not None
                assert tables[0] > 3
        finally:
            connection.execute(f"alter database {name} is_template false")
            connection.execute(f"drop database {name} with (force)")
