"""Pages of a run's steps on SQLite and PostgreSQL: together they are the whole list, and each reads only its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from gorgon_common.errors import NotFound
from gorgon_common.scope import Scope
from tests.support.running import Lab, Ran, laboratory
from tests.support.sandbox import Sandbox, sandbox, sandbox_process

__all__ = ["sandbox", "sandbox_process"]

NESTED = """
name: nested
defaults: {retry: {max: 2, initial: 10ms, jitter: none}}
steps:
  - {id: first, run: [printf, begin]}
  - id: rounds
    depends_on: first
    loop: {until: "size(rounds.output.grid) == 9", max: 2}
    steps:
      - id: grid
        map: {over: [a, b], as: x}
        steps:
          - {id: row, map: {over: ["1", "2", "3"], as: y}, run: [printf, "%s%s%s", "{{index}}", "{{x}}", "{{y}}"]}
  - id: many
    map: {over: ["[[sandbox: status=500 times=1 key=page]]", b, c, d], as: x, reduce: {prompt: "Join {{results}}"}}
    prompt: "{{x}}"
  - {id: last, depends_on: [rounds, many], checkpoint: "end"}
"""


@pytest.fixture
def lab(database_url: str, sandbox: Sandbox, tmp_path: Path) -> Iterator[Lab]:
    with laboratory(tmp_path, sandbox, database_url=database_url) as made:
        yield made


@pytest.fixture
def ran(lab: Lab) -> Ran:
    return lab.run(NESTED)


def pages(lab: Lab, run: str, limit: int) -> Iterator[list[dict[str, Any]]]:
    cursor = 0
    while True:
        page = lab.services.steps(run, limit=limit, cursor=cursor)
        yield page["items"]
        if page["next"] is None:
            return
        cursor = int(page["next"])


def test_pages_together_are_the_whole_list(lab: Lab, ran: Ran) -> None:
    whole = ran.document["steps"]
    assert ran.status == "succeeded"
    assert len(whole) > 20
    assert any(step["attempts"] > 1 for step in whole)
    for limit in (1, 7, len(whole) - 1, len(whole), 500):
        parts = list(pages(lab, ran.id, limit))
        assert [step for part in parts for step in part] == whole
        assert [len(part) for part in parts[:-1]] == [limit] * (len(parts) - 1)


def test_a_run_that_has_not_begun_has_pages_too(lab: Lab) -> None:
    plan, _ = lab.services.read(NESTED)
    run = lab.services.submit(plan, {}, home="elsewhere").run_id
    whole = lab.services.run(run, steps=True)["steps"]
    assert [step for part in pages(lab, run, 2) for step in part] == whole
    assert [step["waits"] and step["waits"]["why"] for step in whole] == ["queue", None, "queue", None]


def test_a_page_reads_no_more_outputs_than_it_shows(lab: Lab, ran: Ran) -> None:
    seen: list[int] = []

    def count(_connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool) -> None:
        if "blobs.body" in statement and "expansions" not in statement:
            seen.append(len(parameters))

    engine = lab.services.database.engine
    event.listen(engine, "before_cursor_execute", count)
    try:
        assert len(lab.services.steps(ran.id, limit=2, cursor=0)["items"]) == 2
    finally:
        event.remove(engine, "before_cursor_execute", count)
    assert seen
    assert max(seen) <= 3  # the ids that it reads: one more than it shows, to know whether more follow


def test_another_organisation_sees_nothing_of_it(lab: Lab, ran: Ran) -> None:
    other = lab.services.of(Scope(org=2, actor="key:other"))
    assert other.runs()["items"] == []
    assert other.costs(["run"], only={"target": "all"})["rows"] == []
    assert other.calls(only={"target": "all"})["items"] == []
    for look in (other.run, other.events, other.explain, other.cancel, other.resume, other.plan_of):
        with pytest.raises(NotFound):
            look(ran.id)
    with pytest.raises(NotFound):
        other.steps(ran.id, limit=1)
    with pytest.raises(NotFound):
        other.send_event(ran.id, "go")
