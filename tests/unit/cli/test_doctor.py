"""gorgon doctor: each finding, good and bad."""

from __future__ import annotations

import json
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis

from gorgon_common.cli import doctor
from gorgon_common.settings import get_settings, load
from tests.support.servers import free_port
from tests.unit.cli.conftest import Gorgon


def report(
    gorgon: Gorgon, monkeypatch: pytest.MonkeyPatch, **environment: str
) -> tuple[int, dict[str, dict[str, str]]]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    result = gorgon("doctor", "--json")
    document = json.loads(result.stdout)
    assert document["ok"] is (result.exit_code == 0)
    return result.exit_code, {check["name"]: check for check in document["checks"]}


def test_a_fresh_machine_is_well(gorgon: Gorgon, monkeypatch: pytest.MonkeyPatch) -> None:
    code, checks = report(gorgon, monkeypatch)
    assert code == 0
    assert {checks[name]["state"] for name in ("Python", "Packages", "Home", "Database", "Broker")} == {"ok"}
    assert checks["OpenAI"]["hint"] == "OPENAI_API_KEY is needed for --live."


def test_keys_are_masked(gorgon: Gorgon, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "sk-ant-0123456789abcdefghij"
    _, checks = report(gorgon, monkeypatch, ANTHROPIC_API_KEY=secret, GORGON_API_KEY="short")
    assert checks["Anthropic"]["detail"] == "key …ghij"
    assert checks["API key"]["detail"] == "********"
    assert secret not in gorgon("doctor").stdout


def test_a_database_that_cannot_be_reached(gorgon: Gorgon, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "postgresql://gorgon:hunter2@127.0.0.1:9/x"
    code, checks = report(gorgon, monkeypatch, GORGON_DATABASE_URL=url)
    assert code == 1
    assert checks["Database"]["state"] == "problem"
    assert checks["Database"]["hint"]
    assert "hunter2" not in json.dumps(checks)


def test_redis_is_asked(gorgon: Gorgon, monkeypatch: pytest.MonkeyPatch, redis_url: str) -> None:
    code, checks = report(gorgon, monkeypatch, GORGON_REDIS_URL=redis_url, OPENAI_API_KEY="sk-0123456789")
    assert (code, checks["Redis"]["state"]) == (0, "ok")
    assert checks["Redis memory"]["detail"] == "maxmemory-policy noeviction"


def test_a_sandbox_that_workers_need_and_that_is_not_there(
    gorgon: Gorgon, monkeypatch: pytest.MonkeyPatch, redis_url: str
) -> None:
    port = free_port()
    here = {"GORGON_REDIS_URL": redis_url, "GORGON_SANDBOX_PORT": str(port)}
    code, checks = report(gorgon, monkeypatch, **here)
    assert (code, checks["Sandbox"]["state"]) == (1, "problem")
    assert f"http://127.0.0.1:{port}" in checks["Sandbox"]["detail"]
    assert "gorgon sandbox" in checks["Sandbox"]["hint"]
    with socket.create_server(("127.0.0.1", port)):
        code, checks = report(gorgon, monkeypatch, **here)
    assert (code, checks["Sandbox"]["state"]) == (0, "ok")
    code, checks = report(gorgon, monkeypatch, **here, ANTHROPIC_API_KEY="sk-ant-0123456789")
    assert (code, checks["Sandbox"]["state"]) == (0, "info"), "runs with --live need none"


def test_a_redis_that_may_forget_is_a_problem(gorgon: Gorgon, monkeypatch: pytest.MonkeyPatch, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            code, checks = report(gorgon, monkeypatch, GORGON_REDIS_URL=redis_url)
        finally:
            client.config_set("maxmemory-policy", "noeviction")
    assert code == 1
    assert "CONFIG SET maxmemory-policy noeviction" in checks["Redis memory"]["hint"]


def test_a_redis_that_cannot_be_reached(gorgon: Gorgon, monkeypatch: pytest.MonkeyPatch) -> None:
    code, checks = report(gorgon, monkeypatch, GORGON_REDIS_URL="redis://127.0.0.1:9/0")
    assert (code, checks["Redis"]["state"]) == (1, "problem")


def test_commands_that_are_not_there(gorgon: Gorgon, monkeypatch: pytest.MonkeyPatch) -> None:
    _, checks = report(gorgon, monkeypatch, GORGON_COMMANDS_ALLOW="sh,no-such-program")
    assert checks["Commands"]["state"] == "warning"
    assert checks["Commands"]["hint"] == "Not found on PATH: no-such-program."


def test_a_misspelt_variable(gorgon: Gorgon, monkeypatch: pytest.MonkeyPatch) -> None:
    _, checks = report(gorgon, monkeypatch, GORGON_SLOTTS="3")
    assert checks["Settings"]["detail"] == "GORGON_SLOTTS is not a setting of Gorgon"


def test_a_clock_that_is_wrong() -> None:
    now = datetime(2026, 11, 22, tzinfo=UTC)
    assert doctor.clock(now, now + timedelta(seconds=1)).state == "ok"
    ahead = doctor.clock(now, now + timedelta(seconds=90))
    assert (ahead.state, ahead.detail) == ("warning", "+90.0 s against the database's")


def test_the_databases_clock_is_asked(database_url: str, gorgon: Gorgon, monkeypatch: pytest.MonkeyPatch) -> None:
    code, checks = report(gorgon, monkeypatch, GORGON_DATABASE_URL=database_url)
    assert (code, checks["Clock"]["state"]) == (0, "ok")


def test_every_setting_is_listed_with_its_meaning(gorgon: Gorgon) -> None:
    text = gorgon("doctor").stdout
    for line in doctor.describe(load()):
        assert line.variable in text
        assert line.description in text


def test_db_upgrade(gorgon: Gorgon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GORGON_DATABASE_URL", f"sqlite:///{tmp_path}/new.db")
    get_settings.cache_clear()
    result = gorgon("db", "upgrade", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["upgraded"] is True
    assert (tmp_path / "new.db").exists()
