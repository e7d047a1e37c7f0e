"""What the engine needs from outside, as protocols; adapters and providers implement them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from gorgon_common.costs.usage import CallRecord, Usage
from gorgon_common.engine.records import (
    Activity,
    Admitted,
    Advance,
    Buried,
    Children,
    Claimed,
    Finish,
    Head,
    Keep,
    Recovered,
    Refusal,
    Released,
    Room,
    Row,
    RunClosed,
    Turn,
    Waiting,
    Weight,
)
from gorgon_common.engine.states import RunStatus

if TYPE_CHECKING:
    from gorgon_common.engine.context import Run


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
    `team` pays, and shares rate limits with others; `ticket` is the step, which keeps its place when it has to wait.
    `patient`: something was paid for already, so a wait is taken here and now.  So it is with every further turn of a
    conversation, unless it is `resumable`: what was said is stored, and can be taken up after any wait.
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
    """What a model answered.  `data` is the parsed reply where the call had a schema (not yet validated).

    `usage` is None where the provider did not say what was used, or said what cannot be: the cost is unknown then.
    `stop_reason` is end, max_tokens, refusal, pause, context, or the provider's own word for something else.  Only
    `end` is a whole reply.
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
    """A provider of models: openai or anthropic.  Thread-safe; one instance a process.

    Raises the errors of `errors.ProviderError`, and `Cancelled` soon (half a second) after `cancelled()` turns true.
    Any other error of Gorgon's own says that no call was made, and any other exception that nobody knows.  A
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

    def price(
        self, provider: str, model: str, usage: Usage, *, service_tier: str | None = None, asked: str | None = None
    ) -> int | None:
        """Return micro-dollars (rounded half up, never 0 where something was used), None where there is no price.

        `asked`: the name that the call asked for, where the reply names another.
        """
        ...


class Member(Protocol):
    """A worker process that is entered in the store."""

    owner: int
    target: str
    home: str
    queues: list[int]


class Steps(Protocol):
    """The store as the machine uses it.  Each call is one transaction; all raise Unavailable."""

    def tick(
        self,
        worker: Any,
        keep: Keep,
        *,
        claims: Sequence[int] = (),
        finishes: Sequence[Finish] = (),
        suspects: bool = False,
    ) -> Advance:
        """Claim and finish; what becomes ready is taken over as `keep` allows, else reported."""
        ...

    def admit(
        self,
        worker: Any,
        run: int,
        ids: Sequence[int] = (),
        *,
        follows: Sequence[int] = (),
        free: int = 0,
        suspects: bool = False,
    ) -> Admitted:
        """Claim slow steps of a run with `max_parallel` as it has room: `ids`, and those that wait."""
        ...

    def release(
        self, step: Claimed, *, weight: Weight | None = None, crashed: str | None = None
    ) -> Released | Buried | Refusal:
        """Give a claimed step back.  `crashed`: what broke; it counts as if its worker had died."""
        ...

    def owned(self, worker: Any) -> list[Claimed]:
        """Return the steps that a worker holds."""
        ...

    def park(
        self,
        step: Claimed,
        *,
        seconds: float,
        reason: str,
        message: str,
        calls: Sequence[CallRecord],
        attempt: bool,
        room: Room | None = None,
        event: str | None = None,
    ) -> Waiting | Refusal:
        """Let a claimed step wait, for one of `outcomes.REASONS`."""
        ...

    def tell(
        self, run: int, row: int | None, kind: str, message: str | None, data: Mapping[str, Any] | None = None
    ) -> None:
        """Write one line of the run's journal."""
        ...

    def wake(self, ids: Sequence[int]) -> list[Head]:
        """Make waiting steps whose time has come ready."""
        ...

    def expand(
        self,
        step: Claimed,
        rows: Sequence[Row],
        *,
        phase: str,
        round: int = 0,
        items: Sequence[Any] | None = None,
        window: int | None = None,
        reduce: int | None = None,
        calls: Sequence[CallRecord] = (),
    ) -> Children | Refusal:
        """Turn a claimed composite into its children."""
        ...

    def fail(
        self, worker: Any, keep: Keep, finish: Finish, *, container: int, keeps: frozenset[int], run_fails: bool
    ) -> Advance:
        """Finish a failed step and stop what is around it."""
        ...

    def finish_run(
        self, worker: Any, finish: Finish, *, status: RunStatus, outputs: Any, error: Mapping[str, Any] | None
    ) -> RunClosed | Refusal:
        """Finish the run's last step and the run with it."""
        ...


