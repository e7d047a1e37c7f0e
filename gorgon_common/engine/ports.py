"""Protocols for what the engine needs from outside; adapters and providers implement them."""

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

    `schema` is a JSON Schema that the reply must fit; the adapter requests it natively.  `timeout` is in seconds for
    the whole call, including streaming.  `label` is the step's path, for logs only.  `role` is the agent role's name.
    `team` is charged, and shares rate limits with other teams; `ticket` is the step, which keeps its place in the queue
    when it has to wait.  `patient`: something has already been paid for, so the call waits in place.  The same holds
    for every later turn of a conversation, unless it is `resumable`: its state is stored, and it can resume after any
    wait.
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
    team: str = "default"
    ticket: str = ""
    patient: bool = False
    resumable: bool = False


@dataclass(frozen=True, slots=True)
class AgentReply:
    """A model's reply.  `data` is the parsed reply if the call had a schema (not yet validated).

    `usage` is None if the provider reported no usage, or an impossible one; the cost is then unknown.  `stop_reason` is
    end, max_tokens, refusal, pause, context, or the provider's own word for anything else.  Only `end` means that the
    reply is complete.
    """

    text: str
    usage: Usage | None
    model: str
    data: Any = None
    stop_reason: str = "end"
    service_tier: str | None = None
    request_id: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """The provider's rate-limit headers, lower-case."""


class AgentProvider(Protocol):
    """A model provider: openai or anthropic.  Thread-safe; one instance per process.

    Raises the errors of `errors.ProviderError`, and `Cancelled` within about half a second after `cancelled()` turns
    true.  Any other Gorgon error means that no call was made; any other exception leaves that unknown.  A refused or
    truncated reply is returned with its `stop_reason` (`agent.converse` turns it into an error); `data` is None if the
    text is not JSON.  If a call fails, the error's `usage` states what is charged for it.
    """

    name: str

    def call(self, call: AgentCall, cancelled: Callable[[], bool]) -> AgentReply:
        """Make the call and return the reply."""
        ...

    def close(self) -> None:
        """Release the connections."""
        ...


class EffectLedger(Protocol):
    """Remembers which calls of a claim are about to change something outside, and which have.

    After a crash between the two, whether the change was made is in doubt and must be found out or decided.
    """

    def intend(self, ordinal: int, request: object) -> None:
        """Store, before the call is sent, that it is about to be.  Raises Unavailable: then it must not be sent."""
        ...

    def confirm(self, ordinal: int, reply: AgentReply) -> None:
        """Note that the provider has made the change; it is stored with the step's outcome."""
        ...


@dataclass(frozen=True, slots=True)
class CommandCall:
    """A process to run: `argv` without a shell, or `shell`, the text for `sh -c`.

    `env` is the whole environment apart from PATH, HOME and LANG.  Times are in seconds, sizes in bytes.
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
    """Runs processes.  Raises CommandFailed (not allowed, or cannot run), Retryable(kind='timeout'), Cancelled, and
    OutputTooLarge if the output exceeds its limit.
    """

    def run(self, call: CommandCall, cancelled: Callable[[], bool]) -> CommandResult:
        """Run the process to its end, or kill its process group."""
        ...


class Pricer(Protocol):
    """Converts usage into money."""

    version: str

    def price(
        self, provider: str, model: str, usage: Usage, *, service_tier: str | None = None, asked: str | None = None
    ) -> int | None:
        """Return micro-dollars (rounded half up, never 0 if anything was used), or None if there is no price.

        `asked`: the model name in the call, if the reply names a different one.
        """
        ...
