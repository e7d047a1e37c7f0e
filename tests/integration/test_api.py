"""The HTTP API through its own client and raw requests, on services that keep everything in memory."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import httpx2
import pytest
from fastapi.testclient import TestClient

from gorgon_api.app import MAX_BODY, create_app
from gorgon_api.auth import SingleKey
from gorgon_common import errors
from gorgon_common.client import schemas
from gorgon_common.client.http import Client
from tests.support.memory_services import MemoryServices

KEY = "gk_test"
HELLO = """
name: hello
inputs:
  topic: {type: string, required: true}
  times: {type: integer, default: 1}
steps:
  - {id: plan, role: planner, prompt: "Plan {{inputs.topic}}"}
  - {id: build, role: builder, prompt: "Build {{plan.output}}"}
outputs: {code: "{{build.output}}"}
"""
OPEN = "name: open\ninputs: {x: {}}\nsteps:\n  - {id: plan, role: planner, prompt: '{{inputs.x}}'}\n"
BODY = {"source": HELLO, "inputs": {"topic": "tea"}}


@pytest.fixture
def services() -> MemoryServices:
    return MemoryServices()


@pytest.fixture
def http(services: MemoryServices) -> Iterator[TestClient]:
    app = create_app(services, SingleKey(KEY))
    with TestClient(app, headers={"Authorization": f"Bearer {KEY}"}, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(http: TestClient) -> Iterator[Client]:
    """Our own client, talking to the application in this process."""
    with Client("http://testserver", api_key=KEY, transport=http._transport) as made:
        yield made


def problem(response: httpx2.Response, status: int, kind: str) -> dict[str, object]:
    """The problem document, checked against the schema that is published."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    schemas.ErrorBody.model_validate(body)
    assert body["type"] == f"urn:gorgon:error:{kind}"
    assert body["status"] == status
    return body


