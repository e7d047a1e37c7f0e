"""Fixtures of the whole suite: a clean environment, real databases, a real Redis."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import structlog

from gorgon_common import logs
from gorgon_common.masking import SECRETS
from gorgon_common.settings import get_settings
from tests.support import servers

STRICT = bool(os.environ.get("GORGON_TEST_STRICT"))  # CI: a test that is skipped is a test that fails
_KEYS = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "NO_COLOR", "FORCE_COLOR")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Turn a skip into a failure where nothing may be skipped."""
    report = yield
    _no_skip(report, item.nodeid)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """The same for whole modules (importorskip)."""
    report = yield
    _no_skip(report, collector.nodeid)
    return report


def _no_skip(report: Any, name: str) -> None:
    if STRICT and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{name}: nothing may be skipped here (GORGON_TEST_STRICT). {reason}"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No setting of the machine reaches a test, and none of a test another; GORGON_HOME is a temporary folder."""
    for name in list(os.environ):
        if name in _KEYS or (name.startswith("GORGON_") and not name.startswith("GORGON_TEST_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GORGON_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GORGON_ENV_FILE", "")
    get_settings.cache_clear()
    SECRETS.clear()
    root = logging.getLogger()
    structured, level, handlers = structlog.get_config(), root.level, list(root.handlers)
    threshold, configured = logs._State.threshold, logs._State.configured
    yield
    get_settings.cache_clear()
    SECRETS.clear()
    # A command that ran in this process has sent all logs to its stderr, which is closed by now.
    structlog.configure(**structured)
    logs._State.threshold, logs._State.configured = threshold, configured
    root.setLevel(level)
    for handler in list(root.handlers):
        if handler not in handlers and type(handler).__module__.startswith("gorgon"):
            root.removeHandler(handler)


@pytest.fixture(scope="session")
def postgres_admin() -> Iterator[str]:
    """URL of a PostgreSQL where databases may be created."""
    with servers.shared_postgres() as url:
        yield url


@pytest.fixture
def postgres_url(postgres_admin: str) -> Iterator[str]:
    """A fresh PostgreSQL database with the newest schema."""
    with servers.fresh_database(postgres_admin) as url:
        yield url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file to copy."""
    return servers.sqlite_template(tmp_path_factory.mktemp("sqlite"))


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """A fresh SQLite database with the newest schema."""
    path = tmp_path / "gorgon.db"
    shutil.copy(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A fresh database of either kind: a test that asks for it runs on both."""
    return str(request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url"))


@pytest.fixture(scope="session")
def redis_server_url() -> Iterator[str]:
    """The Redis of this test process."""
    with servers.session_redis(os.environ.get("PYTEST_XDIST_WORKER", "")) as url:
        yield url


@pytest.fixture
def redis_url(redis_server_url: str) -> str:
    """An empty Redis."""
    with contextlib.closing(redis.Redis.from_url(redis_server_url)) as client:
        client.flushdb()
    return redis_server_url
