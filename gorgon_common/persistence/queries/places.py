"""Where the rows of a run stand: the run in a step's id, the composite that a row belongs to, and its item in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sqlalchemy import BigInteger, Connection, literal_column, select
from sqlalchemy.sql.elements import ColumnElement

from gorgon_common.engine.records import ROW_BITS, ROW_MASK, step_id
from gorgon_common.persistence.tables import expansions
from gorgon_common.workflow.plan import Kind, Plan

ENGINE_KINDS = frozenset({Kind.GATE, Kind.FINALLY, Kind.END})
"""Joins added by the engine, which are not steps of the file."""


def run_of(step: ColumnElement[int]) -> ColumnElement[int]:
    """Return the run id in a step's id.  The shift uses a literal, because PostgreSQL cannot shift by a bigint."""
    return step.op(">>", return_type=BigInteger())(literal_column(str(ROW_BITS)))


def step_name(plan: Plan, node: int) -> str:
    """Return the display name of a node: for a map's items and a loop's rounds, without the mark."""
    return plan.nodes[node].name


class Places:
    """Maps the rows of one run to their composite, and to their item or iteration in it."""

    def __init__(self, connection: Connection, number: int, plan: Plan) -> None:
        self.connection = connection
        self.number = number
        self.plan = plan
        self.low, self.high = step_id(number, 0), step_id(number + 1, 0)
        self.parents = self._parents()

    def of(self, nodes: Mapping[int, int]) -> dict[int, tuple[str, int | None]]:
        """Return row → (the step's name, its item or iteration) for rows whose nodes are given."""
        return {row: (self._name(number), self._item(row)) for row, number in nodes.items()}

    def _parents(self) -> list[tuple[int, int, int, str, int, int | None]]:
        """Return (base, end, parent row, phase, round, reduce's row) of every expansion.

        `steps.parent` does not give this: a step that runs on after its group has ended is attached to the group's
        successor.
        """
        query = select(expansions).where(expansions.c.step_id >= self.low, expansions.c.step_id < self.high)
        return [
            (row.base, row.base + row.count, row.step_id & ROW_MASK, row.phase, row.round, row.reduce)
            for row in self.connection.execute(query.order_by(expansions.c.base))
        ]

    def _above(self, row: int) -> tuple[int, int | None] | None:
        """Return the composite that a row belongs to, and its item or iteration there."""
        for base, end, parent, phase, number, reduce in self.parents:
            if base <= row < end:
                item = phase == "item" and row != reduce
                position = row - base if item else number if phase == "body" else None
                return parent, position
        return None

    def walk(self) -> Iterator[int]:
        """Yield every row: those of the file in their order, each followed by its expansion.  Reads no step."""
        ranges: dict[int, list[range]] = {}
        for base, end, parent, *_ in self.parents:
            ranges.setdefault(parent, []).append(range(base, end))
        pending = [iter(range(self.plan.top))]
        while pending:
            row = next(pending[-1], None)
            if row is None:
                pending.pop()
                continue
            yield row
            pending += [iter(part) for part in reversed(ranges.get(row, ()))]

    def _name(self, number: int) -> str:
        return self.plan.nodes[number].name

    def _item(self, row: int) -> int | None:
        """Return the item or iteration of a row, taken from the nearest composite that has any."""
        above = self._above(row)
        while above is not None:
            parent, position = above
            if position is not None:
                return position
            above = self._above(parent)
        return None
