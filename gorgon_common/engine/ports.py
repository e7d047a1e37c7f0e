"""Protocols for what the engine needs from outside; adapters and providers implement them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from gorgon_common.costs.usage import CallRecord, Usage
from gorgon_common.engine.records import (
    Activity,
    BudgetRequest,
    Buried,
    Children,
    ClaimCapacity,
    Claimed,
    ClaimResult,
    Finish,
    KeyState,
    ReadyStep,
    Recovered,
    Refusal,
    Released,
    Row,
    RunClosed,
    TransitionResult,
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


class Member(Protocol):
    """A worker process registered in the store."""

    owner: int
    target: str
    home: str
    queues: list[int]


class Steps(Protocol):
    """The store as the machine uses it.  Each call is one transaction; all raise Unavailable."""

    def claim_and_finish(
        self,
        worker: Any,
        keep: ClaimCapacity,
        *,
        claims: Sequence[int] = (),
        finishes: Sequence[Finish] = (),
        suspects: bool = False,
    ) -> TransitionResult:
        """Claim and finish steps.  Steps that become ready are taken over as `keep` allows, and otherwise reported."""
        ...

    def claim_limited(
        self,
        worker: Any,
        run: int,
        ids: Sequence[int] = (),
        *,
        follows: Sequence[int] = (),
        free: int = 0,
        suspects: bool = False,
    ) -> ClaimResult:
        """Claim slow steps of a run with `max_parallel`, as far as it has room: `ids`, and steps that are waiting."""
        ...

    def release(
        self, step: Claimed, *, weight: Weight | None = None, crashed: str | None = None
    ) -> Released | Buried | Refusal:
        """Give a claimed step back.  `crashed`: the error that broke it; it counts as if its worker had died."""
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
        room: BudgetRequest | None = None,
        event: str | None = None,
    ) -> Waiting | Refusal:
        """Make a claimed step wait, for one of `outcomes.REASONS`."""
        ...

    def tell(
        self, run: int, row: int | None, kind: str, message: str | None, data: Mapping[str, Any] | None = None
    ) -> None:
        """Append an entry to the run's journal."""
        ...

    def wake(self, ids: Sequence[int]) -> list[ReadyStep]:
        """Make ready the waiting steps whose time has come."""
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
        """Expand a claimed composite into its children."""
        ...

    def fail(
        self,
        worker: Any,
        keep: ClaimCapacity,
        finish: Finish,
        *,
        container: int,
        keeps: frozenset[int],
        run_fails: bool,
    ) -> TransitionResult:
        """Finish a failed step and stop the run or composite around it."""
        ...

    def finish_run(
        self, worker: Any, finish: Finish, *, status: RunStatus, outputs: Any, error: Mapping[str, Any] | None
    ) -> RunClosed | Refusal:
        """Finish the run's last step, and with it the run."""
        ...


class DispatchStore(Protocol):
    """The store as the publisher and the sweep use it."""

    def attach(self, ids: Sequence[int]) -> None:
        """Mark pending steps whose message a canvas will send."""
        ...

    def detach(self, ids: Sequence[int]) -> list[ReadyStep]:
        """Detach steps from their canvas; returns those that are already ready."""
        ...

    def detach_all(self, *, home: str, target: str | None = None) -> None:
        """Detach every step of the live runs from its canvas, because the broker has lost all canvases."""
        ...

    def enqueue(self, heads: Sequence[ReadyStep], team: str, *, first: bool = False) -> None:
        """Put ready steps on the backlog."""
        ...

    def dequeue(self, queue: int, count: int, *, target: str, home: str) -> list[ReadyStep]:
        """Take a queue's next steps from the backlog."""
        ...

    def shelved(self) -> dict[int, int]:
        """Return queue → steps on the backlog."""
        ...

    def redispatch(self, ids: Sequence[int]) -> list[int]:
        """Record that messages of ready steps are sent again; returns the steps that are still ready."""
        ...

    def slots(self, target: str, home: str) -> dict[int, int]:
        """Return queue → slots of the live workers that serve it."""
        ...

    def lead(self, name: str, owner: str, seconds: float) -> bool:
        """Become or remain the leader of a job."""
        ...

    def leads_for(self, name: str) -> float:
        """Return for how many more seconds a job's leader holds its lease; 0 if there is no leader."""
        ...

    def activity(self, *, home: str, target: str) -> Activity:
        """Return the activity in a home's live runs."""
        ...

    def reap(
        self, *, home: str, target: str | None = None, sparing: int | None = None, thorough: bool = True
    ) -> Recovered:
        """Take back the steps of dead workers, except those of worker `sparing`."""
        ...

    def overdue(
        self, *, home: str, target: str | None = None, limit: int = 2000, all_ready: bool = False
    ) -> tuple[list[tuple[ReadyStep, datetime]], list[int]]:
        """Return ready steps whose message may be lost, and waiting steps to wake."""
        ...

    def wake(self, ids: Sequence[int]) -> list[ReadyStep]:
        """Make ready the waiting steps whose time has come."""
        ...

    def expired_runs(self, *, home: str, target: str | None = None) -> list[int]:
        """Return the live runs that have exceeded their time limit."""
        ...

    def held_runs(self, *, home: str, target: str) -> list[int]:
        """Return the runs with `max_parallel` that have waiting steps."""
        ...

    def claim_limited(
        self,
        worker: Any,
        run: int,
        ids: Sequence[int] = (),
        *,
        follows: Sequence[int] = (),
        free: int = 0,
        suspects: bool = False,
    ) -> ClaimResult:
        """Claim slow steps of a run with `max_parallel` as it has room; without a worker they need a message."""
        ...

    def turns(self, *, home: str, target: str) -> list[KeyState]:
        """Return the work to do for concurrency keys that runs wait for."""
        ...

    def take_turn(self, key: int, *, home: str) -> list[ReadyStep]:
        """Grant a concurrency key to the runs that are next."""
        ...

    def close_orphan(self, run: int, *, cancelled: bool = False) -> bool:
        """End a run whose process died; returns whether that was the case."""
        ...

    def watermarks(self, *, home: str, target: str | None = None) -> dict[int, float]:
        """Return queue → when the newest message that a worker has claimed was sent."""
        ...

    def stop(
        self, run: int, *, gate: int, keeps: frozenset[int], error: Mapping[str, Any] | None, reason: str
    ) -> list[ReadyStep]:
        """Cancel or fail a run."""
        ...


@dataclass(frozen=True, slots=True)
class Lowered:
    """What to send for some ready steps: a canvas in the adapter's own form.

    `carried`: pending steps whose message the canvas itself will send; `dropped`: steps that no canvas will send any
    longer, because one of their members travels alone.
    """

    canvas: Any
    carried: Sequence[int] = ()
    dropped: Sequence[int] = ()


class Canvas(Protocol):
    """Creates and sends messages: the Celery adapter."""

    def lower(self, run: Run, heads: Sequence[ReadyStep], join: int | None) -> Lowered:
        """Return the canvas for ready steps of one run; `join`: the step id of the reduce that they lead to."""
        ...

    def send(self, lowered: Lowered) -> None:
        """Publish it.  Raises Unavailable."""
        ...

    def depth(self, queue: int) -> int:
        """Return how many messages a queue holds.  Raises Unavailable."""
        ...

    def epoch(self) -> str | None:
        """Return a marker that vanishes with the broker's messages (setting one if missing), or None if impossible."""
        ...
