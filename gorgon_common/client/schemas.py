"""The shapes that travel over /v1 and that `--json` prints.

Times are RFC 3339 in UTC with microseconds and `Z`; money is in US dollars.  Within /v1, fields may be added, but none
is renamed or removed.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, field_validator

Target = Literal["sandbox", "live"]
RunStatus = Literal["queued", "running", "paused", "finishing", "succeeded", "failed", "cancelled"]
StepStatus = Literal[
    "pending", "ready", "running", "waiting", "in_doubt", "succeeded", "failed", "skipped", "cancelled"
]

RUN_FINISHED = frozenset({"succeeded", "failed", "cancelled"})
"""Run statuses after which nothing changes."""

MAX_PAGE = 200
"""The maximum number of items on one page."""

_COST = "US dollars; null where the cost of a call is unknown, which is never 0."
_KNOWN = "US dollars: the sum of the calls whose cost is known."
_UNPRICED = "Calls whose cost is unknown: the model has no price, or it is not known what was used."
_RUN_ID = "run_01KAR6V7Q3M8Z5T2N4H9C1X0WB"
_STEP_EXAMPLE: dict[str, Any] = {
    "id": "plan",
    "item": None,
    "parent": None,
    "kind": "agent",
    "role": "planner",
    "provider": "anthropic",
    "model": "claude-opus",
    "status": "succeeded",
    "reason": None,
    "waits": None,
    "output": {"approved": True, "title": "Dark mode"},
    "error": None,
    "attempts": 1,
    "tokens": {"input": 412, "output": 655},
    "cost_usd": 0.011885,
    "known_cost_usd": 0.011885,
    "unpriced_calls": 0,
    "started_at": "2026-11-22T09:30:00.112233Z",
    "finished_at": "2026-11-22T09:30:02.445566Z",
}
_RUN_EXAMPLE: dict[str, Any] = {
    "run_id": _RUN_ID,
    "workflow": "Feature Build",
    "status": "succeeded",
    "outputs": {"review": "Looks good."},
    "error": None,
    "cost_usd": 0.042,
    "known_cost_usd": 0.042,
    "unpriced_calls": 0,
    "tokens": {"input": 2310, "output": 4105},
    "started_at": "2026-11-22T09:30:00.101010Z",
    "finished_at": "2026-11-22T09:30:09.202020Z",
}


_TEAM = Field(
    None,
    min_length=1,
    max_length=100,
    pattern=r"^[^\x00]+$",
    description="Who owns the run, its cost and its budgets; without it the file's `team:` does.",
)


class _Sent(BaseModel):
    """A body sent by the server: fields of a newer server are kept, not rejected."""

    model_config = ConfigDict(extra="allow")


class _Received(BaseModel):
    """A body sent by a client: an unknown key is a mistake, and is reported."""

    model_config = ConfigDict(extra="forbid")


class Tokens(_Sent):
    """Tokens used; `input` includes cached ones."""

    input: int = 0
    output: int = 0


class Step(_Sent):
    """One step of a run, or one item of a map, or one iteration of a loop."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"examples": [_STEP_EXAMPLE]})

    id: str
    item: int | None = Field(None, description="The item or iteration that it belongs to, from 0.")
    parent: str | None = Field(None, description="The group, map or loop that it is part of.")
    kind: str
    role: str | None = None
    provider: str | None = None
    model: str | None = None
    status: StepStatus
    reason: str | None = Field(None, description="Why it waits or was skipped.")
    waits: dict[str, Any] | None = Field(
        None, description="What it waits for: `{why, since, until}`, null if it does not."
    )
    output: Any = None
    error: Any = None
    attempts: int = 0
    tokens: Tokens = Tokens()
    cost_usd: float | None = Field(None, description=_COST)
    known_cost_usd: float = Field(0.0, description=_KNOWN)
    unpriced_calls: int = Field(0, description=_UNPRICED)
    started_at: str | None = None
    finished_at: str | None = None


