"""What a client sees of the API around its routes: documents, bodies, access log, traces, budgets and limits."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner, Result

from gorgon_api.app import create_app
from gorgon_api.auth import Principal, SingleKey
from gorgon_common import logs, metrics
from gorgon_common.cli import build
from gorgon_common.client import schemas
from gorgon_common.settings import Settings, get_settings
from tests.support import services
from tests.support.api import serve
from tests.support.memory_services import MemoryServices
from tests.support.services import Services

KEY = "gk_test"
BODY = json.dumps({"workflow": "feature-build"})
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
HEADER = f"00-{TRACE}-00f067aa0ba902b7-01"


@pytest.fixture
def http() -> Iterator[TestClient]:
    app = create_app(MemoryServices(), SingleKey(KEY), access_log=True)
    with TestClient(app, headers={"X-API-Key": KEY}, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    made = io.StringIO()
    logs.configure("warning", "json", stream=made)
    yield made
    logs.configure()
    root.handlers[:], level = before
    root.setLevel(level)


def test_the_document_says_how_the_key_is_sent(http: TestClient) -> None:
    document = http.get("/openapi.json").json()
    schemes = document["components"]["securitySchemes"]
    assert {(scheme["type"], scheme.get("scheme"), scheme.get("name")) for scheme in schemes.values()} == {
        ("http", "bearer", None),
        ("apiKey", None, "X-API-Key"),
    }
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            wanted = None if path.startswith("/health") else [{name: []} for name in schemes]
            assert operation.get("security") == wanted, f"{method} {path}"


def test_the_page_of_the_document_needs_nothing_from_elsewhere(http: TestClient) -> None:
    page = http.get("/docs")
    assert page.status_code == 200
    assert "://" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    parts = re.findall(r'(?:src|href)="(docs/[^"]+)"', page.text)
    assert len(parts) == 3
    for part in parts:
        found = http.get(f"/{part}")
        assert (found.status_code, len(found.content) > 100) == (200, True), part
    assert "dark-mode" in http.get("/docs/swagger-ui.css").text
    assert http.get("/redoc").status_code == 404


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "text/plain; charset=utf-8"])
def test_a_body_of_no_particular_type_is_json(http: TestClient, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    response = http.post("/v1/runs", content=BODY, headers=headers)
    assert response.status_code == 202, response.text


def test_a_body_of_another_type_is_told_so(http: TestClient) -> None:
    response = http.post("/v1/runs", content="name: x", headers={"Content-Type": "application/yaml"})
    assert (response.status_code, response.json()["type"]) == (415, "urn:gorgon:error:unsupported-media-type")
    assert "application/json" in response.json()["hint"]


def test_a_body_that_is_not_json_is_told_so(http: TestClient) -> None:
    (error,) = http.post("/v1/runs", content="workflow=feature-build").json()["errors"]
    assert "not valid JSON" in error["message"]


def test_each_request_has_a_line_that_names_its_run(http: TestClient, stream: io.StringIO) -> None:
    run_id = http.post("/v1/runs", content=BODY).json()["run_id"]
    http.get(f"/v1/runs/{run_id}?expand=steps", headers={"traceparent": HEADER})
    http.get("/v1/nothing")
    http.get("/health")
    http.get("/metrics")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("POST", "/v1/runs", 202),
        ("GET", f"/v1/runs/{run_id}", 200),
        ("GET", "/v1/nothing", 404),
    ]
    assert (lines[1]["run_id"], lines[1]["trace_id"]) == (run_id, TRACE)
    assert [line.get("actor") for line in lines] == ["key:api-key", "key:api-key", None]
    assert all(line["seconds"] >= 0 for line in lines)
    text = metrics.exposition().decode()
    assert 'gorgon_http_requests_total{method="GET",route="/v1/runs/{run}",status="200"}' in text
    assert 'route="(none)",status="404"' in text


def test_a_run_is_part_of_the_callers_trace(http: TestClient) -> None:
    def trace(**headers: str) -> str:
        run_id = http.post("/v1/runs", content=BODY, headers=headers).json()["run_id"]
        return str(http.get(f"/v1/runs/{run_id}").json()["trace_id"])

    assert trace(traceparent=HEADER) == TRACE
    for headers in ({}, {"traceparent": "nonsense"}):
        assert re.fullmatch(r"[0-9a-f]{32}", trace(**headers))
        assert trace(**headers) != TRACE


class TestBudgetsAndLimitsOnAServer:
    @pytest.fixture
    def services(self, sqlite_url: str) -> Iterator[Services]:
        made = services.build(Settings(database_url=sqlite_url))
        yield made
        made.close()

    @pytest.fixture
    def url(self, services: Services) -> Iterator[str]:
        with serve(services, SingleKey(KEY)) as url:
            yield url

    @pytest.fixture(autouse=True)
    def elsewhere(self, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """GORGON_API_URL is set, and the database here is another one."""
        monkeypatch.setenv("GORGON_API_URL", url)
        monkeypatch.setenv("GORGON_API_KEY", KEY)
        monkeypatch.setenv("GORGON_DATABASE_URL", f"sqlite:///{tmp_path}/other.db")
        get_settings.cache_clear()

    def gorgon(self, *arguments: str) -> Result:
        result = CliRunner().invoke(build(), list(arguments))
        assert result.exit_code == 0, result.output
        return result

    def json(self, *arguments: str) -> Any:
        return json.loads(self.gorgon(*arguments, "--json").stdout)

    def test_budgets(self, services: Services, url: str) -> None:
        assert "$12.50" in self.gorgon("budgets", "set", "team:a", "--usd", "12.50", "--tokens", "1000").stdout
        assert "team a" in self.gorgon("budgets", "ls", "--server", url).stdout
        assert self.json("budgets", "set", "team:a", "--tokens", "none", "--server", "default")["token_limit"] is None
        (there,) = self.json("budgets", "ls")
        schemas.BudgetView.model_validate(there)
        assert (there["usd_limit"], there["token_limit"]) == (12.5, None)
        assert [entry["usd_limit"] for entry in services.list_budgets()] == [12_500_000]
        assert self.json("budgets", "ls", "--server", "none") == []

    def test_limits(self, services: Services) -> None:
        made = self.json("limits", "set", "openai", "gpt-5*", "--requests", "500")
        assert made == {"provider": "openai", "model": "gpt-5*", "limits": {"requests": 500.0}}
        found = self.json("limits", "ls")
        schemas.LimitsView.model_validate(found)
        assert found["rules"] == services.limits()["rules"] == [made]
        assert self.json("limits", "ls", "--server", "none")["rules"] == []
        assert self.json("limits", "set", "openai", "gpt-5*", "--clear")["limits"] == {}

    def test_runs_and_plans_ask_it_too(self, services: Services) -> None:
        run_id = services.submit(services.read("name: x\nsteps: [{id: a, prompt: b}]\n")[0], {}).run_id
        assert self.json("runs", "show", "last")["run_id"] == run_id
        assert self.json("runs", "ls", "--server", "none")["items"] == []

    @pytest.mark.parametrize(
        "command", [("budgets", "set", "nonsense", "--usd", "1"), ("limits", "set", "openai", "x", "--requests", "-1")]
    )
    def test_what_cannot_be_set_is_told_as_it_is_here(self, command: tuple[str, ...]) -> None:
        there, here = (CliRunner().invoke(build(), [*command, *more]) for more in ([], ["--server", "none"]))
        assert (there.exit_code, there.stderr) == (here.exit_code, here.stderr) == (2, there.stderr)

    @pytest.mark.parametrize(
        ("path", "body", "status"),
        [
            ("/v1/budgets", {"scope": "org", "usd": True}, 422),
            ("/v1/budgets", {"scope": "org", "tokens": True}, 422),
            ("/v1/limits", {"provider": "openai", "limits": {"requests": True}}, 422),
            ("/v1/limits", {"provider": "openai", "limits": {"requests": "5"}}, 422),
            ("/v1/limits", {"provider": "opnai", "limits": {"requests": 5}}, 422),
        ],
    )
    def test_nothing_is_set_by_mistake(self, services: Services, path: str, body: Any, status: int) -> None:
        with TestClient(create_app(services, SingleKey(KEY)), headers={"X-API-Key": KEY}) as http:
            answer = http.put(path, json=body)
            assert answer.status_code == status, answer.text
            assert services.list_budgets() == []
            assert services.limits()["rules"] == []

    def test_a_key_for_one_team_sets_its_budget_alone(self, services: Services) -> None:
        keys = SingleKey(KEY, Principal("one", frozenset({"a"})))
        with TestClient(create_app(services, keys), headers={"X-API-Key": KEY}) as http:
            for scope, status in (("team:a", 200), ("team:b", 403), ("org", 403), ("workflow:w", 403)):
                assert http.put("/v1/budgets", json={"scope": scope, "usd": "1"}).status_code == status, scope
            assert http.put("/v1/limits", json={"provider": "openai", "limits": {"tokens": 1}}).status_code == 403
