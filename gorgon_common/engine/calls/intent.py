"""The intent link: remembers that something is about to be sent, and afterwards that it has arrived.

A model call changes nothing at its provider and may be repeated, so it needs no intent.
"""

from __future__ import annotations

from gorgon_common.engine.ports import AgentReply, EffectLedger

__all__ = ["NO_EFFECTS", "EffectLedger"]


class _NoEffects:
    """For calls that may be repeated."""

    def intend(self, ordinal: int, request: object) -> None:
        """Remember nothing."""

    def confirm(self, ordinal: int, reply: AgentReply) -> None:
        """Remember nothing."""


NO_EFFECTS: EffectLedger = _NoEffects()