class Run(_Sent):
    """One run of a workflow; `steps` only on request."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"examples": [_RUN_EXAMPLE]})

    run_id: str
    workflow: str
    status: RunStatus
    outputs: dict[str, Any] | None = None
    error: Any = None
    cost_usd: float | None = Field(None, description=_COST)
    known_cost_usd: float = Field(0.0, description=_KNOWN)
    unpriced_calls: int = Field(0, description=_UNPRICED)
    tokens: Tokens = Tokens()
    team: str | None = None
    target: Target | None = None
    trace_id: str | None = Field(None, description="The trace that it is part of: that of `traceparent`, or its own.")
    created_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None
    orphaned: bool | None = Field(
        None, description="Whether the process that runs it has died; only there where one process runs it."
    )
    waits_for: KeyWait | None = Field(None, description="Only there while the run waits for its concurrency key.")
    steps: list[Step] | None = None


class KeyHolder(_Sent):
    """A run that holds a concurrency key."""

    run_id: str
    workflow: str
    status: RunStatus
    since: str
    process_died: bool = Field(False, description="It belongs to one process, which has died.")


class KeyWait(_Sent):
    """The concurrency key that a queued run waits for; the run starts when it gets the key."""

    key: str
    max: int = Field(description="How many runs may hold it for this one to start.")
    on_conflict: str
    since: str
    ahead: int = Field(description="Runs that wait before this one.")
    held_by: list[KeyHolder]
    what: str = Field(description="All of it in a sentence.")


class RunPage(_Sent):
    """Runs, newest first.  `next` is the cursor of the next page, null on the last."""

    items: list[Run]
    next: str | None = None


class StepPage(_Sent):
    """Steps of a run, in the order of the workflow.  `next` is the cursor of the next page, null on the last."""

    items: list[Step]
    next: str | None = None


class Event(_Sent):
    """One entry of a run's journal; `seq` increases within the run and is the SSE id."""

    seq: int
    at: str
    kind: str
    step: str | None = None
    message: str | None = None
    data: Any = None


class Submission(_Received):
    """A run to start: `workflow`, the name of a bundled one, or `source`, the text of a YAML file."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"workflow": "feature-build", "inputs": {"feature_request": "Dark mode"}, "target": "sandbox"},
                {"source": "name: Hello\nsteps:\n  - {id: hi, role: planner, prompt: Plan a greeting}\n"},
            ]
        },
    )

    workflow: str | None = Field(None, min_length=1, max_length=200)
    source: str | None = Field(None, min_length=1, max_length=4_194_304)
    inputs: dict[str, Any] = Field(default_factory=dict)
    target: Target = "sandbox"
    team: str | None = _TEAM
    max_cost_usd: StrictFloat | None = Field(
        None, ge=0, le=1e9, description="What the run may spend, all its resumes included; budgets hold besides."
    )

    @field_validator("inputs")
    @classmethod
    def _storable(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError):
            raise ValueError("the values must be JSON: no NaN or Infinity, no half of a surrogate pair") from None
        return value


class Accepted(_Sent):
    """A run that was accepted.  `reused` steps are adopted from the run that it continues; `to_run` steps remain."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={"examples": [{"run_id": _RUN_ID, "created": True, "reused": 0, "to_run": 6}]},
    )

    run_id: str
    created: bool = Field(True, description="False where the Idempotency-Key was known already.")
    reused: int = 0
    to_run: int = 0


