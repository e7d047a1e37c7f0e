"""Encodes results as columns, the same for both databases."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from gorgon_common import strict_json
from gorgon_common.engine.budget import UNSENT
from gorgon_common.engine.records import Claimed, Finish
from gorgon_common.engine.states import StepStatus
from gorgon_common.masking import SECRETS
from gorgon_common.persistence import budgets_sqlite

INLINE_BYTES = 64 * 1024
"""Outputs up to this size are stored in the checkpoint's row, larger ones in `blobs`."""


def dump(value: Any) -> str:
    """Return JSON that both databases can store, with secrets masked.

    NUL stays escaped, and lone surrogates are replaced.  A number that is not finite should never get here; it becomes
    null, so that one row cannot break a query over many rows.
    """
    return _encodable(SECRETS.mask_json(strict_json.dumps(value, compact=True, default=str)))


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def checkpoint(finish: Finish) -> dict[str, Any]:
    """Return a finish as the dict described in `claim_and_finish.sql`, with times as datetimes."""
    result = finish.result
    body = None if result.output is None else dump(result.output)
    large = body is not None and len(body) > INLINE_BYTES // 4 and len(body.encode()) > INLINE_BYTES
    detail: dict[str, Any] = {}
    fingerprint = result.detail.get("fingerprint")
    for name, value in result.detail.items():
        if name != "fingerprint" and value is not None:
            detail[name] = value
    if result.error is not None:
        detail["error"] = dict(result.error)
    if result.reason is not None:
        detail["reason"] = result.reason
    root, _, hashed = (
        fingerprint.partition(":") if fingerprint and result.status is StepStatus.SUCCEEDED else ("", "", "")
    )
    return {
        "step_id": finish.step.id,
        "token": finish.step.token,
        "status": int(result.status),
        "output": None if large else body,
        "blob": body if large else None,
        "detail": dump(detail) if detail else None,
        "attempts": result.attempts,
        "started_at": result.started_at,
        "finished_at": result.finished_at or datetime.now(UTC),
        "root_id": int(root) if root else None,
        "fingerprint": hashed or None,
    }


def calls(step: Claimed, finish_calls: Any, attempt: int, at: datetime) -> list[dict[str, Any]]:
    """Return ledger rows of a step's calls."""
    return [
        {
            "step_id": step.id,
            "token": step.token,
            "ordinal": call.ordinal,
            "at": at,
            "provider": clean(call.provider, 40),
            "model": clean(call.model, 200),
            "role": clean(call.role, 100),
            "attempt": attempt,
            "input_tokens": call.usage.input_tokens,
            "cache_read_tokens": call.usage.cache_read_tokens,
            "cache_write_tokens": call.usage.cache_write_5m_tokens + call.usage.cache_write_1h_tokens,
            "output_tokens": call.usage.output_tokens,
            "reasoning_tokens": call.usage.reasoning_tokens,
            "cost_micro": call.cost_micro,
            "price_version": call.price_version,
            "latency_ms": call.latency_ms,
            "outcome": clean(call.outcome, 40),
            "request_id": clean(call.request_id, 200),
        }
        for call in finish_calls
        if call.outcome != UNSENT
    ]


def settlements(step: Claimed, finish_calls: Any) -> list[dict[str, Any]]:
    """Return a step's calls for the budgets, as the dicts described in `budgets.sql`."""
    return [
        {
            "step_id": step.id,
            "token": step.token,
            "ordinal": call.ordinal,
            "state": budgets_sqlite.RELEASED if call.outcome == UNSENT else budgets_sqlite.SETTLED,
            "usd": call.cost_micro,
            "tokens": call.usage.input_tokens + call.usage.output_tokens if call.measured else None,
        }
        for call in finish_calls
        if call.reserved
    ]


def clean(text: str | None, most: int | None = None) -> str | None:
    """Return text with secrets masked, without NUL, which PostgreSQL cannot store, and without lone surrogates.

    `most`: the maximum number of characters of its column.  The model name in a reply may have any length.
    """
    return _encodable(SECRETS.mask(text).replace("\0", ""))[:most] if text else text
