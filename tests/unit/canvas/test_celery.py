"""What is really sent: Celery's own signatures, and their bytes in a real Redis."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery.canvas import _chain, chord

from gorgon_common import messages
from gorgon_common.canvas import lowering
from gorgon_common.canvas.celery import CeleryCanvas, make_app, queue_name
from gorgon_common.engine.records import ReadyStep, Weight, step_id
from gorgon_common.errors import Unavailable
from gorgon_common.workflow.plan import Kind, Plan
from tests.support.engine import agent, elapse, node, plan_of
from tests.support.fleet import Fleet, fleet

SECRET = "what nobody but the database may know"
ANTH, OPEN = "anthropic", "openai"


@pytest.fixture
def made(sqlite_url: str) -> Iterator[Fleet]:
    with fleet(sqlite_url) as found:
        found.mailbox.away = True  # nothing is sent but by the test itself
        yield found


def lowered(made: Fleet, plan: Plan, *rows: int, canvas: CeleryCanvas | None = None) -> Any:
    """Return (run, what is made of these heads)."""
    here = made.processes[0]
    number = here.submit(plan, {"text": SECRET})
    run = here.knowledge.run(number)
    heads = [ReadyStep(step_id(number, row), row, Weight.SLOW, 0) for row in rows]
    return number, (canvas or made.mailbox).lower(run, heads, None)


def rows_of(run: int, ids: Any) -> list[int]:
    return sorted(key - step_id(run, 0) for key in ids)


def test_heads_of_a_chord_become_the_chord_and_carry_its_join(made: Fleet) -> None:
    plan = plan_of(agent("a"), agent("b", 0), agent("b2", 1, queue=ANTH), agent("c", 0), agent("d", 2, 3))
    run, found = lowered(made, plan, 1, 3)
    (canvas,) = found.canvas
    assert isinstance(canvas, chord)
    assert rows_of(run, found.carried) == [2, 4]
    assert list(found.dropped) == []
    assert canvas.body.args[0] == [step_id(run, 4)]
    assert [isinstance(part, _chain) for part in canvas.tasks] == [True, False]


def test_a_head_that_travels_without_its_chord_takes_the_join_off_it(made: Fleet) -> None:
    run, found = lowered(made, plan_of(agent("a"), agent("b"), agent("c", 0, 1)), 0)
    assert rows_of(run, found.dropped) == [2]
    assert list(found.carried) == []


def test_a_chain_carries_what_comes_after_its_first_message(made: Fleet) -> None:
    plan = plan_of(agent("a"), agent("b", 0, queue=ANTH), agent("c", 1))
    run, found = lowered(made, plan, 0)
    (canvas,) = found.canvas
    assert isinstance(canvas, _chain)
    assert rows_of(run, found.carried) == [1, 2]
    assert [part.args[0] for part in canvas.tasks] == [[step_id(run, row)] for row in range(3)]
    assert all(part.immutable for part in canvas.tasks)


def test_items_of_a_map_are_a_chord_with_their_reduce(made: Fleet) -> None:
    plan = plan_of(
        node(
            "m",
            kind=Kind.MAP,
            bodies={"item": (4,), "reduce": (5,)},
            spec={"over": [1, 2, 3], "max_items": 9, "max_parallel": 2},
        ),
        templates=[agent("m[]", container=0), agent("m.reduce", container=0, queue=ANTH)],
    )
    made.mailbox.away = False
    run = made.processes[0].submit(plan)
    made.idle()
    (canvas,) = made.mailbox.canvases
    assert isinstance(canvas, chord)
    assert [part.args[0] for part in canvas.tasks] == [[step_id(run, 4)], [step_id(run, 5)]]
    assert canvas.body.args[0] == [step_id(run, 7)]
    made.mailbox.waiting.clear()
    elapse(made.store, 6)
    made.processes[0].sweep.once()
    assert len(made.mailbox.waiting) == 2  # sent anew, alone


def test_names_say_what_a_message_is_about(made: Fleet) -> None:
    _, found = lowered(made, plan_of(agent("plan-it", spec={"role": "planner"})), 0)
    (message,) = found.canvas
    assert message.task == messages.AGENT
    shown = message.options["shadow"]
    assert "planner" in shown
    assert "plan-it" in shown
    assert message.options["argsrepr"] == shown


def test_each_target_has_queues_of_its_own(made: Fleet) -> None:
    _, found = lowered(made, plan_of(agent("a")), 0)
    assert found.canvas[0].options["queue"] == queue_name(OPEN, "sandbox") != queue_name(OPEN, "live")


# In Redis


@pytest.fixture(scope="module")
def one_canvas(redis_server_url: str) -> Iterator[CeleryCanvas]:
    """One for all tests: the connections of a second application to the same server would be those of the first."""
    app = make_app(redis_server_url)
    found = CeleryCanvas(app, redis_server_url, "sandbox")
    yield found
    found.close()
    app.backend.client.close()
    app.pool.force_close_all()
    app.close()


@pytest.fixture
def canvas(one_canvas: CeleryCanvas, redis_url: str) -> CeleryCanvas:
    one_canvas._depths.clear()
    return one_canvas


def bodies(redis_url: str) -> list[tuple[int, str, Any]]:
    """Return (bytes, all of its text, decoded body) of every message in Redis."""
    found = []
    with redis.Redis.from_url(redis_url) as client:
        for queue in ("openai", "anthropic", "control"):
            for raw in client.lrange(queue_name(queue, "sandbox"), 0, -1):  # type: ignore[union-attr]
                message = json.loads(raw)
                body = base64.b64decode(message["body"]).decode()
                found.append((len(raw), json.dumps(message["headers"]) + body, json.loads(body)))
    return found


SHAPES: dict[str, tuple[Plan, list[int], int]] = {
    "alone": (plan_of(agent("a", spec={"prompt": SECRET})), [0], 1),
    "chain of ten": (
        plan_of(
            *[
                agent(f"s{row}", *([row - 1] if row else []), queue=(OPEN, ANTH)[row % 2], spec={"prompt": SECRET})
                for row in range(10)
            ]
        ),
        [0],
        1,
    ),
    "group": (plan_of(*[agent(f"s{row}", spec={"prompt": SECRET}) for row in range(100)]), list(range(100)), 25),
    "chord": (
        plan_of(*[agent(f"s{row}", spec={"prompt": SECRET}) for row in range(30)], agent("join", *range(30))),
        list(range(30)),
        30,
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_messages_carry_ids_only_and_few_bytes(made: Fleet, canvas: CeleryCanvas, redis_url: str, name: str) -> None:
    plan, rows, count = SHAPES[name]
    run, found = lowered(made, plan, *rows, canvas=canvas)
    canvas.send(found)
    sent = bodies(redis_url)
    assert len(sent) == count
    claimed = []
    for size, text, (args, kwargs, _embed) in sent:
        ids, moment = args
        claimed += rows_of(run, ids)
        assert SECRET not in text
        assert kwargs == {}
        assert isinstance(moment, float)
        # One message alone, and for each further message that it leads to a signature: a chain of ten, a chord's body.
        assert size < 2_000 + 1_200 * (9 if name == "chain of ten" else 1)
    assert sorted(claimed) == rows


def test_bytes_grow_with_the_steps_and_no_faster(made: Fleet, canvas: CeleryCanvas, redis_url: str) -> None:
    sizes = []
    for width in (10, 100):
        plan = plan_of(*[agent(f"s{row}") for row in range(width)], agent("join", *range(width)))
        before = sum(size for size, _, _ in bodies(redis_url))
        _, found = lowered(made, plan, *range(width), canvas=canvas)
        canvas.send(found)
        sizes.append((sum(size for size, _, _ in bodies(redis_url)) - before) / width)
    assert sizes[1] < 1.1 * sizes[0]


def test_depth_and_epoch(canvas: CeleryCanvas, made: Fleet, redis_url: str) -> None:
    assert canvas.depth(0) == 0
    first = canvas.epoch()
    assert first is not None
    assert canvas.epoch() == first
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    assert canvas.epoch() not in (None, first)
    _, found = lowered(made, plan_of(agent("a")), 0, canvas=canvas)
    canvas.send(found)
    canvas._depths.clear()
    assert canvas.depth(0) == 1


def test_a_broker_that_is_away_is_unavailable(made: Fleet) -> None:
    url = "redis://127.0.0.1:1/0"
    app = make_app(url)
    canvas = CeleryCanvas(app, url, "sandbox")
    _, found = lowered(made, plan_of(agent("a")), 0, canvas=canvas)
    for call in (lambda: canvas.send(found), lambda: canvas.depth(0)):
        with pytest.raises(Unavailable):
            call()
    canvas.close()
    app.close()


def test_signatures_are_made_without_a_word_of_the_workers_code(tmp_path: Path) -> None:
    code = """
