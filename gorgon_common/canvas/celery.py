"""The Celery application, one configuration for API and workers, and the canvas that is sent through it.

Messages are acknowledged early and not prefetched.  A message is only a hint: what a dead worker loses, the sweep sends
again, and no message waits in a busy worker while another one is idle.  (Late acknowledgement would add duplicates, and
an hour in `unacked`.)  Results are stored only to count the parts of a chord.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import redis
from celery import Celery, chain, chord, group
from celery.backends.redis import RedisBackend
from celery.canvas import Signature
from kombu.exceptions import OperationalError
from redis.backoff import NoBackoff
from redis.retry import Retry

from gorgon_common import lazy, messages, queues
from gorgon_common.canvas import lowering
from gorgon_common.canvas.lowering import Chain, Chord, Group, Message, Shape
from gorgon_common.engine.context import Run
from gorgon_common.engine.records import ROW_MASK, ReadyStep, step_id
from gorgon_common.engine.rows import weight
from gorgon_common.engine.store_ports import Lowered
from gorgon_common.errors import Unavailable
from gorgon_common.ids import new_id
from gorgon_common.workflow.plan import Kind, Node

EPOCH_KEY = "gorgon:epoch"
DEPTH_SECONDS = 0.05
REDIS_SECONDS = 5
"""How long connecting to Redis, and an answer of it, may take."""
HEALTH_SECONDS = 5
THREADS_PER_SLOT = 2
"""Task threads of a worker for each slot."""


def make_app(broker_url: str, *, name: str = "gorgon", events: bool = False) -> Celery:
    """Return the application for a broker; `gmem://…` is the embedded one.

    `events`: send the task events that Flower shows.
    """
    embedded = broker_url.startswith("gmem://")
    if embedded:
        lazy.load("gorgon_common.canvas.embedded")  # registers the transport
    elif broker_url.startswith("redis"):
        lazy.load("gorgon_common.canvas.redis_transport")
    app = Celery(
        name,
        broker=broker_url,
        backend="gorgon_common.canvas.embedded:Results" if embedded else _backend(broker_url),
        set_as_current=not embedded,
        fixups=[],
        loader="celery.loaders.app:AppLoader",
    )
    app.loader.override_backends = dict.fromkeys(("redis", "rediss"), f"{__name__}:Counts")
    app.conf.update(
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=False,
        task_default_queue=queues.CONTROL,
        task_create_missing_queues=True,
        worker_prefetch_multiplier=1,
        worker_disable_rate_limits=True,
        worker_enable_remote_control=events,
        worker_send_task_events=events,
        task_send_sent_event=False,  # a message more for each, and Flower shows nothing by it
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=not embedded,
        result_expires=3600,
        result_backend_thread_safe=embedded,  # one for all threads: chords are published and counted by different ones
        task_publish_retry=False,  # the sweep retries; a submission must not hang if the broker is unavailable
        broker_transport_options={
            "socket_connect_timeout": REDIS_SECONDS,
            # A connection may die without a word.  `socket_timeout` bounds what is written and read at once, the health
            # check drops a wait for messages whose answer is overdue; the defaults are never, and 51 s.
            "socket_timeout": REDIS_SECONDS,
            "socket_keepalive": True,
            "health_check_interval": HEALTH_SECONDS,
            # For publishers, which would wait 6 s for an unavailable broker; workers have their own retries.
            "max_retries": 1,
            "interval_start": 0,
            "interval_step": 0,
        },
        # A chord that cannot be counted loses nothing either; by default its publisher would wait 20 s for the backend.
        result_backend_transport_options={
            "retry_policy": {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}
        },
        redis_socket_connect_timeout=REDIS_SECONDS,
        redis_socket_timeout=REDIS_SECONDS,
        redis_socket_keepalive=not broker_url.startswith("redis+socket"),  # a unix socket has none
    )
    if embedded:
        _ = app.backend  # created here, before two threads can create one each
    return app


class Counts(RedisBackend):  # type: ignore[misc]  # celery has no types
    """A result backend that only counts the parts of a chord: nothing waits for results, so nothing subscribes."""

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Do not subscribe to the result; a publisher would never unsubscribe."""

    def add_pending_result(self, result: Any, weak: bool = False, start_drainer: bool = True) -> Any:
        """Do not subscribe to the results of a group."""
        return result


def _backend(broker_url: str) -> str:
    return broker_url if broker_url.startswith(("redis", "rediss")) else "rpc://"