class Shelf(Protocol):
    """The store as the publisher and the sweep use it."""

    def carry(self, ids: Sequence[int]) -> None:
        """Mark pending steps whose message a canvas will send."""
        ...

    def drop(self, ids: Sequence[int]) -> list[Head]:
        """Take steps off their canvas; returns those that are ready already."""
        ...

    def scatter(self, *, home: str, target: str | None = None) -> None:
        """Take every step of the live runs off its canvas: the broker has lost them all."""
        ...

    def shelve(self, heads: Sequence[Head], team: str, *, first: bool = False) -> None:
        """Put ready steps on the backlog."""
        ...

    def unshelve(self, queue: int, count: int, *, target: str, home: str) -> list[Head]:
        """Take the next steps of a queue from the backlog."""
        ...

    def shelved(self) -> dict[int, int]:
        """Return queue → steps on the backlog."""
        ...

    def redispatch(self, ids: Sequence[int]) -> list[int]:
        """Note that messages of ready steps are sent anew; returns the steps that are still ready."""
        ...

    def slots(self, target: str, home: str) -> dict[int, int]:
        """Return queue → slots of the workers that live and serve it."""
        ...

    def lead(self, name: str, owner: str, seconds: float) -> bool:
        """Become or stay the one that does a job."""
        ...

    def leads_for(self, name: str) -> float:
        """Return how many seconds the leader of a job has it for; 0 where nobody has it."""
        ...

    def activity(self, *, home: str, target: str) -> Activity:
        """Return what is going on in the live runs of a home."""
        ...

    def reap(
        self, *, home: str, target: str | None = None, sparing: int | None = None, thorough: bool = True
    ) -> Recovered:
        """Take the steps of dead workers back, never those of worker `sparing`."""
        ...

    def overdue(
        self, *, home: str, target: str | None = None, limit: int = 2000, all_ready: bool = False
    ) -> tuple[list[tuple[Head, datetime]], list[int]]:
        """Return ready steps whose message may be lost, and waiting ones to wake."""
        ...

    def wake(self, ids: Sequence[int]) -> list[Head]:
        """Make waiting steps whose time has come ready."""
        ...

    def expired_runs(self, *, home: str, target: str | None = None) -> list[int]:
        """Return the live runs whose time is up."""
        ...

    def held_runs(self, *, home: str, target: str) -> list[int]:
        """Return the runs with `max_parallel` of which steps wait."""
        ...

    def admit(
        self,
        worker: Any,
        run: int,
        ids: Sequence[int] = (),
        *,
        follows: Sequence[int] = (),
        free: int = 0,
        suspects: bool = False,
    ) -> Admitted:
        """Claim slow steps of a run with `max_parallel` as it has room; without a worker they are owed a message."""
        ...

    def turns(self, *, home: str, target: str) -> list[Turn]:
        """Return what is to do for concurrency keys that runs wait for."""
        ...

    def take_turn(self, key: int, *, home: str) -> list[Head]:
        """Let runs have a concurrency key whose turn it is."""
        ...

    def close_orphan(self, run: int, *, cancelled: bool = False) -> bool:
        """End a run whose process died; tells whether it was one."""
        ...

    def watermarks(self, *, home: str, target: str | None = None) -> dict[int, float]:
        """Return queue → when the newest message that a worker has claimed was sent."""
        ...

    def stop(
        self, run: int, *, gate: int, keeps: frozenset[int], error: Mapping[str, Any] | None, reason: str
    ) -> list[Head]:
        """Cancel or fail a run."""
        ...


@dataclass(frozen=True, slots=True)
class Lowered:
    """What is to be sent for some heads: a canvas of the adapter's own kind.

    `carried`: pending steps whose message the canvas itself will send; `dropped`: steps that no canvas will send any
    more, because a member of theirs travels alone.
    """

    canvas: Any
    carried: Sequence[int] = ()
    dropped: Sequence[int] = ()


class Canvas(Protocol):
    """Where messages are made and sent: the Celery adapter."""

    def lower(self, run: Run, heads: Sequence[Head], join: int | None) -> Lowered:
        """Return the canvas of ready heads of one run; `join`: the step id of the reduce that they lead to."""
        ...

    def send(self, lowered: Lowered) -> None:
        """Publish it.  Raises Unavailable."""
        ...

    def depth(self, queue: int) -> int:
        """Return how many messages a queue holds.  Raises Unavailable."""
        ...

    def epoch(self) -> str | None:
        """Return a mark that vanishes with the broker's messages (and set a new one), None where that cannot be."""
        ...