import sys
import time
from gorgon_common.canvas import lowering
from gorgon_common.canvas.celery import CeleryCanvas, make_app
from gorgon_common.engine.records import ReadyStep, RunInfo
from gorgon_common.engine.context import Run
from gorgon_common.workflow.plan import Dep, Join, Kind, Node, Plan
agent = lambda name, *deps: Node(name, Kind.AGENT, "openai", tuple(Dep(d) for d in deps))
gate = Node("$gate", Kind.GATE, deps=(Dep(2),), join=Join.ALL_DONE)
plan = Plan("p", (agent("a"), agent("b"), agent("c", 0, 1), gate), 4)
info = RunInfo(1, "r", 1, "t", "p", "h", {}, "sandbox", "", 1, None)
canvas = CeleryCanvas(make_app("redis://127.0.0.1:1/0"), "redis://127.0.0.1:1/0", "sandbox")
lowered = canvas.lower(Run(None, info, plan), [ReadyStep(1 << 20, 0, 2, 0), ReadyStep((1 << 20) + 1, 1, 2, 0)], None)
assert type(lowered.canvas[0]).__name__ in ("chord", "_chord"), lowered
assert not [name for name in canvas.app.tasks if name.startswith("gorgon")]
print([name for name in sys.modules if name.split(".")[0] in ("gorgon_worker", "openai", "anthropic", "sqlalchemy")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_shapes_are_analysed_once_for_a_plan(made: Fleet) -> None:
    run, _ = lowered(made, plan_of(agent("a")), 0)
    known = made.processes[0].knowledge.run(run)
    assert made.mailbox.shape(known) is made.mailbox.shape(known)
    assert made.mailbox.shape(known) == lowering.shape(known.plan)


def test_a_publisher_does_not_wait_for_a_broker_that_is_away(made: Fleet) -> None:
    """Worker threads publish between two steps, and submissions answer somebody."""
    url = "redis://127.0.0.1:1/0"
    app = make_app(url)
    canvas = CeleryCanvas(app, url, "sandbox")
    since = time.perf_counter()
    for plan, rows, _ in SHAPES.values():
        _, found = lowered(made, plan, *rows, canvas=canvas)
        with pytest.raises(Unavailable):
            canvas.send(found)
    assert time.perf_counter() - since < 3
    canvas.close()
    app.close()


def test_a_publisher_listens_for_no_result(made: Fleet, canvas: CeleryCanvas, redis_url: str) -> None:
    plan, rows, _ = SHAPES["chord"]
    _, found = lowered(made, plan, *rows, canvas=canvas)
    canvas.send(found)
    with redis.Redis.from_url(redis_url) as client:
        assert client.pubsub_channels() == []