def queue_name(queue: str, target: str) -> str:
    """Return the queue's name at the broker; targets have separate queues."""
    return queue if target == "live" else f"{target}.{queue}"


class CeleryCanvas:
    """Lowers ready steps to Celery's primitives and publishes them, for one target; implements `ports.Canvas`."""

    def __init__(self, app: Celery, broker_url: str, target: str) -> None:
        self.app = app
        self.target = target
        self._shapes: dict[str, Shape] = {}
        self._lock = threading.Lock()
        self._depths: dict[int, tuple[float, int]] = {}
        # A separate client: Celery's pool is for publishing, and its commands may block for 5 s.
        self._redis = _client(broker_url)

    # Lowering

    def shape(self, run: Run) -> Shape:
        """Return which steps of the run's plan are sent together."""
        found = self._shapes.get(run.info.plan_hash)
        if found is None:
            found = lowering.shape(run.plan)
            with self._lock:
                if len(self._shapes) >= 64:
                    self._shapes.clear()
                self._shapes[run.info.plan_hash] = found
        return found

    def lower(self, run: Run, heads: Sequence[ReadyStep], join: int | None) -> Lowered:
        """Return the canvas of ready heads of one run.

        If all heads of a chord are ready, they become that chord.  If a head is sent without its chord, the join of
        the chord is removed from the canvas, and its counter alone decides.
        `join`: the step id of the reduce of expanded items.
        """
        found = self.shape(run)
        if join is not None:
            return self._lanes(run, found, heads, join)
        top = {head.id & ROW_MASK: head for head in heads if head.id & ROW_MASK < run.plan.top}
        signatures: list[Any] = []
        carried: list[int] = []
        dropped: list[int] = []
        for member in dict.fromkeys(found.chord_of[row] for row in top if row in found.chord_of):
            branches = found.chords[member]
            if len(branches) > 1 and all(row in top for row in branches):
                header = lowering.group(run.plan, found, branches)
                signatures.append(self._chord(run, Chord(header, lowering.message(run.plan, found, [member]))))
                carried.append(member)
                carried += [row for head in branches for row in found.chain(head)[1:]]
                for row in branches:
                    top.pop(row)
            else:
                dropped.append(member)
        rest = sorted(top)
        if rest:
            signatures += self._members(run, lowering.group(run.plan, found, rest))
            carried += [row for head in rest for row in found.chain(head)[1:]]
        below = [head for head in heads if head.id & ROW_MASK >= run.plan.top]
        signatures += self._bundles(run, below)
        dropped_ids = [step_id(run.info.id, row) for row in dropped] + self._reduces(run, below)
        return Lowered(signatures, [step_id(run.info.id, row) for row in carried], dropped_ids)

    def _lanes(self, run: Run, found: Shape, heads: Sequence[ReadyStep], join: int) -> Lowered:
        """The items of a map: a chord of lanes, each of which continues with the next item, and the reduce."""
        number, _, _ = run.place(join & ROW_MASK)
        node = run.plan.nodes[number]
        if number in found.plain or weight(node) == 0 or len(heads) < 2:
            return Lowered(self._bundles(run, heads))
        lanes = self._bundles(run, heads)
        body = self._message(node.queue or queues.CONTROL, lowering.task(node), [join], _label(run, node))
        return Lowered([chord(group(lanes), body, app=self.app)], [join])

    def _reduces(self, run: Run, below: Sequence[ReadyStep]) -> list[int]:
        """Return the reduces of items that are sent on their own."""
        found = []
        for parent in {run.place(head.id & ROW_MASK)[1] for head in below}:
            if parent is None or run.plan.nodes[run.place(parent)[0]].kind is not Kind.MAP:
                continue
            found += [
                step_id(run.info.id, entry.reduce) for entry in run.expansions(parent) if entry.reduce is not None
            ]
        return found

    def _bundles(self, run: Run, heads: Sequence[ReadyStep]) -> list[Any]:
        by_task: dict[tuple[str, str], list[ReadyStep]] = {}
        for head in heads:
            node = run.plan.nodes[head.node]
            by_task.setdefault((node.queue or queues.CONTROL, lowering.task(node)), []).append(head)
        signatures = []
        for (_, task), same in by_task.items():
            positions = list(range(len(same)))
            for part in lowering.bundled(positions, task):
                signatures.append(self._signature(run, [same[place] for place in part]))
        return signatures

    def _signature(self, run: Run, heads: Sequence[ReadyStep]) -> Signature[Any]:
        node = run.plan.nodes[heads[0].node]
        name = _label(run, node, len(heads))
        return self._message(node.queue or queues.CONTROL, lowering.task(node), [head.id for head in heads], name)

    def _members(self, run: Run, whole: Group) -> list[Any]:
        return [self._canvas(run, member) for member in whole.members]

    def _chord(self, run: Run, whole: Chord) -> Any:
        return chord(group(self._members(run, whole.header)), self._canvas(run, whole.body), app=self.app)

    def _canvas(self, run: Run, member: Message | Chain) -> Any:
        if isinstance(member, Chain):
            return chain(*[self._canvas(run, part) for part in member.parts], app=self.app)
        node = run.plan.nodes[member.nodes[0]]
        ids = [step_id(run.info.id, row) for row in member.nodes]
        return self._message(member.queue, member.task, ids, _label(run, node, len(member.nodes)))

    def _message(self, queue: str, task: str, ids: Sequence[int], label: str) -> Signature[Any]:
        signature: Signature[Any] = self.app.signature(task, args=(list(ids), round(time.time(), 3)), immutable=True)
        signature.set(
            queue=queue_name(queue, self.target), shadow=label, argsrepr=label, kwargsrepr="", ignore_result=True
        )
        return signature

    # Sending

    def send(self, lowered: Lowered) -> None:
        """Publish a canvas.  Raises Unavailable."""
        signatures = lowered.canvas
        try:
            if len(signatures) > 1 and not any(isinstance(entry, chord) for entry in signatures):
                group(signatures, app=self.app).apply_async(add_to_parent=False)
            else:
                for signature in signatures:
                    signature.apply_async(add_to_parent=False)
        except (OperationalError, redis.RedisError, OSError) as error:
            raise Unavailable(f"The broker cannot be reached: {error}") from error

    def depth(self, queue: int) -> int:
        """Return how many messages a queue holds, as of at most DEPTH_SECONDS ago.  Raises Unavailable."""
        now = time.monotonic()
        known = self._depths.get(queue)
        if known is not None and now - known[0] < DEPTH_SECONDS:
            return known[1]
        found = self._depth(queue_name(queues.ALL[queue], self.target))
        self._depths[queue] = (now, found)
        return found

    def _depth(self, name: str) -> int:
        try:
            if self._redis is not None:
                return int(self._redis.llen(name))
            with self.app.connection_for_read() as connection:
                channel = connection.default_channel
                if hasattr(channel, "_size"):
                    return int(channel._size(name))
                return int(channel.queue_declare(name, passive=True).message_count)
        except (OperationalError, redis.RedisError, OSError) as error:
            raise Unavailable(f"The broker cannot be reached: {error}") from error

    def epoch(self) -> str | None:
        """Return a mark that disappears when Redis loses its data; sets a new one if there is none."""
        if self._redis is None:
            return None
        try:
            self._redis.set(EPOCH_KEY, new_id("epoch"), nx=True)
            mark: bytes = self._redis.get(EPOCH_KEY)
            return mark.decode()
        except redis.RedisError as error:
            raise Unavailable(f"Redis cannot be reached: {error}") from error

    def health(self) -> str:
        """Return a description of the broker.  Raises Unavailable."""
        if self._redis is None:
            return "embedded"
        try:
            info = self._redis.info("server")
            policy = self._redis.config_get("maxmemory-policy")
        except redis.RedisError as error:
            raise Unavailable(f"Redis cannot be reached: {error}") from error
        return f"Redis {info['redis_version']}, {policy.get('maxmemory-policy')}"

    def close(self) -> None:
        """Close connections."""
        if self._redis is not None:
            self._redis.close()


def _label(run: Run, node: Node, count: int = 1) -> str:
    name = node.name
    return messages.label(lowering.task(node), node.spec.get("role"), run.info.workflow, name, count)


def _client(broker_url: str) -> Any:
    # A second try finds a new connection where the first one was dead.
    options: dict[str, Any] = {
        "socket_timeout": REDIS_SECONDS,
        "socket_connect_timeout": REDIS_SECONDS,
        "retry": Retry(NoBackoff(), 1),
    }
    if broker_url.startswith("redis+socket://"):
        path, _, query = broker_url.removeprefix("redis+socket://").partition("?")
        number = query.partition("virtual_host=")[2] or "0"
        return redis.Redis(unix_socket_path=path, db=int(number), **options)
    if broker_url.startswith(("redis://", "rediss://")):
        return redis.Redis.from_url(broker_url, socket_keepalive=True, **options)
    return None
