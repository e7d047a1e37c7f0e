"""Every setting of Gorgon: an environment variable, or a line of `.env` in the current directory.

`get_settings()` reads them once.  `gorgon --help` never imports this module (pydantic takes a quarter of a second).
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Mapping
from contextvars import ContextVar
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import quote, urlsplit

from dotenv import dotenv_values
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from gorgon_common import durations
from gorgon_common.errors import ConfigurationError
from gorgon_common.masking import MASK, SECRETS, redact

PREFIX = "GORGON_"
EMBEDDED_BROKER = "gmem://"
"""Messages stay in the process."""

_env_file: ContextVar[Mapping[str, str | None]] = ContextVar("gorgon_env_file", default={})  # noqa: B039  never changed
_NOT_OURS = ("GORGON_TEST_", "GORGON_BENCH_")
_UNQUOTED = "".join(chr(code) for code in range(1, 0x80) if chr(code) not in "%?#")
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

Port = Annotated[int, Field(ge=1, le=65535)]


def _duration(text: str) -> float:
    """Return the seconds of a duration.  Raises ValueError with all that the message of a setting has room for."""
    try:
        return durations.parse(text)
    except durations.NotADuration as error:
        raise ValueError(f"{error}. {error.hint}") from None


def _broker(data: dict[str, Any]) -> str:
    """Derive the broker URL from Redis; kombu writes a unix socket differently."""
    redis_url: str | None = data.get("redis_url")
    if not redis_url:
        return EMBEDDED_BROKER
    parts = urlsplit(redis_url)
    if parts.scheme != "unix":
        return redis_url
    database = re.search(r"(?:^|&)db=(\d+)", parts.query)
    return f"redis+socket://{parts.path}?virtual_host={database[1] if database else 0}"


def _database(data: dict[str, Any]) -> str:
    # Quoted, because a folder name may contain a question mark; SQLAlchemy unquotes it.
    return f"sqlite:///{quote(str(data.get('home', Path())), safe=_UNQUOTED)}/gorgon.db"


def _shown(text: str) -> dict[str, Any]:
    """Return how `describe` shows a computed default."""
    return {"shown": text}


class Settings(BaseSettings):
    """All settings.  Times in seconds."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="ignore",
        frozen=True,
        env_ignore_empty=True,
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )

    home: Path = Field(Path("~/.gorgon"), validate_default=True, description="Where Gorgon keeps its files.")
    database_url: str = Field(
        default_factory=_database,
        json_schema_extra=_shown("sqlite:///$GORGON_HOME/gorgon.db"),
        description="The database: a sqlite:/// or postgresql:// URL.",
    )
    redis_url: str | None = Field(None, description="A redis:// or unix:// URL; without it everything is embedded.")
    broker_url: str = Field(
        default_factory=_broker,
        json_schema_extra=_shown("GORGON_REDIS_URL, else gmem:// (embedded)"),
        description="The broker for messages to workers; gmem:// keeps them in this process.",
    )
    prices: Path | None = Field(
        None,
        description="Your own price table, in the form of gorgon_common/costs/prices.yaml; its prices take precedence.",
    )
    commands_allow: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Executables that command steps may run, separated by commas; * for all, empty for none."
    )
    limits_file: Path | None = Field(None, description="A YAML file with tiers, rate limits and weights of your own.")
    sandbox_url: str | None = Field(
        None, description="The URL of a sandbox that is already running; if unset, one is started."
    )
    sandbox_seed: int = Field(0, description="Seed of the sandbox's replies.")
    sandbox_latency: float | None = Field(
        None, ge=0, description="How long the sandbox takes for a reply, such as 500ms; realistic times if unset."
    )
    api_url: str = Field(
        "http://127.0.0.1:8000", description="The server that commands use, without `--server` too if it is set."
    )
    api_key: SecretStr | None = Field(None, description="The key that the API requires and that its clients send.")
    api_teams: Annotated[tuple[str, ...], NoDecode] = Field(
        ("*",), description="Teams that GORGON_API_KEY may act for, separated by commas; * for all."
    )
    host: str = Field("127.0.0.1", description="Address that the servers listen on.")
    api_port: Port = Field(8000, description="Port of the API.")
    dashboard_port: Port = Field(8501, description="Port of the dashboard.")
    flower_port: Port = Field(5555, description="Port of Flower.")
    sandbox_port: Port = Field(8900, description="Port of `gorgon sandbox`.")
    flower_events: bool = Field(
        False, description="Workers send the events that Flower shows, and obey Celery's remote control."
    )
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        None, description="Port on which each worker serves Prometheus metrics; 0 for any free one."
    )
    access_log: bool = Field(True, description="The API logs each request.")
    lease_seconds: float = Field(
        30.0, gt=0, description="How long a silent worker keeps its steps before other workers take them over."
    )
    poison_deaths: int = Field(
        3,
        ge=3,
        le=1000,
        description="Deaths of its workers after which a step fails, where chance does not explain them.",
    )
    grace_seconds: float = Field(
        25.0,
        ge=0,
        description="How long a worker that is told to stop waits for the steps that it holds; at the end of it the "
        "process is gone.",
    )
    slots: int = Field(50, ge=1, le=1000, description="Steps that one worker process runs at the same time.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="What is logged: debug, info, warning or error."
    )
    log_format: Literal["console", "json"] = Field(
        "console", description="Logs for people (console) or machines (json)."
    )
    openai_api_key: SecretStr | None = Field(
        None, validation_alias="OPENAI_API_KEY", description="Key for OpenAI, used with --live."
    )
    openai_base_url: str | None = Field(
        None, validation_alias="OPENAI_BASE_URL", description="Any server that speaks OpenAI's API (Ollama, vLLM)."
    )
    anthropic_api_key: SecretStr | None = Field(
        None, validation_alias="ANTHROPIC_API_KEY", description="Key for Anthropic, used with --live."
    )
    anthropic_base_url: str | None = Field(
        None, validation_alias="ANTHROPIC_BASE_URL", description="Any server that speaks Anthropic's API."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read `.env` with our own reader, which reports what is wrong with the file."""
        return (init_settings, env_settings, _EnvFile(settings_cls), file_secret_settings)

    @field_validator("home")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        if "\0" in str(value):
            raise ValueError("a path cannot hold a zero byte")
        try:
            return value.expanduser().absolute()
        except RuntimeError:
            raise ValueError(f"the home directory in {str(value)!r} is not known; give an absolute path") from None
        except FileNotFoundError:
            raise ValueError("the current directory does not exist any more; give an absolute path") from None

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, value: str) -> str:
        value = re.sub(r"^postgres://", "postgresql://", value)
        value = _with_scheme(value, ("sqlite", "postgresql", "postgresql+psycopg"))
        if value.startswith("sqlite") and _in_memory(value):
            raise ValueError("a database in memory is gone with each connection; name a file: sqlite:///gorgon.db")
        return value

    @field_validator("redis_url")
    @classmethod
    def _known_redis(cls, value: str | None) -> str | None:
        return value and _with_scheme(value, ("redis", "rediss", "unix"))

    @field_validator("broker_url")
    @classmethod
    def _known_broker(cls, value: str) -> str:
        return _with_scheme(value, ("gmem", "redis", "rediss", "redis+socket", "amqp", "amqps"))

    @field_validator("sandbox_url", "api_url", "openai_base_url", "anthropic_base_url")
    @classmethod
    def _known_http(cls, value: str | None) -> str | None:
        return value and _with_scheme(value, ("http", "https")).rstrip("/")

    @field_validator("commands_allow", "api_teams", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return tuple(name for name in re.split(r"[,\s]+", value) if name) if isinstance(value, str) else value

    @field_validator("sandbox_latency", "lease_seconds", "grace_seconds", mode="before")
    @classmethod
    def _seconds(cls, value: Any) -> Any:
        return _duration(value) if isinstance(value, str) else value

    @field_validator("log_level", "log_format", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @property
    def embedded(self) -> bool:
        """Whether workers run in this process, because no broker exists that other processes could reach."""
        return self.broker_url.startswith(EMBEDDED_BROKER)

    def register_secrets(self) -> list[str]:
        """Register every secret setting, and the secret parts of URLs, to be masked in all output.

        Returns the variables whose values are too short for that.
        """
        short = []
        for name in type(self).model_fields:
            value = getattr(self, name)
            maskable = True
            if isinstance(value, SecretStr):
                maskable = SECRETS.add(variable_of(name), value.get_secret_value())
            elif isinstance(value, str) and "://" in value:
                maskable = SECRETS.add_url(variable_of(name), value)
            if not maskable:
                short.append(variable_of(name))
        return short


def _with_scheme(url: str, schemes: tuple[str, ...]) -> str:
    if url.partition(":")[0] not in schemes or ":/" not in url:
        raise ValueError(f"a URL that begins with {', '.join(f'{scheme}://' for scheme in schemes)} is needed")
    return url


def _in_memory(url: str) -> bool:
    path, _, query = url.partition("://")[2].partition("?")
    return path in ("", "/", "/:memory:") or path.startswith("/file::memory:") or "mode=memory" in query


class Setting(NamedTuple):
    """One line of `gorgon doctor`.  `value` and `default` are text with secrets masked, empty if not set."""

    variable: str
    value: str
    default: str
    description: str


def variable_of(name: str) -> str:
    """Return the environment variable of the field `name`."""
    alias = Settings.model_fields[name].validation_alias
    return alias if isinstance(alias, str) else f"{PREFIX}{name.upper()}"


class _EnvFile(EnvSettingsSource):
    """The variables that `load` has read from `.env`; settings created in other ways read no file."""

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return {name.lower(): value for name, value in _env_file.get().items() if value != ""}


def read_env_file(path: Path, *, must_exist: bool = False) -> dict[str, str | None]:
    """Return the variables of an environment file; none if it does not exist (unless it must).

    Raises ConfigurationError that names the file, if it cannot be read or is not text.
    """
    try:
        path = path.expanduser()
        if not must_exist and not path.exists():
            return {}
        data = path.read_bytes()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(
            f"{path} cannot be read: {reason}.",
            hint="Correct or remove it, or name another file in GORGON_ENV_FILE (empty for none).",
        ) from None
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(
            f"{path}, line {line}: this is not UTF-8 text (byte {error.start}).",
            hint="Save the file as UTF-8, or name another file in GORGON_ENV_FILE (empty for none).",
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ConfigurationError(
            f"{path}, line {line}: there is a zero byte, so this is no text file.", hint="Save the file as UTF-8."
        )
    return dict(dotenv_values(stream=StringIO(text)))


def load() -> Settings:
    """Read the environment and `.env` (or the file that GORGON_ENV_FILE names; empty for none).

    Secrets in them are registered for masking.  Raises ConfigurationError that names each invalid variable.
    """
    SECRETS.add_environment(os.environ)
    named = os.environ.get("GORGON_ENV_FILE")
    values = (
        read_env_file(Path(".env" if named is None else named), must_exist=named is not None) if named != "" else {}
    )
    SECRETS.add_environment(values)
    token = _env_file.set(values)
    try:
        settings = Settings()
    except ValidationError as error:
        problems = [
            f"{_variable_at(detail['loc'])}: {detail['msg'].removeprefix('Value error, ')}"
            for detail in error.errors()
            if detail["type"] != "default_factory_not_called"  # a consequence of another error
        ]
        raise ConfigurationError(
            "\n".join(problems), hint="Correct or unset it, in the environment or in .env; `gorgon doctor` lists all."
        ) from None
    finally:
        _env_file.reset(token)
    settings.register_secrets()
    return settings


def _variable_at(location: tuple[int | str, ...]) -> str:
    name = str(location[0]) if location else ""
    return variable_of(name) if name in Settings.model_fields else name


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """Return the process's settings, read on the first call."""
    return load()


def describe(settings: Settings | None = None) -> list[Setting]:
    """Return (variable, value, default, description) of every setting, secrets and passwords masked."""
    current = settings or get_settings()
    return [
        Setting(variable_of(name), _text(getattr(current, name)), _default(field), field.description or "")
        for name, field in Settings.model_fields.items()
    ]


def unknown_variables(environ: Mapping[str, str] | None = None) -> list[str]:
    """Return the GORGON_* variables that are not settings, which are usually typing errors."""
    known = {variable_of(name) for name in Settings.model_fields} | {"GORGON_ENV_FILE"}
    given = os.environ if environ is None else environ
    return sorted(
        name for name in given if name.startswith(PREFIX) and name not in known and not name.startswith(_NOT_OURS)
    )


def _default(field: Any) -> str:
    extra = field.json_schema_extra
    return str(extra["shown"]) if extra else _text(field.default)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, SecretStr):
        return MASK
    if isinstance(value, tuple):
        return ",".join(value)
    return redact(str(value))