class Source(_Received):
    """A workflow to inspect, given as in Submission."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"source": "name: Hello\nsteps:\n  - {id: hi, role: planner, prompt: Plan a greeting}\n"}]
        },
    )

    workflow: str | None = Field(None, min_length=1, max_length=200)
    source: str | None = Field(None, min_length=1, max_length=4_194_304)


class Planning(Source):
    """A workflow to inspect, and the inputs of a run."""

    inputs: dict[str, Any] | None = Field(None, description="The run's inputs; without them their defaults.")
    target: Target = "sandbox"
    team: str | None = _TEAM
    estimate: bool = Field(True, description="false: only compile it.")


class ProblemItem(_Sent):
    """One problem in a workflow; `line` and `column` count from 1."""

    file: str | None = None
    line: int | None = None
    column: int | None = None
    path: str = ""
    message: str
    hint: str = ""
    severity: str = "error"


class Validation(_Sent):
    """Whether a workflow loads, and all its problems."""

    valid: bool
    problems: list[ProblemItem]


class PlanNode(_Sent):
    """One compiled step; `needs` are the ids that it waits for, `parent` is the group, map or loop that contains it."""

    id: str
    kind: str
    queue: str | None = None
    role: str | None = None
    needs: list[str] = []
    parent: str | None = None


class Band(_Sent):
    """A forecast quantity: 2.5 % quantile, mean, 95 % quantile, and upper bound; null if unknown."""

    low: float
    expected: float | None = None
    p95: float | None = None
    worst: float | None = None


class TokenBands(_Sent):
    """Forecast tokens."""

    input: Band
    output: Band


class Amounts(_Sent):
    """The forecast for a step or a run."""

    calls: Band
    tokens: TokenBands
    cost_usd: Band
    time_s: Band


class StepEstimate(Amounts):
    """The forecast for a step over all its repetitions; the figures of a composite include those of its parts."""

    id: str
    kind: str
    parent: str | None = None
    role: str | None = None
    models: list[str] = []
    runs: str | float = Field("always", description="always, never, or how likely it is.")
    basis: list[str] = Field([], description="history, similar calls, assumption")


class Estimate(_Sent):
    """The predicted usage of a run."""

    workflow: str
    target: Target
    total: Amounts
    unknown: dict[str, list[str]] = Field(description="Steps whose cost or time nobody knows.")
    steps: list[StepEstimate]
    critical_path: list[dict[str, Any]]
    models: list[dict[str, Any]]
    binding_quota: dict[str, Any] | None = None
    budgets: list[dict[str, Any]]
    assumptions: list[str]


class PlanView(_Sent):
    """A compiled workflow."""

    workflow: str
    hash: str
    inputs: dict[str, Any]
    outputs: list[str]
    nodes: list[PlanNode]
    problems: list[ProblemItem] = []
    unavailable: list[str] = Field(default_factory=list, description="Why it cannot run yet, a sentence for each step.")
    estimate: Estimate | None = Field(None, description="Null where it was not asked for, or an input is missing.")
    estimate_problem: str | None = Field(None, description="Why there is no estimate.")


class WorkflowSummary(_Sent):
    """A bundled workflow."""

    name: str
    title: str = ""
    description: str = ""


class WorkflowList(_Sent):
    """The bundled workflows."""

    items: list[WorkflowSummary]


class RoleSummary(_Sent):
    """An agent role: its purpose, and the model it runs on unless a step says otherwise."""

    name: str
    purpose: str = ""
    provider: str | None = None
    model: str | None = None


class RoleList(_Sent):
    """The agent roles."""

    items: list[RoleSummary]


class WaitEntry(_Sent):
    """What one step waits for.

    `why`: key (the run's concurrency key), dependency, max_parallel, queue, backlog, no_worker, paused, running,
    lost_worker, retry, quota, breaker, concurrency, turn, limiter, budget, in_doubt or waiting.  `reason` is more
    specific for a parked step: for a quota, its dimension.  `until` is null if it cannot be predicted.
    """

    step: str
    item: int | None = None
    status: StepStatus
    why: str
    reason: str | None = None
    what: str
    since: str | None = None
    until: str | None = None


class Explanation(_Sent):
    """Why a run is in its current state, what its money was spent on, and how long its parts took."""

    run_id: str
    workflow: str
    status: RunStatus
    step: str | None = None
    as_of: str
    waits_for: KeyWait | None = Field(None, description="The concurrency key that the run as a whole waits for.")
    waiting_for: dict[str, int] = Field(description="What steps wait for, and how many.")
    waiting: list[WaitEntry]
    money: dict[str, Any]
    time: dict[str, Any]


class BudgetAccount(_Sent):
    """What was spent of a budget in its current period; amounts in dollars and tokens."""

    label: str
    target: str
    starts_at: str | None = None
    ends_at: str | None = None
    usd_spent: float = 0.0
    usd_reserved: float = 0.0
    usd_overrun: float = 0.0
    token_spent: int = 0
    token_reserved: int = 0
    token_overrun: int = 0


class BudgetView(_Sent):
    """What an org, a team or a workflow may spend; null if there is no such limit."""

    scope: Literal["org", "team", "workflow"]
    name: str
    period: str
    timezone: str
    usd_limit: float | None = None
    token_limit: int | None = None
    accounts: list[BudgetAccount] = []


class BudgetList(_Sent):
    """The budgets."""

    items: list[BudgetView]


class BudgetChange(_Received):
    """A budget to set or change; omitted fields keep their values, null removes a limit."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"scope": "team:platform", "period": "month", "usd": "100"}]}
    )

    scope: str = Field(max_length=300, pattern=r"^[^\x00]+$", description="org, team:NAME or workflow:NAME.")
    period: str = Field("month", max_length=20, description="run (each one), day or month.")
    timezone: str | None = Field(None, max_length=100, description="Where its days begin, such as Europe/Berlin.")
    usd: str | StrictInt | StrictFloat | None = Field(None, description="Dollars; as text they are exact.")
    tokens: str | StrictInt | None = None


