"""Every exception that Gorgon raises on purpose.

    GorgonError
    ├── UserError                 the user can fix it: exit code 2, HTTP 4xx
    │   ├── WorkflowInvalid       the file does not load; carries every Problem found
    │   ├── InputInvalid          an input is missing, unknown or of the wrong type
    │   ├── NotFound              no such run, workflow or role (in this team)
    │   ├── Conflict              the current state forbids it: a finished run cannot be cancelled
    │   │   └── KeyTaken          another run holds the concurrency key, and the workflow says `reject`
    │   ├── NotAvailable          a step kind or feature that this version cannot execute
    │   ├── Forbidden             the API key may not act for this team
    │   └── ConfigurationError    a setting is missing or wrong
    ├── ExpressionError           an expression failed during a run
    ├── StepError                 a step failed; the retry policy looks at this error
    │   ├── ProviderError         a call to a provider failed
    │   │   ├── RateLimited       429: wait; this does not count as an attempt
    │   │   ├── Retryable         timeout, 5xx, overload, connection
    │   │   ├── Malformed         the reply cannot be read, or does not match its schema
    │   │   ├── Refused           the model declined
    │   │   └── Final             bad key, unknown model, no quota: retrying cannot help
    │   ├── BudgetExceeded        a budget has no room for the call
    │   ├── Unpriced              the cost of the call cannot be predicted
    │   ├── OverLimit             a call needs more than the whole rate limit, so it can never be made
    │   ├── CommandFailed         a command may not run, cannot run or exceeded a limit
    │   │   └── CommandExited     it ended with a non-zero status: another attempt may help
    │   ├── OutputTooLarge        a result is over the cap
    │   └── Internal              Gorgon itself failed at the step: a bug
    ├── Throttled                 no room for a call now: retry later; no call was made, no attempt is used
    ├── Cancelled                 the run was cancelled while a call was in flight
    └── Unavailable               the database or the broker cannot be reached: exit code 2, HTTP 503
        ├── PlanTooNew            a newer version of Gorgon compiled the plan: its workers run it
        └── StorageFault          the database is there and cannot store anything: its disk is full, read-only, broken

The class docstring is the default message.  `hint` says what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem in a workflow file, reported to its author.

    `line` and `column` count from 1.  `path` is the position in the document (`steps[2].prompt`).  `severity` is
    `error` or `warning`; warnings never stop a file from loading.
    """

    message: str
    file: str | None = None
    line: int | None = None
    column: int | None = None
    path: str = ""
    hint: str = ""
    severity: str = "error"
    text: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, as printed by `validate --json`."""
        return asdict(self)

    def __str__(self) -> str:
        where = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        hint = f"\n    {self.hint}" if self.hint else ""
        return f"{where}{': ' if where else ''}{self.severity}: {self.message}{hint}"


class GorgonError(Exception):
    """Something went wrong."""

    hint: str = ""

    def __init__(self, message: str | None = None, *, hint: str | None = None) -> None:
        super().__init__(message or type(self).__doc__ or type(self).__name__)
        if hint is not None:
            self.hint = hint

    @property
    def message(self) -> str:
        """What is wrong, in one sentence."""
        return str(self.args[0])


class UserError(GorgonError):
    """The request cannot be served as it is."""


class WorkflowInvalid(UserError):
    """The workflow file is not valid.

    `source` is the text in which the problems were found, None if it is not available.
    """

    def __init__(self, problems: list[Problem], *, source: str | None = None) -> None:
        self.problems = problems
        self.source = source
        super().__init__("\n".join(str(problem) for problem in problems))


class InputInvalid(UserError):
    """The inputs do not fit the workflow."""


class NotFound(UserError):
    """There is no such thing."""


class Conflict(UserError):
    """Its state does not allow this."""


class KeyTaken(Conflict):
    """Another run holds the concurrency key.

    `held_by`: the ids of the runs that hold it, then of those that wait; `numbers`: their internal ids in the store.
    """

    def __init__(
        self,
        message: str | None = None,
        *,
        hint: str | None = None,
        key: str = "",
        held_by: Sequence[str] = (),
        numbers: Sequence[int] = (),
    ) -> None:
        super().__init__(message, hint=hint)
        self.key = key
        self.held_by = list(held_by)
        self.numbers = list(numbers)


class NotAvailable(UserError):
    """Not available yet."""


class Forbidden(UserError):
    """The API key may not do this.

    `team`: the team that it may not act for; "" if the action requires all teams.
    """

    def __init__(self, message: str | None = None, *, hint: str | None = None, team: str = "") -> None:
        super().__init__(message, hint=hint)
        self.team = team


class ConfigurationError(UserError):
    """A setting is missing or wrong."""


class ExpressionError(GorgonError):
    """An expression could not be evaluated."""


class StepError(GorgonError):
    """The step failed.

    `kind` is one of the words of `retry: {on: […]}` (timeout, server, connection, invalid_output) or a word of its own;
    `retryable` says whether another attempt can help at all.
    """

    kind: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False


class ProviderError(StepError):
    """The provider could not serve the call.

    `usage` is what the call is charged for despite the failure (a `costs.usage.Usage`): zero if certainly nothing is
    charged, None if it is unknown (the connection broke before the reply).  `headers` are the rate-limit headers of the
    reply, in lower case.
    """

    def __init__(
        self,
        message: str | None = None,
        *,
        hint: str | None = None,
        kind: str | None = None,
        status: int | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        if kind is not None:
            self.kind = kind  # type: ignore[misc]  # an instance may be more exact than its class
        self.status = status
        self.request_id = request_id
        self.usage: Any = None
        self.model: str | None = None
        self.service_tier: str | None = None
        self.headers: Mapping[str, str] = {}


class RateLimited(ProviderError):
    """The provider's rate limit was reached.

    `retry_after` is in seconds, None if the provider did not state it.
    """

    kind = "rate_limited"
    retryable = True

    def __init__(self, message: str | None = None, *, retry_after: float | None = None, **details: Any) -> None:
        super().__init__(message, **details)
        self.retry_after = retry_after


class Retryable(ProviderError):
    """The provider failed for a reason that may pass.  `kind`: timeout, server, overloaded or connection."""

    kind = "server"
    retryable = True


class Malformed(ProviderError):
    """The reply cannot be read, or does not fit the output schema."""

    kind = "invalid_output"
    retryable = True


class Refused(ProviderError):
    """The model declined to answer."""

    kind = "refused"


class Final(ProviderError):
    """The provider rejected the call; trying again cannot help."""

    kind = "rejected"


class BudgetExceeded(StepError):
    """A budget has no room for this call.

    `budget` is its display name.  The amounts are micro-dollars and tokens, None if there is no such limit.
    """

    kind = "budget"

    def __init__(
        self,
        message: str | None = None,
        *,
        hint: str | None = None,
        budget: str = "",
        **amounts: int | None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.budget = budget
        self.amounts = amounts
        """limit, spent, reserved and missing, each in `_usd` and `_tokens`."""


class Unpriced(StepError):
    """The model has no price."""

    kind = "unpriced"


class CommandFailed(StepError):
    """The command failed."""

    kind = "command"


class CommandExited(CommandFailed):
    """The command ended with a non-zero status."""

    retryable = True


class OutputTooLarge(StepError):
    """The result is larger than a step may return."""

    kind = "output_too_large"


class Internal(StepError):
    """Gorgon itself failed at this step."""

    kind = "internal"
    hint = "This is a fault of Gorgon; the log of the worker has the traceback. Please report it."

    @classmethod
    def of(cls, error: Exception) -> Internal:
        """Return the failure of a step for an unexpected exception, with the exception's own class name."""
        said = " ".join(str(error).split())[:300]
        return cls(f"Gorgon failed at this step: {type(error).__name__}{': ' if said else ''}{said}")


class OverLimit(StepError):
    """The call needs more than the whole rate limit."""

    kind = "over_limit"


class Throttled(GorgonError):
    """There is no room for the call now.

    Retry in `seconds`, at `until` (seconds since 1970).  `reason`: see `engine.limits.Wait`.
    """

    def __init__(self, message: str | None = None, *, seconds: float, reason: str, until: float) -> None:
        super().__init__(message)
        self.seconds = seconds
        self.reason = reason
        self.until = until


class Cancelled(GorgonError):
    """The run was cancelled.

    `made`: a call was in flight, and may be charged.
    """

    def __init__(self, message: str | None = None, *, made: bool = True) -> None:
        super().__init__(message or "The run was cancelled.")
        self.made = made


class Unavailable(GorgonError):
    """A service that Gorgon needs cannot be reached."""


class PlanTooNew(Unavailable):
    """A newer version of Gorgon compiled this plan."""


class StorageFault(Unavailable):
    """The disk of the database cannot be written."""
