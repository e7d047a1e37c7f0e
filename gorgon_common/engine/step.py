"""One step, from its claim to what becomes of it.

claim → may it start? → render → (adopt what an earlier run has paid) → provider → result.  Nothing in here writes: the
outcome is a value that `machine` folds into the store, in one transaction.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

from gorgon_common import strict_json
from gorgon_common.clock import Clock
from gorgon_common.costs.usage import CallRecord, Usage
from gorgon_common.engine import admission, composites, limits, rendering, reporting, retry
from gorgon_common.engine.agent import converse, misfits
from gorgon_common.engine.aggregate import aggregate
from gorgon_common.engine.budget import Purse, Short, Vault, unsent
from gorgon_common.engine.context import Knowledge, Run
from gorgon_common.engine.outcomes import BUDGET, RETRY, Done, Ended, Expanded, Failed, Outcome, Parked, Passed
from gorgon_common.engine.poison import POISON_DEATHS
from gorgon_common.engine.ports import AgentProvider, CommandRunner, Pricer
from gorgon_common.engine.records import Checkpoint, Claimed, Expansion, Result, Weight, step_id
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.errors import (
    BudgetExceeded,
    Cancelled,
    CommandExited,
    ConfigurationError,
    ExpressionError,
    Final,
    GorgonError,
    Internal,
    Malformed,
    NotAvailable,
    OutputTooLarge,
    RateLimited,
    Retryable,
    StepError,
    Throttled,
    Unavailable,
    UserError,
)
from gorgon_common.logs import context, get_logger
from gorgon_common.masking import SECRETS
from gorgon_common.roles.models import resolve_model
from gorgon_common.workflow.expressions import Env, conform, render_value
from gorgon_common.workflow.plan import COMPOSITE, Kind, Node

DEFAULT_TIMEOUT = 300.0
DEFAULT_TIER = "standard"
RATE_LIMIT_PAUSE = 1.0
"""Seconds to wait after a 429 that does not say how long."""
LONG_WAIT = 60.0
"""Seconds: a provider that is closed for longer is passed over for the next model of `models:`."""


AWAY_PAUSE = 1.0
"""Seconds until a step is taken up again that could not go on because the database was away."""

log = get_logger(__name__)


class Poison(StepError):
    """The step kills the workers that run it."""

    kind = "poison"


class Overdue(StepError):
    """The step's deadline has passed."""

    kind = "deadline"


_NOTHING = CallRecord("none", "noop", None, 1, Usage(), 0, "", 0, "ok")


class Executor:
    """Executes claimed steps; thread-safe.  `cancelled` tells whether a run has been asked to end."""

    def __init__(
        self,
        knowledge: Knowledge,
        *,
        providers: Mapping[str, AgentProvider],
        commands: CommandRunner,
        pricer: Pricer,
        clock: Clock,
        cancelled: Callable[[int], bool],
        chance: Callable[[], float] = random.random,
        budgets: Vault | None = None,
        poison_deaths: int = POISON_DEATHS,
    ) -> None:
        self.knowledge = knowledge
        self.providers = providers
        self.commands = commands
        self.pricer = pricer
        self.clock = clock
        self.cancelled = cancelled
        self.chance = chance
        self.budgets = budgets
        self.poison_deaths = poison_deaths

    def execute(self, step: Claimed) -> Outcome:
        """Do what the step is there for.  Never raises for what goes wrong in the step itself: failure is data."""
        run = self.knowledge.run(step.run)
        node = run.node(step)
        reporting.started(run, step)
        if node.kind is Kind.NOOP and step.weight == Weight.FAST:
            return _noop(step, self.clock)
        attempt = Attempt(self, run, node, step)
        with context(**reporting.names(run, step)):
            try:
                return self._executed(attempt)
            except Throttled as throttled:
                return attempt.throttled(throttled)

    def _executed(self, attempt: Attempt) -> Outcome:
        try:
            return attempt.outcome()
        except Cancelled:
            return Done(attempt.result(StepStatus.CANCELLED, reason="the run was stopped"))
        except Short as short:
            return attempt.short(short)
        except (StepError, ExpressionError, UserError) as error:
            return attempt.failed(error)
        except Unavailable as error:
            if not attempt.calls:
                raise
            return attempt.interrupted(error)
        except GorgonError:
            raise
        except Exception as error:
            if attempt.node.kind is Kind.END:
                raise  # the run could not end any more
            log.exception("a step failed in a way that nobody expected", step=attempt.step.id)
            return attempt.failed(Internal.of(error))


