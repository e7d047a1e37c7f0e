"""Concurrency keys: computing a run's key, and cancelling the holders of a key for a run that replaces them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Protocol

from gorgon_common.clock import format_time
from gorgon_common.engine.context import RunCache
from gorgon_common.engine.publish import Publisher
from gorgon_common.engine.records import KeyRequest, ReadyStep
from gorgon_common.errors import Conflict, ExpressionError, InputInvalid
from gorgon_common.workflow.expressions import Env, to_text
from gorgon_common.workflow.expressions.expression import Expression, parse_template
from gorgon_common.workflow.plan import Plan


class Stops(Protocol):
    """The store as an eviction uses it."""

    def stop(
        self, run: int, *, gate: int, keeps: frozenset[int], error: Mapping[str, Any] | None, reason: str
    ) -> list[ReadyStep]:
        """Cancel or fail a run."""
        ...


def hold_of(plan: Plan, inputs: Mapping[str, Any], *, run_id: str, team: str, now: datetime) -> KeyRequest | None:
    """Return the key that a run of a plan asks for, or None if the workflow has none.

    Raises InputInvalid if the key cannot be computed from these inputs.
    """
    spec = plan.concurrency
    if spec is None:
        return None
    source = str(spec["key"])
    run = {"id": run_id, "workflow": plan.name, "team": team, "started_at": format_time(now)}
    names = {"inputs": inputs, "run": run}
    env = Env({**inputs, **names} if plan.lenient else names, lenient=plan.lenient)
    try:
        key = "".join(_piece(part, env) for part in parse_template(source, plan.lenient).parts).strip()
    except ExpressionError as error:
        raise InputInvalid(
            f"The concurrency key `{source}` cannot be made: {error.message}",
            hint=error.hint or "Give the input that it is made of.",
        ) from error
    if not key:
        raise InputInvalid(
            f"The concurrency key `{source}` is empty with these inputs.",
            hint="Give the input that it is made from, or add fixed text to the key.",
        )
    return KeyRequest(key, int(spec.get("max", 1)), str(spec.get("on_conflict", "queue")))


def _piece(part: str | Expression, env: Env) -> str:
    if isinstance(part, str):
        return part
    value = part.evaluate(env)
    if value is None:  # otherwise all runs without a value would share the key "null"
        raise ExpressionError(
            "one of its inputs was not given", hint="Give that input, or write `default(x, y)` into the key."
        )
    return to_text(value)


def evict(store: Stops, knowledge: RunCache, publisher: Publisher, holders: Iterable[int]) -> None:
    """Cancel runs of this publisher's home for a run that waits for their key; other homes' sweeps cancel theirs."""
    for number in holders:
        run = knowledge.run(number)
        if run.info.home != publisher.home:
            continue
        try:
            heads = store.stop(
                number, gate=run.gate, keeps=run.keeps, error=None, reason="a newer run took its concurrency key"
            )
        except Conflict:
            continue  # it has ended in the meantime
        publisher.publish(heads)
