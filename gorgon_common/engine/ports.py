"""What the engine needs from outside, as protocols; adapters and providers implement them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gorgon_common.costs.usage import Usage


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.  `role` is `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class AgentCall:
    """One call to a model.

    `schema` is a JSON Schema that the reply must fit; the adapter asks for it natively.  `timeout` is in seconds for
    the whole call, streaming included.  `label` is the step's path, for logs only.  `role` is the agent role's name.
    """

    model: str
    messages: Sequence[Message]
    system: str | None = None
    schema: Mapping[str, Any] | None = None
    max_tokens: int = 4096
    effort: str | None = None
    timeout: float = 300.0
    role: str | None = None
    label: str = ""


@dataclass(frozen=True, slots=True)
class AgentReply:
    """What a model answered.  `data` is the parsed reply where the call had a schema (not yet validated)."""

    text: str
    usage: Usage
    model: str
    data: Any = None
    stop_reason: str = "end"  # end | max_tokens | refusal | pause | context
    service_tier: str | None = None
    request_id: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """The provider's rate-limit headers, lower-case."""


class AgentProvider(Protocol):
    """A provider of models: openai or anthropic.  Thread-safe; one instance a process.

    Raises the errors of `errors.ProviderError`, and `Cancelled` soon (half a second) after `cancelled()` turns true.  A
    reply that was refused or cut off is returned and says so in `stop_reason` (`agent.converse` makes an error of it);
    `data` is None where the text is not JSON.  Where a call fails, the error's `usage` says what is charged for it.
    """

    name: str

    def call(self, call: AgentCall, cancelled: Callable[[], bool]) -> AgentReply:
        """Make the call and return the reply."""
        ...

    def close(self) -> None:
        """Release the connections."""
        ...


@dataclass(frozen=True, slots=True)
class CommandCall:
    """A process to run: `argv` without a shell, or `shell`, the text of `sh -c`.

    `env` is the whole environment besides PATH, HOME and LANG.  Times in seconds, sizes in bytes.
    """

    argv: tuple[str, ...] = ()
    shell: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    stdin: str = ""
    cwd: str | None = None
    timeout: float = 300.0
    cpu_seconds: int | None = None
    memory_bytes: int = 2 * 1024**3
    output_bytes: int = 10 * 1024**2


@dataclass(frozen=True, slots=True)
class CommandResult:
    """How a process ended."""

    exit_code: int
    stdout: str
    stderr: str


class CommandRunner(Protocol):
    """Runs processes.  Raises CommandFailed where it may not or cannot run, Retryable(kind='timeout'), Cancelled,
    OutputTooLarge.
    """

    def run(self, call: CommandCall, cancelled: Callable[[], bool]) -> CommandResult:
        """Run it to its end, or kill its process group."""
        ...


class Pricer(Protocol):
    """Turns usage into money."""

    version: str

    def price(self, provider: str, model: str, usage: Usage, *, service_tier: str | None = None) -> int | None:
        """Return micro-dollars (rounded half up, never 0 where something was used), None where there is no price."""
        ...
