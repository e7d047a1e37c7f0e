"""`gorgon doctor`: what is set, what is installed, what can be reached, and how to fix the rest."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import urlsplit

import typer

from gorgon_common import errors, lazy
from gorgon_common.application.health import upgrade_database as upgrade
from gorgon_common.application.session import open_session
from gorgon_common.cli import terminal
from gorgon_common.home import protect
from gorgon_common.masking import MASK, SHORTEST, redact
from gorgon_common.settings import Setting, Settings, describe, get_settings, unknown_variables, variable_of

_OLDEST, _NEWEST = (3, 11), (3, 13)
_PACKAGES = ("celery", "kombu", "sqlalchemy", "pydantic", "redis", "psycopg", "openai", "anthropic", "fastapi")
_SKEW = 2.0
"""Maximum difference in seconds between this clock and the database's: beyond it, step times look wrong."""
_KEYS = {"openai_api_key": "OpenAI", "anthropic_api_key": "Anthropic"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.  `state`: ok, info, warning (it works, but needs attention) or problem (something
    required).
    """

    name: str
    state: str
    detail: str
    hint: str = ""


def doctor(*, as_json: bool) -> None:
    """Print the report; exits 1 if something required is broken, 2 if Gorgon's folder cannot be used."""
    settings = get_settings()
    findings = [
        *_system(),
        *_storage(settings),
        *_services(settings),
        *_redis(settings),
        *_keys(settings),
        *_sandbox(settings),
        *_commands(settings),
        *_strangers(),
    ]
    broken = any(finding.state == "problem" for finding in findings)
    if as_json:
        terminal.emit(
            {
                "ok": not broken,
                "checks": [asdict(finding) for finding in findings],
                "settings": [setting._asdict() for setting in describe(settings)],
                "packages": _versions(),
            }
        )
    else:
        tell(findings, describe(settings))
    if broken:
        home = any(finding.name == "Home" and finding.state == "problem" for finding in findings)
        raise typer.Exit(terminal.EXIT_BAD_INPUT if home else terminal.EXIT_RUN_FAILED)


def upgrade_database(*, as_json: bool) -> None:
    """Create the tables or bring them up to date."""
    settings = get_settings()
    upgrade(settings)
    shown = next(setting.value for setting in describe(settings) if setting.variable == "GORGON_DATABASE_URL")
    if as_json:
        terminal.emit({"database_url": shown, "upgraded": True})
    else:
        terminal.say(f"The tables of {shown} are up to date.")


def _system() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    fine = _OLDEST <= sys.version_info[:2] <= _NEWEST
    yield Finding(
        "Python",
        "ok" if fine else "problem",
        f"{python} on {platform.system()} {platform.machine()}",
        "" if fine else "Python 3.11, 3.12 or 3.13 is needed.",
    )
    missing = sorted(name for name, found in _versions().items() if found is None)
    yield Finding(
        "Packages",
        "problem" if missing else "ok",
        f"missing: {', '.join(missing)}" if missing else ", ".join(f"{k} {v}" for k, v in _versions().items()),
        "Install them: pip install gorgon" if missing else "",
    )
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):
        yield Finding(
            "Start-up",
            "warning",
            "PYTHONDONTWRITEBYTECODE is set, so every start compiles all modules again",
            "Unset it.",
        )


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("gorgon", *_PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _storage(settings: Settings) -> Iterator[Finding]:
    home = settings.home
    try:
        protect(home, make=True)
    except errors.ConfigurationError as error:
        yield Finding("Home", "problem", error.message, error.hint)
        return
    if not os.access(home, os.W_OK):
        yield Finding(
            "Home", "problem", f"{home} cannot be written", "Set GORGON_HOME to a directory that you can write to."
        )
        return
    free = shutil.disk_usage(home).free
    small = free < 200_000_000
    yield Finding(
        "Home",
        "warning" if small else "ok",
        f"{home}, {free / 1e9:.1f} GB free",
        "Make room: the database grows with every run." if small else "",
    )


def _services(settings: Settings) -> Iterator[Finding]:
    try:
        session = open_session(settings)
    except errors.GorgonError as error:
        yield Finding("Database", "problem", _masked(error.message), error.hint or "Check GORGON_DATABASE_URL.")
        return
    try:
        for name, check in session.health().items():
            good = bool(check["ok"])
            variable = "GORGON_DATABASE_URL" if name == "database" else "GORGON_BROKER_URL and GORGON_REDIS_URL"
            yield Finding(
                name.capitalize(),
                "ok" if good else "problem",
                _masked(str(check.get("detail") or "")),
                "" if good else f"Is it running? Check {variable}.",
            )
        yield clock(session.now(), datetime.now(UTC))
    finally:
        session.close()


def clock(theirs: datetime, ours: datetime) -> Finding:
    """Compare the machine's clock with the database's."""
    skew = (ours - theirs).total_seconds()
    bad = abs(skew) > _SKEW
    return Finding(
        "Clock",
        "warning" if bad else "ok",
        f"{skew:+.1f} s against the database's" if bad else "agrees with the database's",
        "Synchronise the clocks (NTP)." if bad else "",
    )


def _redis(settings: Settings) -> Iterator[Finding]:
    if settings.redis_url is None:
        yield Finding("Redis", "info", "not set: messages stay in the process (embedded)")
        return
    try:
        client = lazy.load("redis:Redis").from_url(settings.redis_url, socket_timeout=3, socket_connect_timeout=3)
        info: dict[str, Any] = client.info("server")
        policy = _ask(lambda: client.config_get("maxmemory-policy")["maxmemory-policy"])
        client.close()
    except lazy.load("redis:RedisError") as error:
        yield Finding("Redis", "problem", _masked(str(error)), "Is it running? Check GORGON_REDIS_URL.")
        return
    yield Finding("Redis", "ok", f"{info.get('redis_version')} at {_address(settings.redis_url)}")
    if policy is None:
        yield Finding(
            "Redis memory", "warning", "CONFIG is not allowed here", "Make sure that maxmemory-policy is noeviction."
        )
    elif policy != "noeviction":
        yield Finding(
            "Redis memory",
            "problem",
            f"maxmemory-policy is {policy}: Redis may throw messages away",
            "redis-cli CONFIG SET maxmemory-policy noeviction",
        )
    else:
        yield Finding("Redis memory", "ok", "maxmemory-policy noeviction")


def _ask(question: Callable[[], Any]) -> Any:
    try:
        return question()
    except lazy.load("redis:ResponseError"):
        return None


def _address(url: str) -> str:
    parts = urlsplit(url)
    return parts.path if parts.scheme == "unix" else f"{parts.hostname}:{parts.port or 6379}"


def _keys(settings: Settings) -> Iterator[Finding]:
    for name, who in _KEYS.items():
        key = getattr(settings, name)
        if key is None:
            yield Finding(who, "info", "no key: only the sandbox", f"{variable_of(name)} is needed for --live.")
        else:
            yield Finding(who, "ok", f"key {_mask(key.get_secret_value())}")
    for variable in settings.register_secrets():
        yield Finding(
            "Secrets",
            "warning",
            f"the secret in {variable} has fewer than {SHORTEST} characters: it cannot be masked in outputs and logs",
            "Use a longer one; a placeholder does no harm.",
        )
    key = settings.api_key
    yield Finding(
        "API key", "info" if key is None else "ok", "not set" if key is None else _mask(key.get_secret_value())
    )


def _sandbox(settings: Settings) -> Iterator[Finding]:
    """Where runs without --live go: `gorgon run` starts a sandbox itself, workers call one that is there."""
    if settings.embedded and settings.sandbox_url is None:
        return
    url = settings.sandbox_url or f"http://127.0.0.1:{settings.sandbox_port}"
    if _answers(url):
        yield Finding("Sandbox", "ok", f"answers at {url}")
        return
    live = any(getattr(settings, name) is not None for name in (*_KEYS, "openai_base_url", "anthropic_base_url"))
    yield Finding(
        "Sandbox",
        "info" if live and settings.sandbox_url is None else "problem",
        f"nothing answers at {url}, so runs without --live fail",
        "Start it: gorgon sandbox. Where it is elsewhere, set GORGON_SANDBOX_URL.",
    )


def _answers(url: str) -> bool:
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection((parts.hostname or "", port), timeout=3):
            return True
    except (OSError, ValueError):
        return False


def _mask(secret: str) -> str:
    return f"…{secret[-4:]}" if len(secret) >= 20 else MASK


def _commands(settings: Settings) -> Iterator[Finding]:
    allowed = settings.commands_allow
    if not allowed:
        yield Finding("Commands", "info", "off", "GORGON_COMMANDS_ALLOW=git,pytest lets `run:` steps call these.")
        return
    missing = [name for name in allowed if name != "*" and shutil.which(name) is None]
    yield Finding(
        "Commands",
        "warning" if missing else "ok",
        "any" if "*" in allowed else ", ".join(allowed),
        f"Not found on PATH: {', '.join(missing)}." if missing else "",
    )


def _strangers() -> Iterator[Finding]:
    for name in unknown_variables():
        yield Finding(
            "Settings",
            "warning",
            f"{name} is not a setting of Gorgon",
            "Is it misspelt? The settings are listed below.",
        )


def _masked(text: str) -> str:
    return " ".join(redact(text).split())


def tell(findings: Sequence[Finding], settings: Sequence[Setting]) -> None:
    """Print a report for people."""
    text = lazy.load("rich.text:Text")
    padding = lazy.load("rich.padding:Padding")
    screen = terminal.console()
    wrapped = terminal.interactive()
    symbols = {"ok": ("✓", "ok"), "info": ("·", "quiet"), "warning": ("!", "wait"), "problem": ("✗", "bad")}
    grid = lazy.load("rich.table:Table").grid(padding=(0, 2, 0, 0))
    for overflow in ("ignore", "ignore", "fold"):
        grid.add_column(overflow=overflow, no_wrap=overflow == "ignore")
    for finding in findings:
        detail = text(finding.detail)
        if finding.hint:
            detail.append("\n" if finding.detail else "").append(finding.hint, style="hint")
        grid.add_row(text(*symbols[finding.state]), text(finding.name), detail)
    screen.print(grid)
    screen.print()
    for setting in settings:
        line = text.assemble((f"{setting.variable:<24} ", "name"), setting.value or "–")
        if setting.value == setting.default or not setting.value:
            line.stylize("quiet", 25)
        else:
            line.append(f"   (default {setting.default or '–'})", style="quiet")
        screen.print(line, soft_wrap=True)
        description = text(setting.description, style="quiet")
        indent = 25 if not wrapped or screen.width >= 80 else 4
        screen.print(
            padding.indent(description, indent) if wrapped else text(" " * indent) + description, soft_wrap=not wrapped
        )
    count = sum(finding.state == "problem" for finding in findings)
    screen.print()
    if count:
        screen.print(text(f"{terminal.counted(count, 'problem')} to fix.", style="bad"))
    else:
        screen.print(text("Everything that is needed works.", style="ok"))
