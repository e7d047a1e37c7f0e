"""The group commit of budgets: the calls of many threads are settled and reserved in one transaction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gorgon_common.engine.group_commit import GroupCommit
from gorgon_common.persistence.budgets_sqlite import Key

BATCH = 64
PATIENCE = 0.003
"""How long a call waits for those that began with it (seconds)."""
Ask = tuple[Key, Sequence[int], int, int, int]
"""A call's key, its accounts, micro-dollars, tokens, longest reply."""
Facts = Sequence[Mapping[str, Any]]


class BudgetCommit:
    """Processes asks and facts of many threads.

    `work` gets asks (no call twice) and facts, and returns a row for each ask.
    """

    def __init__(self, work: Callable[[Sequence[Ask], Facts], Sequence[tuple[Any, ...]]]) -> None:
        self._work = work
        self._commits: GroupCommit[tuple[Ask | None, Facts], tuple[Any, ...]] = GroupCommit(
            self._serve, most=BATCH, patience=lambda: PATIENCE
        )

    def do(self, ask: Ask | None, facts: Facts = ()) -> tuple[Any, ...]:
        """Return the row for the ask, or raise the exception of its transaction."""
        return self._commits.do((ask, facts))

    def _serve(self, batch: Sequence[tuple[Ask | None, Facts]]) -> list[tuple[Any, ...]]:
        asks: dict[Key, Ask] = {}
        for ask, _ in batch:
            if ask is not None:
                asks.setdefault(ask[0], ask)
        rows = self._work(list(asks.values()), [fact for _, facts in batch for fact in facts])
        answers = dict(zip(asks, rows, strict=True))
        return [() if ask is None else answers[ask[0]] for ask, _ in batch]
