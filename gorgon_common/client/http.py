"""The HTTP client of /v1.  It returns the same dicts as `application.session.Session`, and raises the same errors.

- Unavailable: the server cannot be reached, or cannot reach its database
- ConfigurationError: the key is missing or wrong
- Forbidden: the key may not act for the team
- WorkflowInvalid, InputInvalid, NotFound, Conflict, NotAvailable: reported by the server
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self
from urllib.parse import quote

import httpx2

from gorgon_common import errors
from gorgon_common.client.views import read_budget

PROBLEM_TYPE = "urn:gorgon:error:"
"""The prefix of an error's `type`; the rest is a key of ERROR_TYPES."""

ERROR_TYPES: dict[str, type[errors.GorgonError]] = {
    "workflow-invalid": errors.WorkflowInvalid,
    "input-invalid": errors.InputInvalid,
    "not-found": errors.NotFound,
    "conflict": errors.Conflict,
    "not-available": errors.NotAvailable,
    "forbidden": errors.Forbidden,
    "configuration": errors.ConfigurationError,
    "unavailable": errors.Unavailable,
}
"""Kind of error on the wire → class.  For each error, the server sends the first of its classes that is listed here."""

_RECONNECTS = 8
_RECONNECT_CAP = 5.0


class Client:
    """A connection to one server.  Thread-safe.

    `timeout` is in seconds for one request; `transport` is for tests that call an application in this process.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._api_key, self._timeout, self._transport = api_key, timeout, transport
        self._http = httpx2.Client(base_url=self.base_url, headers=headers, timeout=timeout, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the connections."""
        self._http.close()

    def copy(self) -> Client:
        """Return a client of the same server with separate connections, which another thread can close."""
        return Client(self.base_url, api_key=self._api_key, timeout=self._timeout, transport=self._transport)

    def submit(
        self,
        *,
        inputs: Mapping[str, Any],
        workflow: str | None = None,
        source: str | None = None,
        target: str = "sandbox",
        team: str | None = None,
        max_cost_usd: float | None = None,
        idempotency_key: str | None = None,
    ) -> dict[str, Any]:
        """Start a run of a bundled workflow by name, or of a YAML text; returns `{run_id, created, reused, to_run}`.

        `team`: the owner of the run; without it, the file's `team:` is.
        """
        body = {
            "workflow": workflow,
            "source": source,
            "inputs": dict(inputs),
            "target": target,
            "team": team,
            "max_cost_usd": max_cost_usd,
        }
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        return self._ask("POST", "/v1/runs", json=_given(body), headers=headers)

    def run(self, run_id: str, *, steps: bool = False) -> dict[str, Any]:
        """Return one run, with its steps on request."""
        return self._ask("GET", _path(run_id), params={"expand": "steps"} if steps else {})

    def runs(
        self, *, status: str | None = None, workflow: str | None = None, limit: int = 50, cursor: str | None = None
    ) -> dict[str, Any]:
        """Return a page of runs `{items, next}`, newest first."""
        asked = {"status": status, "workflow": workflow, "limit": limit, "cursor": cursor}
        return self._ask("GET", "/v1/runs", params=_given(asked))

    def explain(self, run_id: str, step: str | None = None) -> dict[str, Any]:
        """Return what a run (or a step of it) waits for, what its money was spent on, and how long its parts took."""
        return self._ask("GET", f"{_path(run_id)}/explain", params=_given({"step": step}))

    def cancel(self, run_id: str) -> dict[str, Any]:
        """Request the cancellation of a run; returns the run."""
        return self._ask("POST", f"{_path(run_id)}/cancel")

    def send_event(self, run_id: str, name: str, data: Any = None) -> dict[str, Any]:
        """Send an event to a run, for a step that waits for it; returns the run."""
        return self._ask("POST", f"{_path(run_id)}/events/{quote(name, safe='')}", json=data)

    def resume(self, run_id: str) -> dict[str, Any]:
        """Continue a run as a new one.  Returns `{run_id, created, reused, to_run}`."""
        return self._ask("POST", f"{_path(run_id)}/resume")

    def validate(self, source: str) -> dict[str, Any]:
        """Return `{valid, problems}` of a YAML text."""
        return self._ask("POST", "/v1/workflows/validate", json={"source": source})

    def plan(self, *, workflow: str | None = None, source: str | None = None) -> dict[str, Any]:
        """Return the compiled workflow: inputs, nodes, warnings, and why it cannot run yet."""
        body = {"workflow": workflow, "source": source, "estimate": False}
        return self._ask("POST", "/v1/workflows/plan", json=_given(body))

    def estimate(
        self,
        *,
        workflow: str | None = None,
        source: str | None = None,
        inputs: Mapping[str, Any] | None = None,
        target: str = "sandbox",
        team: str | None = None,
    ) -> dict[str, Any]:
        """Return the predicted usage of a run, before anything is spent.  `team`: as for `submit`."""
        body = {"workflow": workflow, "source": source, "inputs": dict(inputs or {}), "target": target, "team": team}
        estimate: dict[str, Any] = self._ask("POST", "/v1/workflows/plan", json=_given(body))["estimate"]
        return estimate

    def costs(
        self,
        by: Sequence[str],
        *,
        since: str | None = None,
        until: str | None = None,
        only: Mapping[str, str] | None = None,
        limit: int | None = None,
    ) -> dict[str, Any]:
        """Return the costs of calls, with a row for each combination of `by`."""
        asked = {"by": ",".join(by), "from": since, "to": until, "limit": limit or 10_000, **(only or {})}
        return self._ask("GET", "/v1/costs", params=_given(asked))

    def calls(
        self,
        *,
        since: str | None = None,
        until: str | None = None,
        only: Mapping[str, str] | None = None,
        limit: int = 1000,
        cursor: str | None = None,
    ) -> dict[str, Any]:
        """Return `{items, next}`: a row for each call."""
        asked = {"from": since, "to": until, "limit": limit, "cursor": cursor, **(only or {})}
        return self._ask("GET", "/v1/costs/calls", params=_given(asked))

    def list_budgets(self) -> list[dict[str, Any]]:
        """Return every budget with its accounts, amounts in micro-dollars."""
        return [read_budget(entry) for entry in self._ask("GET", "/v1/budgets")["items"]]

    def set_budget(
        self, scope: str, *, period: str = "month", timezone: str | None = None, **limits: str | None
    ) -> dict[str, Any]:
        """Set or change a budget; returns it.  `limits`: `usd` and `tokens`, None for no limit; omitted limits stay."""
        body = {"scope": scope, "period": period, **_given({"timezone": timezone}), **limits}
        return read_budget(self._ask("PUT", "/v1/budgets", json=body))

    def limits(self) -> dict[str, Any]:
        """Return `{gates, rules, estimates}`."""
        return self._ask("GET", "/v1/limits")

    def set_limits(
        self, provider: str, model: str, limits: Mapping[str, float], *, clear: bool = False
    ) -> dict[str, Any]:
        """Set limits for a provider's models; returns `{provider, model, limits, cleared}`."""
        body = {"provider": provider, "model": model, "limits": dict(limits), "clear": clear}
        return self._ask("PUT", "/v1/limits", json=body)

    def workflows(self) -> list[dict[str, Any]]:
        """Return the server's bundled workflows."""
        return list(self._ask("GET", "/v1/workflows")["items"])

    def roles(self) -> list[dict[str, Any]]:
        """Return the server's agent roles."""
        return list(self._ask("GET", "/v1/roles")["items"])

    def health(self) -> dict[str, Any]:
        """Return the response of `/health/ready`, whether healthy or not."""
        return self._ask("GET", "/health/ready", also=503)

    def events(self, run_id: str, *, after: int = 0, follow: bool = True) -> Iterator[dict[str, Any]]:
        """Yield the run's journal after sequence number `after` as it is written, until the run has finished.

        A broken connection is resumed where it broke.  Without `follow`, yields only the entries that exist now.
        """
        failures = 0
        while True:
            try:
                for event in self._stream(run_id, after, follow=follow):
                    if event is None:
                        return
                    after, failures = int(event["seq"]), 0
                    yield event
            except errors.Unavailable:
                if failures >= _RECONNECTS:
                    raise
            failures += 1
            time.sleep(min(0.1 * 2**failures, _RECONNECT_CAP))

    def _stream(self, run_id: str, after: int, *, follow: bool) -> Iterator[dict[str, Any] | None]:
        """Yield the events of one connection, then None if the server says that the journal is complete."""
        try:
            with self._http.sse(
                f"{_path(run_id)}/events",
                params={} if follow else {"follow": "false"},
                headers={"Last-Event-ID": str(after)} if after else {},
                timeout=httpx2.Timeout(10.0, read=60.0),  # the server sends a comment at least every 15 s
            ) as source:
                if source.response.status_code >= 400:
                    source.response.read()
                    raise self._error(source.response)
                for event in source:
                    yield None if event.event == "end" else json.loads(event.data)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error

    def _ask(self, method: str, path: str, *, also: int | None = None, **request: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **request)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error
        if response.status_code >= 400 and response.status_code != also:
            raise self._error(response)
        try:
            body: dict[str, Any] = response.json()
        except ValueError:
            raise errors.Unavailable(
                f"{self.base_url} answered something that is not JSON.",
                hint="Is this the address of a Gorgon API? Check --server or GORGON_API_URL.",
            ) from None
        return body

    def _unreachable(self, error: httpx2.TransportError) -> errors.Unavailable:
        if isinstance(error, httpx2.TimeoutException):
            return errors.Unavailable(f"The server {self.base_url} did not reply in time.", hint="Try again.")
        return errors.Unavailable(
            f"The server {self.base_url} cannot be reached: {error}",
            hint="Start one with `gorgon api`, or correct --server (GORGON_API_URL).",
        )

    def _error(self, response: httpx2.Response) -> errors.GorgonError:
        try:
            body = response.json()
        except ValueError:
            body = {}
        if not isinstance(body, dict):
            body = {}
        detail = str(body.get("detail") or f"The server answered {response.status_code} {response.reason_phrase}.")
        hint = body.get("hint")
        kind = ERROR_TYPES.get(str(body.get("type", "")).removeprefix(PROBLEM_TYPE))
        if response.status_code == 401 or (response.status_code == 403 and kind is None):
            what = "refused the API key" if self._api_key else "asks for an API key"
            return errors.ConfigurationError(
                f"The server {self.base_url} {what}.", hint="Set GORGON_API_KEY to a key of this server."
            )
        if kind is errors.WorkflowInvalid:
            return errors.WorkflowInvalid([_problem(entry) for entry in body.get("problems") or [{"message": detail}]])
        if body.get("errors"):
            detail += "".join(f"\n  {entry.get('field')}: {entry.get('message')}" for entry in body["errors"])
        if kind is None:
            kind = errors.Unavailable if response.status_code >= 500 else errors.UserError
        return kind(detail, hint=hint)


def _problem(entry: Mapping[str, Any]) -> errors.Problem:
    known = errors.Problem.__dataclass_fields__
    return errors.Problem(**{name: value for name, value in entry.items() if name in known})


def _path(run_id: str) -> str:
    return f"/v1/runs/{quote(run_id, safe='')}"


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