class LimitsView(_Sent):
    """The recent use of each model's rate limits (`gates`), the limits that were set, and the accuracy of token
    estimates.
    """

    gates: list[dict[str, Any]]
    rules: list[dict[str, Any]]
    estimates: list[dict[str, Any]]


class LimitChange(_Received):
    """Limits for the models of a provider that match a pattern; per minute, except those per day."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"provider": "openai", "model": "gpt-5*", "limits": {"requests": 500}}]},
    )

    provider: str = Field(max_length=100, pattern=r"^[^\x00]+$")
    model: str = Field("*", max_length=200, pattern=r"^[^\x00]+$")
    limits: dict[str, StrictFloat] = Field(
        {}, description="requests, requests_per_day, tokens, input_tokens, output_tokens, concurrency"
    )
    clear: StrictBool = Field(False, description="Forget first what was set for them.")


class LimitRule(_Sent):
    """The limits now set for a pattern."""

    provider: str
    model: str
    limits: dict[str, float]
    cleared: bool = False


class CallTokens(_Sent):
    """Tokens of calls by kind.  `input` includes cached ones, `output` includes reasoning."""

    input: int = 0
    cache_read: int = 0
    cache_write: int = 0
    output: int = 0
    reasoning: int = 0


class CostRow(_Sent):
    """The cost of some calls; it also has the dimensions by which the report is grouped."""

    calls: int
    failed_calls: int = 0
    runs: int = 0
    tokens: CallTokens = CallTokens()
    cost_usd: float | None = Field(None, description=_COST)
    known_cost_usd: float = Field(0.0, description=_KNOWN)
    unpriced_calls: int = Field(0, description=_UNPRICED)
    latency_ms: float | None = Field(None, description="Mean of the calls.")


class CostReport(_Sent):
    """Costs by one or more dimensions, highest first (by day: oldest first)."""

    by: list[str]
    rows: list[CostRow]
    groups: int = Field(0, description="Rows that there are; `rows` may hold fewer.")
    total: CostRow
    targets: list[str] = Field([], description="The targets whose calls `rows` and `total` count.")
    by_target: dict[str, CostRow] = Field(
        {}, description="Sums by target, those that are not counted too: the sandbox's are play money."
    )


class CallRow(_Sent):
    """One call to a model."""

    at: str
    provider: str
    model: str
    role: str | None = None
    team: str
    workflow: str
    run: str | None = None
    step: str | None = None
    item: int | None = None
    attempt: int
    call: int = Field(1, description="1, 2 … within the attempt: repairs and further models.")
    tokens: CallTokens
    cost_usd: float | None = Field(None, description="US dollars; null where it is unknown, which is never 0.")
    price_version: str | None = None
    latency_ms: int | None = None
    outcome: str
    request_id: str | None = None
    target: str


class CallPage(_Sent):
    """Calls, ordered by run and step.  `next` is the cursor of the next page, null on the last."""

    items: list[CallRow]
    next: str | None = None


class Check(_Sent):
    """Whether one dependency of the server can be reached."""

    ok: bool
    detail: str = ""


class Health(_Sent):
    """Whether the server can work."""

    status: Literal["ok", "unavailable"]
    checks: dict[str, Check] = {}


class FieldError(_Sent):
    """One invalid field of a request; `field` is its path (`inputs.targets`)."""

    field: str
    message: str


class ErrorBody(_Sent):
    """The body of every error (RFC 9457, application/problem+json)."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:gorgon:error:not-found",
                    "title": "Not found",
                    "status": 404,
                    "detail": "There is no run run_01KAR6V7Q3M8Z5T2N4H9C1X0WB.",
                    "hint": "GET /v1/runs lists the runs.",
                }
            ]
        },
    )

    type: str
    title: str
    status: int
    detail: str
    hint: str | None = None
    errors: list[FieldError] | None = None
    problems: list[ProblemItem] | None = None
    key: str | None = Field(None, description="The concurrency key that another run holds.")
    held_by: list[str] | None = Field(None, description="The runs that hold it, and those that wait for it.")
    team: str | None = Field(None, description="The team that the API key may not act for.")