class TestStart:
    def test_gives_202_and_where_the_run_is(self, http: TestClient) -> None:
        response = http.post("/v1/runs", json=BODY)
        assert response.status_code == 202
        body = schemas.Accepted.model_validate(response.json())
        assert response.headers["location"] == f"/v1/runs/{body.run_id}"
        assert http.get(response.headers["location"]).json()["workflow"] == "hello"

    def test_is_on_the_sandbox_unless_asked(self, http: TestClient, services: MemoryServices) -> None:
        first, second = (http.post("/v1/runs", json={**BODY, **more}).json() for more in ({}, {"target": "live"}))
        assert services.run(first["run_id"])["target"] == "sandbox"
        assert services.run(second["run_id"])["target"] == "live"

    def test_of_a_bundled_workflow_by_name(self, http: TestClient) -> None:
        response = http.post("/v1/runs", json={"workflow": "feature-build"})
        assert response.status_code == 202, response.text

    def test_a_repeated_key_gives_the_same_run(self, http: TestClient) -> None:
        headers = {"Idempotency-Key": "order-66"}
        first = http.post("/v1/runs", json=BODY, headers=headers).json()
        second = http.post("/v1/runs", json=BODY, headers=headers).json()
        assert first["run_id"] == second["run_id"]
        assert (first["created"], second["created"]) == (True, False)

    def test_a_repeated_key_with_another_body_is_a_conflict(self, http: TestClient) -> None:
        headers = {"Idempotency-Key": "order-66"}
        http.post("/v1/runs", json=BODY, headers=headers)
        other = {**BODY, "inputs": {"topic": "coffee"}}
        problem(http.post("/v1/runs", json=other, headers=headers), 409, "conflict")

    @pytest.mark.parametrize("key", ["", "a b", "x" * 201, "ü"])
    def test_a_key_that_is_none(self, http: TestClient, key: str) -> None:
        response = http.post("/v1/runs", json=BODY, headers={"Idempotency-Key": key.encode("latin-1")})
        problem(response, 422, "request-invalid")

    def test_a_workflow_with_problems_tells_line_and_column(self, http: TestClient) -> None:
        response = http.post("/v1/runs", json={"source": HELLO.replace("prompt:", "promt:", 1)})
        body = problem(response, 422, "workflow-invalid")
        assert [entry["line"] for entry in body["problems"]] == [7]
        assert "prompt" in body["problems"][0]["hint"]

    def test_a_missing_input(self, http: TestClient) -> None:
        body = problem(http.post("/v1/runs", json={"source": HELLO}), 422, "input-invalid")
        assert "topic" in body["detail"]

    def test_an_unknown_workflow(self, http: TestClient) -> None:
        body = problem(http.post("/v1/runs", json={"workflow": "feature-bild"}), 404, "not-found")
        assert "feature-build" in body["hint"]

    @pytest.mark.parametrize("body", [{}, {"workflow": "feature-build", "source": HELLO}])
    def test_neither_or_both_of_name_and_text(self, http: TestClient, body: dict[str, str]) -> None:
        problem(http.post("/v1/runs", json=body), 422, "input-invalid")

    def test_a_step_that_cannot_run_yet_is_refused(self, http: TestClient, services: MemoryServices) -> None:
        text = "name: w\nsteps:\n  - {id: b, checkpoint: now}\n  - {id: a, depends_on: b, approval: Go on?}\n"
        body = problem(http.post("/v1/runs", json={"source": text}), 422, "not-available")
        assert "`a`" in body["detail"] or "'a'" in body["detail"] or " a " in body["detail"]
        assert services.runs()["items"] == []

    def test_an_unknown_field_is_named(self, http: TestClient) -> None:
        body = problem(http.post("/v1/runs", json={**BODY, "input": {}}), 422, "request-invalid")
        assert body["errors"] == [{"field": "input", "message": "This field is not known."}]

    @pytest.mark.parametrize(
        "text",
        [
            "{",
            "[]",
            "null",
            json.dumps({"source": OPEN, "inputs": {"x": float("nan")}}),
            json.dumps({"source": OPEN, "max_cost_usd": float("nan")}),
            json.dumps({"source": OPEN, "max_cost_usd": float("inf")}),
            '{"source": "x", "inputs": {"x": 1e999}}',
            json.dumps({"source": OPEN, "inputs": {"x": ["\ud800"]}}),
            json.dumps({"source": OPEN, "inputs": {"\ud800": 1}}),
            '{"source": "\\ud800"}',
            "[" * 50_000,
            '{"inputs": ' + '{"a":' * 5_000 + "1" + "}" * 5_000 + "}",
            '{"inputs": {"x": ' + "9" * 5_000 + "}}",
            "\udcff",
        ],
    )
    def test_a_body_that_is_no_submission(self, http: TestClient, text: str) -> None:
        response = http.post(
            "/v1/runs",
            content=text.encode("utf-8", "surrogateescape"),
            headers={"Content-Type": "application/json"},
        )
        assert 400 <= response.status_code < 500, response.text
        assert response.headers["content-type"] == "application/problem+json"
        schemas.ErrorBody.model_validate(response.json())

    def test_a_body_over_the_cap_is_refused(self, http: TestClient) -> None:
        response = http.post("/v1/runs", json={"source": "x", "inputs": {"topic": "y" * MAX_BODY}})
        problem(response, 413, "content-too-large")

    def test_a_body_over_the_cap_without_a_length_is_refused(self, http: TestClient) -> None:
        chunks = (b"y" * 65_536 for _ in range(MAX_BODY // 65_536 + 2))
        response = http.post("/v1/runs", content=chunks, headers={"Content-Type": "application/json"})
        problem(response, 413, "content-too-large")

    def test_any_other_json_is_taken(self, http: TestClient) -> None:
        value = ["\u0000", 1e300, None, {"": {"ü": []}}, "💩"]
        response = http.post("/v1/runs", json={"source": OPEN, "inputs": {"x": value}})
        assert response.status_code == 202, response.text


class TestAuth:
    @pytest.mark.parametrize("headers", [{"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}])
    def test_both_ways_to_send_the_key(self, services: MemoryServices, headers: dict[str, str]) -> None:
        with TestClient(create_app(services, SingleKey(KEY))) as http:
            assert http.get("/v1/runs", headers=headers).status_code == 200

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Basic {KEY}"},
            {"Authorization": "Bearer "},
            {"X-API-Key": KEY[:-1]},
            {"X-API-Key": ""},
        ],
    )
    def test_every_route_needs_it(self, services: MemoryServices, headers: dict[str, str]) -> None:
        app = create_app(services, SingleKey(KEY))
        open_paths = {"/health", "/health/ready"}
        with TestClient(app) as http:
            tried = 0
            for path, methods in app.openapi()["paths"].items():
                for method in methods:
                    if path in open_paths:
                        continue
                    address = path.replace("{run}", "run_" + "0" * 26)
                    response = http.request(method.upper(), address, headers=headers, json={})
                    assert response.status_code == 401, f"{method} {path}: {response.text}"
                    assert response.headers["www-authenticate"].startswith("Bearer")
                    tried += 1
        assert tried >= 12

    def test_the_client_says_which_variable(self, http: TestClient) -> None:
        wrong = Client("http://testserver", api_key="wrong", transport=http._transport)
        with wrong, pytest.raises(errors.ConfigurationError, match="refused the API key") as caught:
            wrong.runs()
        assert "GORGON_API_KEY" in caught.value.hint


class TestRuns:
    def test_pages_give_every_run_once_newest_first(self, client: Client) -> None:
        made = [client.submit(source=HELLO, inputs={"topic": str(n)})["run_id"] for n in range(7)]
        seen, cursor, pages = [], None, 0
        while True:
            page = client.runs(limit=3, cursor=cursor)
            seen += [run["run_id"] for run in page["items"]]
            pages += 1
            cursor = page["next"]
            if cursor is None:
                break
        assert seen == made[::-1]
        assert pages == 3

    def test_filters(self, client: Client, services: MemoryServices) -> None:
        first, _ = (client.submit(source=HELLO, inputs={"topic": str(n)})["run_id"] for n in range(2))
        services.finish(first)
        assert [run["run_id"] for run in client.runs(status="succeeded")["items"]] == [first]
        assert client.runs(workflow="other")["items"] == []

    @pytest.mark.parametrize(
        "query", ["limit=0", "limit=201", "limit=x", "status=nope", "cursor=!!", "workflow=%00", "cursor=" + "a" * 300]
    )
    def test_a_query_that_cannot_be(self, http: TestClient, query: str) -> None:
        response = http.get(f"/v1/runs?{query}")
        assert response.status_code == 422
        schemas.ErrorBody.model_validate(response.json())

    def test_one_with_and_without_steps(self, client: Client) -> None:
        run_id = client.submit(source=HELLO, inputs={"topic": "tea"})["run_id"]
        plain, expanded = client.run(run_id), client.run(run_id, steps=True)
        assert "steps" not in plain
        assert [step["id"] for step in expanded["steps"]] == ["plan", "build"]
        schemas.Run.model_validate(expanded)

    def test_steps_alone(self, client: Client, http: TestClient) -> None:
        run_id = client.submit(source=HELLO, inputs={"topic": "tea"})["run_id"]
        listed = http.get(f"/v1/runs/{run_id}/steps").json()
        assert listed == {"items": client.run(run_id, steps=True)["steps"], "next": None}
        first = http.get(f"/v1/runs/{run_id}/steps?limit=1").json()
        second = http.get(f"/v1/runs/{run_id}/steps?limit=1&cursor={first['next']}").json()
        assert [first["items"][0]["id"], second["items"][0]["id"]] == ["plan", "build"]
        assert second["next"] is None

    @pytest.mark.parametrize(
        "run", ["run_" + "0" * 26, "nope", "run_%00", "..%2f..", "run_" + "o" * 26, "%F0%9F%92%A9"]
    )
    @pytest.mark.parametrize("route", ["", "/steps", "/events"])
    def test_a_run_that_is_not_there(self, http: TestClient, run: str, route: str) -> None:
        problem(http.get(f"/v1/runs/{run}{route}"), 404, "not-found")

    def test_cancel_and_cancel_again(self, client: Client) -> None:
        run_id = client.submit(source=HELLO, inputs={"topic": "tea"})["run_id"]
        assert client.cancel(run_id)["status"] == "cancelled"
        with pytest.raises(errors.Conflict):
            client.cancel(run_id)

    def test_resume_gives_a_new_run(self, client: Client, services: MemoryServices) -> None:
        run_id = client.submit(source=HELLO, inputs={"topic": "tea"})["run_id"]
        with pytest.raises(errors.Conflict):
            client.resume(run_id)
        services.finish(run_id, "failed")
        resumed = client.resume(run_id)
        assert resumed["run_id"] != run_id
        assert (resumed["reused"], resumed["to_run"]) == (1, 1)


class TestEvents:
    def test_a_finished_run_gives_all_and_ends(self, client: Client, services: MemoryServices) -> None:
        run_id = client.submit(source=HELLO, inputs={"topic": "tea"})["run_id"]
        services.finish(run_id)
        events = list(client.events(run_id))
        assert [event["seq"] for event in events] == [1, 2, 3, 4]
        assert events[-1]["kind"] == "run.succeeded"
        for event in events:
            schemas.Event.model_validate(event)

    def test_goes_on_after_the_last_id(self, http: TestClient, client: Client, services: MemoryServices) -> None:
        run_id = client.submit(source=HELLO, inputs={"topic": "tea"})["run_id"]
        services.finish(run_id)
        text = http.get(f"/v1/runs/{run_id}/events", headers={"Last-Event-ID": "2"}).text
        assert [line for line in text.splitlines() if line.startswith("id:")] == ["id: 3", "id: 4"]
        assert "event: end\ndata: " in text

    def test_a_run_under_way_is_followed_to_its_end(self, client: Client, services: MemoryServices) -> None:
        run_id = client.submit(source=HELLO, inputs={"topic": "tea"})["run_id"]
        thread = threading.Timer(0.05, services.finish, (run_id,))
        thread.start()
        kinds = [event["kind"] for event in client.events(run_id)]
        thread.join()
        assert kinds[0] == "run.queued"
        assert kinds[-1] == "run.succeeded"

    def test_without_following_it_ends_at_once(self, client: Client) -> None:
        run_id = client.submit(source=HELLO, inputs={"topic": "tea"})["run_id"]
        assert [event["kind"] for event in client.events(run_id, follow=False)] == ["run.queued"]

    def test_many_more_than_a_page(self, client: Client, services: MemoryServices) -> None:
        run_id = client.submit(source=HELLO, inputs={"topic": "tea"})["run_id"]
        for number in range(1_200):
            services.event(run_id, "step.succeeded", f"s{number}", "line one\nline two\r\nid: 7")
        services.finish(run_id)
        seqs = [event["seq"] for event in client.events(run_id)]
        assert seqs == list(range(1, 1_205))

    @pytest.mark.parametrize("header", ["-1", "x", "9" * 40])
    def test_an_id_that_is_none(self, http: TestClient, client: Client, header: str) -> None:
        run_id = client.submit(source=HELLO, inputs={"topic": "tea"})["run_id"]
        problem(http.get(f"/v1/runs/{run_id}/events", headers={"Last-Event-ID": header}), 422, "request-invalid")


class TestWorkflows:
    def test_validate_says_yes_or_what_is_wrong(self, client: Client) -> None:
        assert client.validate(HELLO)["valid"] is True
        answer = client.validate(HELLO.replace("plan.output", "plann.output"))
        assert answer["valid"] is False
        assert (answer["problems"][0]["line"], answer["problems"][0]["severity"]) == (8, "error")
        schemas.Validation.model_validate(answer)

    def test_plan_shows_what_waits_for_what(self, client: Client) -> None:
        plan = client.plan(source=HELLO)
        schemas.PlanView.model_validate(plan)
        assert [(node["id"], node["needs"]) for node in plan["nodes"]] == [("plan", []), ("build", ["plan"])]
        assert plan["inputs"]["times"]["default"] == 1

    def test_plan_of_an_invalid_file_raises_with_the_problems(self, client: Client) -> None:
        with pytest.raises(errors.WorkflowInvalid) as caught:
            client.plan(source="name: w\nsteps: 3\n")
        assert caught.value.problems[0].line == 2

    def test_lists(self, client: Client) -> None:
        assert "feature-build" in {entry["name"] for entry in client.workflows()}
        roles = {entry["name"]: entry for entry in client.roles()}
        assert "planner" in roles
        assert roles["planner"]["purpose"]


class TestHealth:
    def test_alive_and_ready_need_no_key_and_tell_no_secrets(self, services: MemoryServices) -> None:
        with TestClient(create_app(services, SingleKey(KEY))) as http:
            assert http.get("/health").json()["status"] == "ok"
            ready = http.get("/health/ready")
            assert (ready.status_code, ready.json()["checks"]["database"]["ok"]) == (200, True)
            services.healthy = False
            unready = http.get("/health/ready")
        assert (unready.status_code, unready.json()["status"]) == (503, "unavailable")
        assert "secret-host" not in ready.text + unready.text

    def test_metrics_are_prometheus_text(self, http: TestClient) -> None:
        response = http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert "# TYPE gorgon_runs_total counter" in response.text


class TestErrors:
    def test_a_fault_of_ours_shows_nothing_internal(
        self, http: TestClient, services: MemoryServices, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(**_: object) -> None:
            raise RuntimeError("password=hunter2")

        monkeypatch.setattr(services, "runs", broken)
        response = http.get("/v1/runs")
        body = problem(response, 500, "internal")
        assert "hunter2" not in response.text
        assert str(body["instance"]) in str(body["hint"])

    def test_an_unknown_path_and_a_wrong_method(self, http: TestClient) -> None:
        problem(http.get("/v1/nothing"), 404, "not-found")
        problem(http.delete("/v1/runs"), 405, "method-not-allowed")

    def test_an_unreachable_database_is_a_503(
        self, client: Client, services: MemoryServices, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def gone(*_: object, **__: object) -> None:
            raise errors.Unavailable("The database cannot be reached.", hint="Is it running?")

        monkeypatch.setattr(services, "runs", gone)
        with pytest.raises(errors.Unavailable, match="database cannot be reached"):
            client.runs()

    def test_an_unreachable_server(self) -> None:
        with (
            Client("http://127.0.0.1:9") as client,
            pytest.raises(errors.Unavailable, match="cannot be reached") as caught,
        ):
            client.runs()
        assert "gorgon api" in caught.value.hint

    def test_a_server_that_is_something_else(self) -> None:
        transport = httpx2.MockTransport(lambda _: httpx2.Response(200, text="<html>hello</html>"))
        with (
            Client("http://elsewhere", transport=transport) as client,
            pytest.raises(errors.Unavailable, match="not JSON"),
        ):
            client.runs()


def test_openapi_documents_every_route_with_its_errors(http: TestClient) -> None:
    document = http.get("/openapi.json").json()
    assert len(document["paths"]) >= 11
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], f"{method} {path}"
            if path.startswith("/v1"):
                assert "401" in operation["responses"], f"{method} {path}"
                assert "application/problem+json" in operation["responses"]["401"]["content"]
    examples = json.dumps(document["components"]["schemas"]["Submission"])
    assert "feature-build" in examples
