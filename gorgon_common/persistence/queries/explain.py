"""Explains the state of a run or step: what it waits for, what the money was spent on, how long each part took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from gorgon_common.clock import format_time
from gorgon_common.engine.states import RunStatus
from gorgon_common.errors import NotFound
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.history import read_history
from gorgon_common.persistence.queries.amounts import time_text
from gorgon_common.persistence.queries.keys import waits_for
from gorgon_common.persistence.queries.places import ENGINE_KINDS
from gorgon_common.persistence.queries.reading import SHOWN, Reading
from gorgon_common.persistence.queries.spending import Spending
from gorgon_common.persistence.queries.views import find_run
from gorgon_common.persistence.queries.waits import Waits
from gorgon_common.scope import Scope
from gorgon_common.workflow.plan import Plan


class Explanations:
    """Explains runs.  `plan_of` returns the plan with a given hash."""

    def __init__(self, database: Database, plan_of: Callable[[str], Plan]) -> None:
        self.database = database
        self.plan_of = plan_of

    def explain(self, scope: Scope, public_id: str, step: str | None = None) -> dict[str, Any]:
        """Return `{run_id, …, waiting, waiting_for, money, time}` for the whole run or for the steps with one name.

        The shape is described in docs/costs.md, except that waits have `facts` instead of a sentence (`what`).  `step`:
        a name, or `name[3]` for one item.  Raises NotFound.
        """
        with self.database.read(scope) as connection:
            run = find_run(connection, scope, public_id)
            plan = self.plan_of(run.plan_hash)
        history = read_history(self.database, self.plan_of, workflow=run.workflow, target=run.target)
        with self.database.read(scope) as connection:
            return _document(Reading(connection, run, plan, history), step)


def _document(read: Reading, step: str | None) -> dict[str, Any]:
    wanted = _wanted(read, step)
    reasons, spending = Waits(read), Spending(read, wanted)
    key = waits_for(read.connection, read.run)
    waiting = [_of_the_run(reasons.explain(row), key) for row in sorted(wanted) if reasons.waits(row)]
    return {
        "run_id": read.run.public_id,
        "workflow": read.run.workflow,
        "team": read.run.team,
        "target": read.run.target,
        "status": RunStatus(read.run.status).name.lower(),
        "step": step,
        "as_of": format_time(read.now),
        "created_at": format_time(read.run.created_at),
        "started_at": time_text(read.run.started_at),
        "finished_at": time_text(read.run.finished_at),
        "waits_for": key,
        "waiting_for": dict(Counter(str(entry["why"]) for entry in waiting)),
        "waiting": waiting[:SHOWN],
        "money": spending.money(),
        "time": spending.times(),
    }


def _wanted(read: Reading, step: str | None) -> set[int]:
    """Return the rows that are explained.  Raises NotFound."""
    shown = {key for key, entry in read.rows.items() if read.plan.nodes[entry.node].kind not in ENGINE_KINDS}
    if step is None:
        return shown
    found = {key for key in shown if step in (read.names[key][0], read.label(key))}
    if not found:
        names = dict.fromkeys(read.names[key][0] for key in sorted(shown))
        raise NotFound(f"The run has no step {step!r}.", hint=f"Its steps: {', '.join(names)}.")
    return found


def _of_the_run(entry: dict[str, Any], key: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a step waits for when the whole run waits for its concurrency key."""
    if key is None or entry["why"] != "paused":
        return entry
    return {**entry, "why": "key", "since": key["since"]}
