"""A broker and a result store inside the process, for `gorgon run` and tests.

Kombu's memory transport polls once a second; this one is woken by an event.  Celery's in-memory backend needs quadratic
time for the parts of a chord; here each part is O(1).
"""

from __future__ import annotations

import collections
import queue
import threading
from typing import Any

from celery.backends.base import KeyValueStoreBackend
from celery.canvas import maybe_signature
from kombu.transport import TRANSPORT_ALIASES, memory, virtual

STOP_SECONDS = 0.2
"""The longest sleep of the consumer in seconds, which bounds the time of a stop.  Its cost is not measurable."""


class Space:
    """One broker: queues, bindings, and an event.  The URL's host is its name, so apps in one process are separate."""

    def __init__(self) -> None:
        self.queues: dict[str, Any] = {}
        self.state = virtual.BrokerState()
        self.bell = threading.Condition()
        self.rings = 0

    def ring(self) -> None:
        """Wake the consumers."""
        with self.bell:
            self.rings += 1
            self.bell.notify_all()


_spaces: collections.defaultdict[str, Space] = collections.defaultdict(Space)


class Channel(memory.Channel):  # type: ignore[misc]  # kombu has no types
    """A channel on a Space."""

    do_restore = False  # else kombu prints "Restoring N unacknowledged message(s)" to stderr

    def __init__(self, connection: Any, **options: Any) -> None:
        self.space: Space = connection.space
        self.queues = self.space.queues
        super().__init__(connection, **options)

    def _put(self, queue: str, message: Any, **options: Any) -> None:
        super()._put(queue, message, **options)
        self.space.ring()

    def basic_ack(self, *args: Any, **options: Any) -> None:
        """Acknowledge, and fetch more messages, because a slot is free."""
        super().basic_ack(*args, **options)
        self.space.ring()

    def basic_reject(self, *args: Any, **options: Any) -> None:
        """Reject, and fetch more messages, because a slot is free."""
        super().basic_reject(*args, **options)
        self.space.ring()

    def close(self) -> None:
        """Close the channel; its messages stay."""
        kept = self.queues
        super().close()
        self.space.queues = kept


class Transport(memory.Transport):  # type: ignore[misc]  # kombu has no types
    """The transport `gmem://name`."""

    Channel = Channel
    driver_type = "memory"
    driver_name = "gorgon-memory"

    def __init__(self, client: Any, **options: Any) -> None:
        self.space = _spaces[client.hostname or "default"]
        super().__init__(client, **options)
        self.state = self.space.state

    def drain_events(self, connection: Any, timeout: float | None = None) -> None:
        """Deliver one message.  Raises TimeoutError if none came."""
        seen = self.space.rings
        try:
            self.cycle.get(self._deliver, timeout=timeout)
            return
        except queue.Empty:
            pass
        with self.space.bell:
            self.space.bell.wait_for(lambda: self.space.rings != seen, min(timeout or STOP_SECONDS, STOP_SECONDS))
        try:
            self.cycle.get(self._deliver, timeout=timeout)
        except queue.Empty:
            raise TimeoutError from None  # woken for another reason (an ack, a stop): return to the loop


TRANSPORT_ALIASES["gmem"] = "gorgon_common.canvas.embedded:Transport"


class Results(KeyValueStoreBackend):  # type: ignore[misc]  # celery has no types
    """A result backend in a dict, used only to count the parts of chords."""

    supports_native_join = True
    persistent = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._lock = threading.Lock()
        self._data: dict[Any, Any] = {}
        self._parts: dict[str, dict[Any, Any]] = {}
        self._sizes: dict[str, int] = {}

    def get(self, key: Any) -> Any:
        """Return a stored value."""
        return self._data.get(key)

    def mget(self, keys: Any) -> list[Any]:
        """Return stored values."""
        return [self._data.get(key) for key in keys]

    def set(self, key: Any, value: Any) -> None:
        """Store a value."""
        self._data[key] = value

    def delete(self, key: Any) -> None:
        """Forget a value."""
        self._data.pop(key, None)

    def expire(self, key: Any, value: Any) -> None:
        """Do nothing: values live as long as the process."""

    def apply_chord(self, header_result_args: Any, body: Any, **options: Any) -> None:
        """Do nothing."""

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        """Record how many parts a chord has.  Called after its header was published, so all parts may have arrived."""
        with self._lock:
            self._sizes[group_id] = chord_size
            ready = self._take(group_id)
        if ready is not None:
            self._send(ready)

    def on_chord_part_return(self, request: Any, state: Any, result: Any, **options: Any) -> None:
        """Count a part; after the last one, send the body."""
        if not request.group:
            return
        with self._lock:
            parts = self._parts.setdefault(request.group, {"body": request.chord})
            parts[request.group_index] = True
            ready = self._take(request.group)
        if ready is not None:
            self._send(ready)

    def _take(self, group_id: str) -> Any:
        parts, size = self._parts.get(group_id), self._sizes.get(group_id)
        if not parts or size is None or len(parts) - 1 < size:
            return None
        del self._sizes[group_id]
        return self._parts.pop(group_id)["body"]

    def _send(self, body: Any) -> None:
        maybe_signature(body, app=self.app).apply_async(([],))
