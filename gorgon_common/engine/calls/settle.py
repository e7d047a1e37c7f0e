"""The settle link: the limiter learns how a call ended and what it used."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from gorgon_common.engine.limits import NEUTRAL, Settlement
from gorgon_common.engine.ports import AgentReply
from gorgon_common.errors import GorgonError
from gorgon_common.logs import get_logger

if TYPE_CHECKING:
    from gorgon_common.engine.calls.acquire import CallLimits, Permit

log = get_logger(__name__)


class Settling:
    """A context in which a call is made.  Its permit is settled at the end, whatever happens."""

    __slots__ = ("_limits", "_permit", "_reply")

    def __init__(self, limits: CallLimits, permit: Permit) -> None:
        self._limits = limits
        self._permit = permit
        self._reply: AgentReply | None = None

    def __enter__(self) -> Settling:
        return self

    def replied(self, reply: AgentReply) -> AgentReply:
        """Note and return the reply."""
        self._reply = reply
        return reply

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        limits, grant = self._limits, self._permit.grant
        settlement = Settlement(NEUTRAL)
        try:
            ending = self._reply if error is None else error
            assert ending is not None
            settlement = limits.settlement(grant.gate.provider, ending)
            if self._reply is not None:
                usage = self._reply.usage
                limits.estimates.learn(grant.gate.provider, grant.gate.model, self._permit.estimated, usage)
        finally:
            limits.leases.drop(grant)
            try:
                limits.limiter.settle(grant, settlement)
            except GorgonError as failed:
                log.warning("a call was not settled with the limiter", error=failed.message)
