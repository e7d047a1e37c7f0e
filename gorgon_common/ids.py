"""Public ids: `run_01JD…`, sorted by creation time.

The 26 characters after the prefix are a ULID (github.com/ulid/spec) in Crockford's base 32: 48 bits of milliseconds, 80
bits of randomness.  Within a process, ids only increase: within one millisecond, or when the clock goes back, the last
id is incremented.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_RANDOM_BITS = 80
_LENGTH = 26
# The first id of a millisecond leaves the top bit free, so that increments cannot overflow into the time.
_RANDOM_MASK = (1 << (_RANDOM_BITS - 1)) - 1


def _milliseconds() -> int:
    return time.time_ns() // 1_000_000


class Ids:
    """A source of ids.  Thread-safe.

    `milliseconds` returns the time since 1970; `randomness` returns that many random bytes.
    """

    def __init__(
        self,
        *,
        milliseconds: Callable[[], int] = _milliseconds,
        randomness: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._milliseconds = milliseconds
        self._randomness = randomness
        self._lock = threading.Lock()
        self._last = 0

    def new(self, prefix: str) -> str:
        """Return `prefix` + `_` + 26 characters, greater than every id before it with that prefix."""
        with self._lock:
            now = self._milliseconds()
            if now > self._last >> _RANDOM_BITS:
                self._last = now << _RANDOM_BITS | int.from_bytes(self._randomness(10)) & _RANDOM_MASK
            else:
                self._last += 1
            number = self._last
        return f"{prefix}_{_encode(number)}"

    def forget(self) -> None:
        """Start over.  A forked child must call this; otherwise it would generate the same ids as its parent."""
        self._lock = threading.Lock()
        self._last = 0


def _encode(number: int) -> str:
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(5 * (_LENGTH - 1), -1, -5))


def is_id(text: str, prefix: str) -> bool:
    """Return whether `text` has the form of an id with that prefix."""
    head, separator, tail = text.partition("_")
    return head == prefix and bool(separator) and len(tail) == _LENGTH and all(letter in _ALPHABET for letter in tail)


_ids = Ids()
os.register_at_fork(after_in_child=_ids.forget)

new_id = _ids.new
"""Return a new id: `new_id("run")`."""
