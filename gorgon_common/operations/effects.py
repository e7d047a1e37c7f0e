"""What operations do to the outside world."""

from __future__ import annotations

from enum import StrEnum


class Effect(StrEnum):
    """What an operation does to the outside world."""

    READ = "read"  # changes nothing: may be repeated
    WRITE = "write"  # changes something that can be found again
    SEND = "send"  # reaches a person: cannot be taken back
