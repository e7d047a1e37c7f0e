"""The HTTP API on the real services: what the database says, on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from gorgon_api.app import create_app
from gorgon_api.auth import SingleKey
from gorgon_common import errors
from gorgon_common.client import schemas
from gorgon_common.client.http import Client
from gorgon_common.persistence.tables import runs
from gorgon_common.scope import Scope
from gorgon_common.settings import Settings
from gorgon_worker.embedded import embedded
from tests.support.memory_services import MemoryServices
from tests.support.services import Services, build

KEY = "gk_test"
HELLO = """
name: hello
inputs: {topic: {type: string, required: true}, extra: {}}
steps:
  - {id: plan, role: planner, prompt: "Plan {{inputs.topic}}"}
  - {id: build, role: builder, prompt: "Build {{plan.output}}"}
outputs: {code: "{{build.output}}"}
"""


@pytest.fixture
def services(database_url: str) -> Iterator[Services]:
    """Real services; no worker listens, so that runs stay queued."""
    made = build(Settings(database_url=database_url))
    yield made
    made.close()


@pytest.fixture
def http(services: Services) -> Iterator[TestClient]:
    with TestClient(create_app(services, SingleKey(KEY)), headers={"X-API-Key": KEY}) as client:
        yield client


@pytest.fixture
def client(http: TestClient) -> Iterator[Client]:
    with Client("http://testserver", api_key=KEY, transport=http._transport) as made:
        yield made


def start(client: Client, topic: str = "tea", **more: str) -> str:
    return str(client.submit(source=HELLO, inputs={"topic": topic}, **more)["run_id"])


def test_a_run_has_the_published_shape(client: Client) -> None:
    run = client.run(start(client), steps=True)
    schemas.Run.model_validate(run)
    assert (run["status"] in ("queued", "running"), run["target"], run["workflow"]) == (True, "sandbox", "hello")
    assert [(step["id"], step["status"]) for step in run["steps"]] == [("plan", "ready"), ("build", "pending")]


def test_the_row_of_a_run_says_who_asked_for_it(client: Client, services: Services) -> None:
    run_id = start(client)
    plan, _ = services.read(HELLO)
    other = services.of(Scope(2, None, "cli:ann")).submit(plan, {"topic": "tea"}).run_id
    with services.database.read() as connection:
        rows = connection.execute(select(runs.c.public_id, runs.c.org_id, runs.c.actor)).all()
    assert {tuple(row) for row in rows} == {(run_id, 1, "key:api-key"), (other, 2, "cli:ann")}


def test_a_new_run_says_how_many_steps_it_has_to_run(client: Client) -> None:
    first = client.submit(source=HELLO, inputs={"topic": "tea"})
    assert (first["reused"], first["to_run"]) == (0, 2)
    mapped = """
name: mapped
inputs: {xs: {type: array}}
steps:
  - id: each
    role: builder
    map: {over: "{{inputs.xs}}", as: x}
    prompt: "{{x}}"
  - {id: note, checkpoint: done, depends_on: [each]}
"""
    assert client.submit(source=mapped, inputs={"xs": [1, 2, 3]})["to_run"] == 1


def test_an_idempotency_key(client: Client) -> None:
    first = start(client, idempotency_key="a")
    assert start(client, idempotency_key="a") == first
    assert start(client, idempotency_key="b") != first
    with pytest.raises(errors.Conflict):
        start(client, "coffee", idempotency_key="a")
    assert len(client.runs()["items"]) == 2


def test_pages_give_every_run_once_newest_first(client: Client) -> None:
    made = [start(client, str(n)) for n in range(5)]
    first = client.runs(limit=2)
    second = client.runs(limit=2, cursor=first["next"])
    third = client.runs(limit=2, cursor=second["next"])
    seen = [run["run_id"] for page in (first, second, third) for run in page["items"]]
    assert seen == made[::-1]
    assert third["next"] is None
    schemas.RunPage.model_validate(first)


@pytest.mark.parametrize("cursor", ["x", "////", "MQ", "LTE=", "OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5"])
def test_a_cursor_that_is_none(http: TestClient, cursor: str) -> None:
    response = http.get("/v1/runs", params={"cursor": cursor})
    assert response.status_code in (200, 422), response.text
    assert response.status_code == 422 or response.json()["items"] == []


def test_filters(client: Client) -> None:
    first, second = start(client), start(client)
    client.cancel(first)
    status = client.run(second)["status"]
    assert [run["run_id"] for run in client.runs(status=status)["items"]] == [second]
    assert client.runs(workflow="other")["items"] == []
    assert len(client.runs(workflow="hello")["items"]) == 2


def test_cancel_ends_it_its_journal_says_so_and_a_resume_is_a_new_run(client: Client, services: Services) -> None:
    run_id = start(client)
    client.cancel(run_id)
    # What comes after the last step needs a worker, even though no step of the run is left.
    with embedded(services, queues=[], slots=2, home="", target="sandbox", sandbox_url="http://127.0.0.1:9"):
        kinds = [event["kind"] for event in client.events(run_id)]
    assert kinds[-1] == "run.cancelled"
    assert client.run(run_id)["status"] == "cancelled"
    with pytest.raises(errors.Conflict):
        client.cancel(run_id)
    resumed = client.resume(run_id)
    schemas.Accepted.model_validate(resumed)
    assert resumed["run_id"] != run_id
    assert client.run(resumed["run_id"])["status"] in ("queued", "running")


def test_a_run_under_way_cannot_be_resumed(client: Client) -> None:
    with pytest.raises(errors.Conflict):
        client.resume(start(client))


def test_any_json_can_be_an_input(http: TestClient) -> None:
    extra = ["\u0000", "💩", 1e300, 10**30, None, {"": {"ü": []}}]
    response = http.post("/v1/runs", json={"source": HELLO, "inputs": {"topic": "\u0000 tea", "extra": extra}})
    assert response.status_code == 202, response.text


def test_the_same_as_the_services_of_other_tests(client: Client, http: TestClient) -> None:
    """The services in memory, which many tests stand on, give the same fields."""
    with TestClient(create_app(MemoryServices(), SingleKey(KEY)), headers={"X-API-Key": KEY}) as other:
        memory = Client("http://testserver", api_key=KEY, transport=other._transport)
        shapes = []
        for one in (client, memory):
            run = one.run(start(one), steps=True)
            event = next(one.events(run["run_id"], follow=False))
            shapes.append((set(run), set(run["steps"][0]), set(event), set(one.runs()), set(one.runs()["items"][0])))
    assert shapes[0] == shapes[1]


def test_ready(http: TestClient) -> None:
    response = http.get("/health/ready")
    assert (response.status_code, response.json()["status"]) == (200, "ok")
