"""The names in a step's expressions, and what they stand for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from gorgon_common.clock import format_time
from gorgon_common.engine.records import Checkpoint, Claimed, step_id
from gorgon_common.engine.states import StepStatus
from gorgon_common.errors import ConfigurationError
from gorgon_common.masking import SECRETS, SHORTEST
from gorgon_common.workflow.expressions import MISSING, StepValue
from gorgon_common.workflow.plan import Ref

if TYPE_CHECKING:
    from gorgon_common.engine.context import Run


class ExpressionScope(Mapping[str, Any]):
    """The names in one step's expressions, resolved on first use; all referenced steps are loaded together."""

    def __init__(self, run: Run, step: Claimed, refs: Mapping[str, Ref], extra: Mapping[str, Any]) -> None:
        self._run = run
        self._step = step
        self._refs = refs
        self._values = dict(extra)
        self._steps: dict[int, StepValue] | None = None

    def __iter__(self) -> Iterator[str]:
        return iter({**self._refs, **self._values})

    def __len__(self) -> int:
        return len({**self._refs, **self._values})

    def __contains__(self, name: object) -> bool:
        return name in self._values or name in self._refs

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            self._values[name] = self._resolve(self._refs[name])
        return self._values[name]

    def _resolve(self, ref: Ref) -> Any:
        info = self._run.info
        match ref.kind:
            case "input":
                return info.inputs if ref.field is None else info.inputs.get(ref.field, MISSING)
            case "step":
                return self._all()[_number(ref)]
            case "published":
                # Several steps may publish the same name, each under its own condition.
                for number in (_number(ref), *ref.nodes):
                    found = self._all()[number].published.get(ref.field or "", MISSING)
                    if found is not MISSING:
                        return found
                return MISSING
            case "steps":
                return {self._run.plan.nodes[number].id: self._all()[number] for number in ref.nodes}
            case "item" | "index":
                return self._item(ref)
            case "results":
                return results(self._run, self._above(ref)[0])
            case "run":
                return {
                    "id": info.public_id,
                    "workflow": info.workflow,
                    "team": info.team,
                    "started_at": format_time(info.created_at),
                }
            case "error":
                return self._error()
            case "secret":
                return Secrets(self._run.plan.secrets)
        raise AssertionError(f"no such kind of reference: {ref.kind}")

    def _all(self) -> dict[int, StepValue]:
        if self._steps is None:
            wanted = {
                number
                for ref in self._refs.values()
                if ref.kind in ("step", "published", "steps")
                for number in (*ref.nodes, *(() if ref.node is None else (ref.node,)))
            }
            rows = {number: self._run.resolve(self._step, number) for number in wanted}
            ids = {number: step_id(self._run.info.id, row) for number, row in rows.items() if row is not None}
            found = self._run.knowledge.checkpoints(list(ids.values()))
            self._steps = {number: self._run.value(number, found.get(ids.get(number, -1))) for number in wanted}
        return self._steps

    def _above(self, ref: Ref) -> tuple[int, int | None]:
        """Return the row of the composite that a reference refers to, and the position of the child around the step."""
        chain = self._run.ancestry(self._step)
        for (_, _, position), (row, node, _) in pairwise(chain):
            if node == ref.node:
                return row, position
        return chain[0][0], chain[0][2]

    def _item(self, ref: Ref) -> Any:
        row, position = self._above(ref)
        if ref.kind == "index":
            return position
        for expansion in self._run.expansions(row):
            if expansion.phase == "item":
                return expansion.items[position or 0]
        return MISSING

    def _error(self) -> Any:
        for row, number, _ in self._run.ancestry(self._step)[1:]:
            if "fallback" in self._run.plan.nodes[number].bodies:
                for expansion in self._run.expansions(row):
                    if expansion.phase == "fallback":
                        return expansion.items[0]
        error, _ = self._run.knowledge.reader.failure(self._run.info.id)
        return error if error is not None else MISSING


class Secrets(Mapping[str, str]):
    """The secrets that a workflow names, read from the worker's environment.  Each is masked once it has been read."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> str:
        if name not in self._names:
            raise KeyError(name)
        value = os.environ.get(name)
        if value is None:
            raise ConfigurationError(
                f"The secret {name} is not set where this step runs.", hint=f"Set the environment variable {name}."
            )
        if not SECRETS.add(name, value, declared=True):
            raise ConfigurationError(
                f"The secret {name} is too short: below {SHORTEST} characters it cannot be masked in what steps print.",
                hint=f"Use a longer value in {name}. If it is not secret, make it an input instead.",
            )
        return value


def results(run: Run, row: int) -> list[Any]:
    """Return the results of a map's items, in order; a failed item is `{"failed": true, "error": …}`."""
    expansion = next((entry for entry in run.expansions(row) if entry.phase == "item"), None)
    if expansion is None:
        return []
    items = range(expansion.base, expansion.base + len(expansion.items))
    found = run.knowledge.checkpoints([step_id(run.info.id, child) for child in items])
    return [result(found.get(step_id(run.info.id, child))) for child in items]


def result(checkpoint: Checkpoint | None) -> Any:
    """Return the result of one item."""
    if checkpoint is None:
        return {"failed": True, "error": "it did not run"}
    match checkpoint.status:
        case StepStatus.SUCCEEDED:
            return checkpoint.output
        case StepStatus.SKIPPED:
            return {"skipped": True, "reason": checkpoint.reason}
        case _:
            message = (checkpoint.error or {}).get("message", checkpoint.reason)
            return {"failed": True, "error": message}


def _number(ref: Ref) -> int:
    assert ref.node is not None
    return ref.node
