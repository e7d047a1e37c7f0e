"""Reads the tasks and dependencies given to `RateLimitedParallelExecutor`, and reports mistakes in them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from gorgon_common.errors import InputInvalid

_HINT = "A task is a function, {'call': function, 'provider': …, 'id': …}, or a ParallelTask."


@dataclass(frozen=True, slots=True)
class ParallelTask:
    """One call to make.

    `call` is a function or a coroutine function.  `provider` names the provider whose limits apply; without one, the
    task counts against every provider of the executor.  `model`, `tokens_in` and `tokens_out` (upper bounds for the
    call) matter only to a shared limiter.

    A `call` gets the results of the tasks that it depends on: parameters named like those tasks get their results, and
    a single other parameter gets `{task id: result}`.
    """

    id: str
    provider: str | None
    call: Callable[..., Any]
    model: str = "*"
    tokens_in: int = 0
    tokens_out: int = 0


Given = ParallelTask | Mapping[str, Any] | Callable[..., Any]
"""A task in any form that a caller may use."""


def read_tasks(given: Sequence[Given]) -> dict[str, ParallelTask]:
    """Return the tasks by id; a function is named by its `__name__`.  Raises InputInvalid for anything that is not a
    task.
    """
    tasks: dict[str, ParallelTask] = {}
    for position, entry in enumerate(given):
        task = _read(position, entry)
        if task.id in tasks:
            raise InputInvalid(
                f"Two tasks are named {task.id!r}.", hint="Give one another name: {'id': …, 'call': function}."
            )
        tasks[task.id] = task
    return tasks


def _read(position: int, given: Any) -> ParallelTask:
    where = f"tasks[{position}]"
    if inspect.iscoroutine(given):
        given.close()  # otherwise Python warns that it was never awaited
        raise InputInvalid(
            f"{where} is a coroutine, not a function.",
            hint="Pass the function without calling it: `step`, not `step()`.",
        )
    if isinstance(given, ParallelTask):
        task = given
    elif isinstance(given, Mapping):
        fields = {"provider": None, **given}
        if "id" not in fields and callable(fields.get("call")):
            fields["id"] = _name(where, fields["call"])
        try:
            task = ParallelTask(**fields)
        except TypeError as error:
            detail = str(error).removeprefix("ParallelTask.__init__() ")
            raise InputInvalid(f"{where} cannot be read: {detail}.", hint=_HINT) from None
    elif callable(given):
        task = ParallelTask(_name(where, given), None, given)
    else:
        raise InputInvalid(f"{where} is {type(given).__name__}, which is not a task.", hint=_HINT)
    if not isinstance(task.id, str) or not task.id:
        raise InputInvalid(f"The `id` of {where} is {task.id!r}.", hint="Give a name, or leave `id` out.")
    if not callable(task.call):
        raise InputInvalid(f"The `call` of task {task.id!r} cannot be called.", hint=_HINT)
    return task


def _name(where: str, call: Callable[..., Any]) -> str:
    name = getattr(call, "__name__", None)
    if name == "<lambda>" or not isinstance(name, str):
        what = "a lambda" if name else f"a {type(call).__name__}"
        raise InputInvalid(f"{where} is {what}, which has no name.", hint="Name it: {'id': 'report', 'call': …}.")
    return name


def read_dependencies(
    tasks: Mapping[str, ParallelTask], given: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Return task id → ids of the tasks that must finish first.  Raises InputInvalid for unknown names and cycles."""
    needs: dict[str, tuple[str, ...]] = {}
    for name, before in given.items():
        if isinstance(before, str):
            raise InputInvalid(
                f"The dependencies of {name!r} are the string {before!r}.", hint=f"Give a list: [{before!r}]."
            )
        for entry in (name, *before):
            if entry not in tasks:
                raise InputInvalid(
                    f"`dependencies` names {entry!r}, but no task has this name.", hint=f"Tasks: {', '.join(tasks)}."
                )
        needs[name] = tuple(before)
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        raise InputInvalid(
            f"The dependencies form a cycle: {' → '.join(error.args[1])}.", hint="Remove one of them."
        ) from None
    return needs


Arguments = Callable[[Mapping[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
"""Results of other tasks, by id → positional and keyword arguments."""


def arguments_of(task: ParallelTask, needs: Sequence[str]) -> Arguments:
    """Return a function that builds the arguments of a task from the results of the tasks `needs`.

    Raises InputInvalid if its function requires anything else.
    """
    try:
        parameters = inspect.signature(task.call).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have no signature
        return lambda results: ((), {})
    kinds = inspect.Parameter
    named = [entry.name for entry in parameters if entry.name in needs and entry.kind is not kinds.POSITIONAL_ONLY]
    required = [
        entry
        for entry in parameters
        if entry.default is entry.empty
        and entry.name not in named
        and entry.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    ]
    if len(required) > 1 or (required and required[0].kind is kinds.KEYWORD_ONLY):
        wanted = " and ".join(f"`{entry.name}`" for entry in required)
        raise InputInvalid(
            f"The function of task {task.id!r} requires {wanted}, but it gets only the results of its dependencies.",
            hint="Name its parameters like the tasks that it depends on, and list those in `dependencies`.",
        )

    def bind(results: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        keywords = {name: results[name] for name in named}
        every = {name: results[name] for name in needs}
        if not required:
            return (), keywords
        if required[0].kind is kinds.POSITIONAL_ONLY:
            return (every,), keywords
        return (), {**keywords, required[0].name: every}

    return bind
