"""Requests that nobody would write: whatever is sent, the answer is one that the OpenAPI document knows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gorgon_api.app import create_app
from gorgon_api.auth import SingleKey
from gorgon_common.settings import Settings
from tests.support import servers
from tests.support.services import Services, build

KEY = "gk_test"
TEXTS = st.text(max_size=30) | st.sampled_from(
    ["\x00", "\ud800", "💩", "../..", "{{x}}", "1e999", "-0", " ", "\r\n\r\n"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
YAML = st.sampled_from(
    [
        "name: w\nsteps:\n  - {id: a, role: planner, prompt: hi}\n",
        "name: w\ninputs: {x: {}}\nsteps:\n  - {id: a, role: planner, prompt: '{{inputs.x}}'}\n",
        "name: w\nsteps: [&a [*a]]\n",
        "- 1\n",
        "",
        "name: [\n",
    ]
) | st.text(max_size=80)
BODIES = JSON | st.fixed_dictionaries(
    {},
    optional={
        "source": YAML | JSON,
        "workflow": TEXTS | JSON,
        "inputs": JSON,
        "target": JSON,
        "max_cost_usd": JSON,
        "estimate": JSON,
        "other": JSON,
    },
)
RUN_IDS = TEXTS | st.from_regex(r"run_[0-9A-Z]{26}", fullmatch=True)
NAMES = ["status", "workflow", "limit", "cursor", "expand", "follow", "x"]
NAMES += ["by", "from", "to", "step", "team", "run", "outcome"]
VALUES = TEXTS | st.sampled_from(["step,day", "run", "2026-11-22", "9999-12-31", "0001-01-01", "1.2.3.4", "plan"])
QUERIES = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4)


@pytest.fixture(scope="module")
def http(postgres_admin: str) -> Iterator[TestClient]:
    """The API on PostgreSQL, which is stricter than SQLite about what it takes."""
    with servers.fresh_database(postgres_admin) as url:
        services = build(Settings(database_url=url))
        yield from _client(services)
        services.close()


def _client(services: Services) -> Iterator[TestClient]:
    app = create_app(services, SingleKey(KEY))
    with TestClient(app, headers={"X-API-Key": KEY}) as client:  # a fault of ours is raised here
        yield client


@pytest.fixture(scope="module")
def routes(http: TestClient) -> list[tuple[str, str, dict[str, Any]]]:
    paths = http.get("/openapi.json").json()["paths"]
    return [
        (method, path, operation["responses"])
        for path, methods in paths.items()
        for method, operation in methods.items()
    ]


def encoded(text: str) -> str:
    return quote(text.encode("utf-8", "surrogatepass"), safe="")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(number=st.integers(0, 1_000), run_id=RUN_IDS, query=QUERIES, body=BODIES, last=st.integers(-5, 5))
def test_the_answer_is_documented(
    http: TestClient,
    routes: list[tuple[str, str, dict[str, Any]]],
    number: int,
    run_id: str,
    query: dict[str, str],
    body: Any,
    last: int,
) -> None:
    method, path, responses = routes[number % len(routes)]
    url = path.replace("{run}", encoded(run_id) or "-")
    url += "?" + "&".join(f"{name}={encoded(value)}" for name, value in query.items())
    response = http.request(
        method.upper(),
        url,
        content=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Last-Event-ID": str(last)},
    )
    redirected = response.history or "/" in encoded(run_id)
    allowed = {int(code) for code in responses} | ({404, 405} if redirected or run_id in (".", "..") else set())
    allowed |= {400}  # a body that is not JSON at all
    assert response.status_code in allowed, f"{method} {url} {body!r}: {response.status_code} {response.text}"
    kind = "application/problem+json" if response.status_code >= 400 else None
    if kind:
        assert response.headers["content-type"] == kind