def _out_of_service(busy: Throttled | RateLimited) -> float | None:
    """Return for how many seconds a model is of no use; None where its turn comes, so that it is to be waited for.

    A long line before it is no reason to take another, which may cost more: a large map would move over as a whole.
    """
    if isinstance(busy, RateLimited):
        seconds = busy.retry_after or 0.0
        return seconds if seconds > LONG_WAIT else None
    if busy.reason == limits.BREAKER:
        return busy.seconds
    exhausted = busy.reason in (limits.RETRY_AFTER, "requests_per_day")
    return busy.seconds if exhausted and busy.seconds > LONG_WAIT else None


def _noop(step: Claimed, clock: Clock) -> Done:
    now = clock.now()
    return Done(
        Result(StepStatus.SUCCEEDED, "", attempts=step.attempt, calls=(_NOTHING,), started_at=now, finished_at=now)
    )


class Attempt:
    """One attempt at one step."""

    def __init__(self, executor: Executor, run: Run, node: Node, step: Claimed) -> None:
        self.executor = executor
        self.run = run
        self.node = node
        self.step = step
        self.calls: list[CallRecord] = []
        self.purse = Purse(executor.budgets, executor.pricer, run, step)
        self.started_at = executor.clock.now()

    def outcome(self) -> Outcome:
        """May it start?  If so, do it."""
        if self.step.crashes >= self.executor.poison_deaths:
            raise Poison(
                f"Its worker died {self.step.crashes} times while the step ran; it is not tried again.",
                hint="See what it does to the worker (memory, signals); `gorgon runs resume` tries it again.",
            )
        stopped = admission.stopped(self.run, self.step)
        if stopped is not None:
            return self.skipped(stopped)
        fallback = self._fallback()
        if fallback is not None:
            return self.ended(composites.fallback_ended(self.run, fallback))
        if self.step.weight == Weight.INLINE and self.node.queue is not None:
            return Passed()
        return self._act()

    def _fallback(self) -> Expansion | None:
        """Return the expansion into the fallback, if it has come to that."""
        if self.step.weight != Weight.INLINE or "fallback" not in self.node.bodies:
            return None
        return next((entry for entry in self.run.expansions(self.step.row) if entry.phase == "fallback"), None)

    def _act(self) -> Outcome:
        match self.node.kind:
            case Kind.AGENT:
                return self._agent()
            case Kind.COMMAND:
                return self._command()
            case Kind.AGGREGATE:
                joined = aggregate(self.node, self.env())
                schema = self.node.spec.get("schema")
                return self.ended(
                    Result(StepStatus.SUCCEEDED, joined if schema is None else self._fitting(schema, joined))
                )
            case Kind.CHECKPOINT:
                text = rendering.text(self.node.spec.get("message") or "", self.env())
                return self.ended(Result(StepStatus.SUCCEEDED, text, detail={"message": text}))
            case Kind.GATE | Kind.FINALLY:
                return self.ended(Result(StepStatus.SUCCEEDED))
            case Kind.END:
                return self._end()
            case Kind.NOOP:
                time.sleep(self.node.spec.get("milliseconds", 0) / 1000)
                self.calls.append(_NOTHING)
                return self.ended(Result(StepStatus.SUCCEEDED, ""))
        if self.node.kind in COMPOSITE:
            parallel = self.run.plan.limits.get("max_parallel")
            outcome = composites.advance(self.run, self.step, parallel=parallel)
            if isinstance(outcome, Expanded) and outcome.phase == "item":
                self.purse.afford(self.node, outcome.items or ())
            return self.ended(outcome.result) if isinstance(outcome, Done) else outcome
        raise NotAvailable(f"`{self.node.name}`: steps of kind {self.node.kind} are not available yet.")

    def env(self) -> Env:
        """Return the names of the step's expressions."""
        return self.run.env(self.step, self.node.refs)

    def cancelled(self) -> bool:
        """Tell whether the call in flight is to be aborted; a run's final steps go on when it was cancelled."""
        if not self.executor.cancelled(self.run.info.id):
            return False
        _, top, _ = self.run.ancestry(self.step)[-1]
        return self.run.plan.nodes[top].phase == "main"

    def _timeout(self) -> float:
        """Return the seconds that this attempt may take.  Raises Overdue where the step's deadline has passed."""
        limit = self.node.timeout or DEFAULT_TIMEOUT
        left = self._left()
        if left is None:
            return limit
        if left <= 0:
            raise Overdue(
                f"`{self.node.name}` did not end within its deadline of {self.node.deadline:g} s.",
                hint="Raise `deadline:`, which counts all attempts and all waits; `gorgon runs logs` shows them.",
            )
        return min(limit, left)

    def _left(self) -> float | None:
        """Return the seconds to the step's deadline; it counts from when the last step before it has ended."""
        if self.node.deadline is None:
            return None
        rows = [self.run.locate(self.step, dep.node) for dep in self.node.deps]
        ids = [step_id(self.run.info.id, row) for row in rows if row is not None]
        ended = [entry.finished_at for entry in self.run.knowledge.checkpoints(ids).values() if entry.finished_at]
        since = max(ended, default=self.run.info.key_at or self.run.info.created_at)
        return self.node.deadline - (self.executor.clock.now() - since).total_seconds()

    # Its end

    def result(self, status: StepStatus, output: Any = None, **fields: Any) -> Result:
        """Return a result of this attempt."""
        return Result(
            status,
            output,
            attempts=self.step.attempt,
            calls=self.paid(),
            started_at=self.started_at,
            finished_at=self.executor.clock.now(),
            **fields,
        )

    def paid(self) -> tuple[CallRecord, ...]:
        """Return the calls of this attempt, and what was reserved for calls that were not made."""
        made = {call.ordinal for call in self.calls}
        return (*self.calls, *(unsent(ordinal) for ordinal in self.purse.held if ordinal not in made))

    def short(self, short: Short) -> Outcome:
        """A budget has no room now: the step waits, which is no attempt."""
        reporting.over_budget(self.run, self.step, short.message, waits=True)
        left = self._left()
        seconds = short.seconds if left is None else max(0.0, min(short.seconds, left))
        room = short.room if short.room.period else None
        return Parked(seconds, BUDGET, short.message, self.paid(), attempt=False, room=room)

    def ended(self, result: Result) -> Done:
        """The step has ended; complete its result."""
        if result.output is None:
            body = ""
        elif (path := strict_json.not_finite(result.output)) is not None:
            where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
            raise Malformed(
                f"`{self.node.name}.output{where}` is NaN or infinite, which is not a number of JSON.",
                hint="Let the step give null, or a text, where there is no number.",
            )
        else:
            body = json.dumps(result.output, default=str)
        if len(body) > rendering.MAX_OUTPUT_BYTES:
            raise OutputTooLarge(
                f"The output of `{self.node.name}` has {len(body) / 1024**2:.1f} MB; at most 10 MB are allowed.",
                hint="Write large results to a file, or let the step return a part of it.",
            )
        done = replace(
            result,
            attempts=self.step.attempt,
            calls=self.paid(),
            started_at=self.started_at,
            finished_at=self.executor.clock.now(),
        )
        return Done(done)

    def skipped(self, reason: str) -> Done:
        """The step does not run, nor does what needs it."""
        result = self.result(StepStatus.SKIPPED, reason=reason)
        return Done(result, self.run.descendants(self.step, failed=False))

    def throttled(self, throttled: Throttled) -> Outcome:
        """There is no room for the call now: the step gives its slot back and comes again, which is no attempt."""
        left = self._left()
        seconds = throttled.seconds if left is None else max(0.0, min(throttled.seconds, left))
        return Parked(seconds, throttled.reason, throttled.message, self.paid(), attempt=False)

    def interrupted(self, error: Unavailable) -> Outcome:
        """The database was away between two calls: the step comes again, and what it has paid for is recorded."""
        return Parked(AWAY_PAUSE, RETRY, error.message, self.paid(), attempt=False)

    def failed(self, error: GorgonError) -> Outcome:
        """The attempt has failed: another one, the step's own way out, or the end of what is around it."""
        if isinstance(error, RateLimited):
            pause = error.retry_after if error.retry_after is not None else RATE_LIMIT_PAUSE
            return Parked(
                pause + 0.1 * self.executor.chance(),
                limits.RETRY_AFTER,
                f"rate limit: {error.message}",
                self.paid(),
                attempt=False,
            )
        if isinstance(error, BudgetExceeded):
            reporting.over_budget(self.run, self.step, error.message, waits=False)
        policy = self.node.retry
        told = self._told(error)
        if isinstance(error, StepError) and retry.again(policy, error, self.step.attempt):
            if isinstance(error, Retryable):
                self.purse.try_again()
            seconds = retry.delay(policy, self.step.attempt, self.executor.chance)
            left = self._left()
            if left is not None and seconds >= left:
                return self._gave_up(told)
            took = (self.executor.clock.now() - self.started_at).total_seconds()
            return Parked(seconds, RETRY, error.message, self.paid(), kind=error.kind, took=max(0.0, took))
        if isinstance(error, StepError) and error.retryable and not told["hint"]:
            tries = "once" if self.step.attempt == 1 else f"{self.step.attempt} times"
            told["hint"] = f"The step was tried {tries}. Raise its `max_retries:`, or continue the run later."
        return self._gave_up(told)

    def _told(self, error: GorgonError) -> dict[str, Any]:
        """Return an error as data: what the checkpoint, `{{error}}` and people get."""
        kind = getattr(error, "kind", "expression" if isinstance(error, ExpressionError) else "error")
        told = {"step": self.run.shown_path(self.step), "kind": kind, "message": error.message}
        return self._summed({**told, "hint": error.hint or None})

    def _summed(self, told: dict[str, Any]) -> dict[str, Any]:
        """Add the error in one sentence, with the workflow and the step."""
        what = "its outputs" if self.node.kind is Kind.END else f"step {told['step']}"
        return {**told, "summary": f"{self.run.info.workflow}: {what} failed: {told['message']}"}

    def _gave_up(self, told: dict[str, Any]) -> Outcome:
        way = self.node.on_failure
        if way.action == "skip":
            result = self.result(StepStatus.SKIPPED, error=told, reason=f"it failed: {told['message']}")
            return Done(result, self.run.descendants(self.step, failed=False))
        if way.action == "default":
            return Done(self.result(StepStatus.SUCCEEDED, way.value, detail={"fallback": told["message"]}))
        if way.action == "step" and self._fallback() is None:
            expanded = composites.fallback(self.run, self.step, told)
            return replace(expanded, result=self.result(StepStatus.FAILED, error=told))
        if way.action == "model" and way.model is not None:
            told = self._other_model(way.model, told)
            if "output" in told:
                return cast(Outcome, told["output"])
        return self._fatal(told)

    def _other_model(self, model: str, told: dict[str, Any]) -> dict[str, Any]:
        provider, _, name = model.partition(":")
        try:
            return {"output": self._ask(provider, name, detail={"fallback": told["message"]})}
        except StepError as error:
            return self._told(error)

    def _fatal(self, told: dict[str, Any]) -> Outcome:
        """The step has failed for good.  Who goes on: its composite, or the end of the run."""
        result = self.result(StepStatus.FAILED, error=told)
        lone = Done(result, self.run.descendants(self.step, failed=True))
        if self.step.parent is None:
            return lone if self.node.phase != "main" else Failed(result, self.run.gate, run_fails=True)
        number, _, _ = self.run.place(self.step.parent)
        around = self.run.plan.nodes[number]
        if around.kind is Kind.MAP and around.spec.get("on_item_failure", "fail") == "fail":
            return Failed(result, self.step.parent, run_fails=False)
        if around.kind is Kind.GROUP and around.spec.get("fail_fast", True):
            return Failed(result, self.step.parent, run_fails=False)
        return lone

    # Its work

    def _agent(self) -> Outcome:
        spec = self.node.spec
        models = spec.get("models") or [f"{spec['provider']}:{spec.get('model') or ''}"]
        failure: StepError | None = None
        waits: list[tuple[float, Throttled | RateLimited]] = []
        for model in models:
            provider, _, name = model.partition(":")
            try:
                return self._ask(provider, name)
            except (Throttled, RateLimited) as busy:
                seconds = _out_of_service(busy)
                if seconds is None:
                    raise
                waits.append((seconds, busy))
            except (StepError, ConfigurationError) as error:
                failure = error if isinstance(error, StepError) else Final(error.message, hint=error.hint)
        if waits:
            shortest, first = min(waits, key=lambda wait: wait[0])
            if failure is None or not failure.retryable or shortest <= LONG_WAIT:
                raise first
        assert failure is not None
        raise failure

    def _ask(self, provider: str, model: str, detail: Mapping[str, Any] | None = None) -> Outcome:
        call = rendering.agent_call(
            self.node.spec,
            self.env(),
            model=resolve_model(provider, model or self.node.spec.get("tier") or DEFAULT_TIER),
            timeout=self._timeout(),
            label=self.run.path(self.step),
            team=self.run.info.team,
            ticket=str(self.step.id),
            patient=any(not call.measured or call.usage != Usage() for call in self.calls),
        )
        request = json.dumps(
            [provider, call.model, call.system, call.messages[0].content, call.schema, call.max_tokens, call.effort],
            sort_keys=True,
        )
        fingerprint = self.run.fingerprint(self.step, request)
        adopted = self._adopted(fingerprint)
        if adopted is not None:
            return adopted
        found = self.executor.providers.get(provider)
        if found is None:
            raise Final(
                f"There is no provider {provider!r}; there are {', '.join(sorted(self.executor.providers))}.",
                hint="Set `provider:` of the step.",
            )
        self.purse.record(self.calls)
        # Another model may have been asked for and not called: what is held for it keeps its number.
        earlier = max([0, *self.purse.held, *(call.ordinal for call in self.calls)])
        if not self.calls:
            self.started_at = self.executor.clock.now()  # the attempt begins after the SDK's import
        result = converse(
            found,
            call,
            pricer=self.executor.pricer,
            provider_name=provider,
            cancelled=self.cancelled,
            on_call=lambda record: self._recorded(replace(record, ordinal=earlier + record.ordinal)),
            clock=self.executor.clock,
            reserve=lambda asked, ordinal: self.purse.reserve(provider, asked, earlier + ordinal),
            over=lambda ordinal: self.purse.over(earlier + ordinal),
            earlier=self.purse.earlier(fingerprint),
            keep=lambda said: self.purse.keep(fingerprint, said, self.calls),
        )
        # A number field stays a decimal even where the model wrote 3: expressions divide by its schema's type.
        output = conform(result.data, call.schema) if call.schema is not None else result.text
        more = {"provider": provider, "model": result.model, "role": call.role, "fingerprint": fingerprint}
        return self.ended(Result(StepStatus.SUCCEEDED, output, detail={**more, **(detail or {})}))

    def _recorded(self, call: CallRecord) -> None:
        self.calls.append(call)
        self.purse.recorded(call)
        reporting.settled(self.run, self.step, call)

    def _adopted(self, fingerprint: str) -> Outcome | None:
        """Return what an earlier run of this root has paid for already."""
        if self.run.info.root == self.run.info.id:
            return None
        root, _, digest = fingerprint.partition(":")
        found = self.run.knowledge.reader.adoptable(int(root), digest)
        if found is None or found.status is not StepStatus.SUCCEEDED:
            return None
        return self.ended(_adoption(found))

    def _command(self) -> Outcome:
        call = rendering.command_call(self.node.spec, self.env(), timeout=self._timeout())
        request = json.dumps([call.argv, call.shell, dict(call.env), call.stdin, call.cwd], sort_keys=True)
        fingerprint = self.run.fingerprint(self.step, SECRETS.mask_json(request))  # a rotated secret is the same work
        adopted = self._adopted(fingerprint)
        if adopted is not None:
            return adopted
        done = self.executor.commands.run(call, self.cancelled)
        if done.exit_code and not self.node.spec.get("allow_failure"):
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise CommandExited(
                f"The command exited with status {done.exit_code}{': ' if last else ''}{''.join(last)[:500]}",
                hint="Write `allow_failure: true` if a non-zero exit status is a result.",
            )
        detail = {"exit_code": done.exit_code, "stderr": done.stderr, "fingerprint": fingerprint}
        output: Any = done.stdout
        schema = self.node.spec.get("schema")
        if schema is not None and done.exit_code == 0:
            output = self._fitting(schema, output)
            detail["stdout"] = done.stdout
        return self.ended(Result(StepStatus.SUCCEEDED, output, detail=detail))

    def _fitting(self, schema: Mapping[str, Any], value: Any) -> Any:
        """Return what a step without a model gives, text read as JSON.  Raises Malformed where it misses its schema."""
        wrong: list[str] = []
        if isinstance(value, str):
            try:
                value = strict_json.loads(value)
            except ValueError as error:
                wrong = [f"it is not JSON: {error}"]
        wrong = wrong or misfits(schema, value)
        if wrong:
            listed = "\n".join(f"- {sentence}" for sentence in wrong)
            raise Malformed(
                f"The output of `{self.node.name}` does not fit its `output:` schema:\n{listed}",
                hint="Print one JSON value that fits, or remove `output:`.",
            )
        return conform(value, schema)

    def _end(self) -> Outcome:
        """The run's last step: its outputs and how it ended."""
        error, cancelled = self.run.knowledge.reader.failure(self.run.info.id)
        outputs: Any = None
        if error is None and not cancelled:
            error = self._late_failure()
            try:
                env = self.run.env(self.step, self.run.plan.output_refs)
                outputs = render_value(dict(self.run.plan.outputs), env, legacy=self.run.plan.lenient)
            except ExpressionError as wrong:
                error = {**self._told(wrong), "step": "outputs"}
                cause = self._first_error()
                if cause is not None:
                    error["message"] += f".  Before that, `{cause['step']}` failed: {cause['message']}"
                    error["hint"] = cause.get("hint") or error["hint"]
                error = self._summed(error)
        status = RunStatus.CANCELLED if cancelled else RunStatus.FAILED if error else RunStatus.SUCCEEDED
        return Ended(self.result(StepStatus.SUCCEEDED), status, outputs, error)

    def _first_error(self) -> dict[str, Any] | None:
        """Return the error of the step that failed first, where the run was to go on without it."""
        ids = [step_id(self.run.info.id, row) for row in range(self.run.plan.top)]
        failed = [found for found in self.run.knowledge.checkpoints(ids).values() if found.error and found.finished_at]
        return dict(min(failed, key=lambda found: str(found.finished_at)).error or {}) if failed else None

    def _late_failure(self) -> dict[str, Any] | None:
        """Return the error of a `finally` step that failed."""
        ids = [step_id(self.run.info.id, row) for row in self.run.keeps]
        for checkpoint in self.run.knowledge.checkpoints(ids).values():
            if checkpoint.status is StepStatus.FAILED:
                return dict(checkpoint.error or {"message": "a final step failed"})
        return None


def _adoption(found: Checkpoint) -> Result:
    """Return the result of a step whose work an earlier run has done; it costs nothing."""
    return Result(StepStatus.SUCCEEDED, found.output, detail={**found.detail, "adopted_from": found.id})
