"""Who owns a run, by every way in: the file's `team:` unless the request names one, and the key must be allowed to."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from gorgon_api.auth import Principal, SingleKey
from gorgon_common.cli import build as build_cli
from gorgon_common.settings import Settings, get_settings
from gorgon_worker.embedded import embedded
from tests.support.api import serve
from tests.support.running import FINISHED, eventually
from tests.support.sandbox import Sandbox, sandbox, sandbox_process
from tests.support.services import Services, build

__all__ = ["sandbox", "sandbox_process"]

KEY, SOME = "gk_for_every_team", "gk_for_support_alone"
TEXT = 'name: owned\nteam: research\nsteps:\n  - {id: ask, provider: openai, model: gpt-6.1-terra, prompt: "Say"}\n'


class Ring:
    """Two keys: one for every team, one for the team `support`."""

    def find(self, key: str) -> Principal | None:
        rings = (SingleKey(KEY), SingleKey(SOME, Principal("some", frozenset({"support"}))))
        return next((found for ring in rings if (found := ring.find(key)) is not None), None)


@dataclass
class Place:
    services: Services
    url: str
    http: httpx2.Client

    def ended(self, run_id: str) -> dict[str, Any]:
        eventually(lambda: self.services.run(run_id)["status"] in FINISHED, what="the run's end")
        return self.services.run(run_id, steps=True)


@pytest.fixture(scope="module")
def place(
    redis_server_url: str, sqlite_template: Path, sandbox_process: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """Services on SQLite and Redis, a worker, the API; the team `research` has next to no money."""
    database = tmp_path_factory.mktemp("teams") / "gorgon.db"
    shutil.copy(sqlite_template, database)
    settings = Settings(
        _env_file=None, database_url=f"sqlite:///{database}", redis_url=redis_server_url, lease_seconds=10
    )
    services = build(settings)
    with (
        contextlib.closing(services),
        embedded(services, queues=["openai"], slots=4, home="", target="sandbox", sandbox_url=sandbox_process.url),
        serve(services, Ring()) as url,
        httpx2.Client(base_url=url, headers={"X-API-Key": KEY}) as http,
    ):
        services.set_budget("team:research", period="month", usd="0.000001")
        yield Place(services, url, http)


@pytest.fixture
def here(place: Place, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The place, with the settings of somebody who may do everything."""
    settings = place.services.settings
    for name, value in {"REDIS_URL": settings.redis_url, "DATABASE_URL": settings.database_url, "API_KEY": KEY}.items():
        monkeypatch.setenv(f"GORGON_{name}", str(value))
    monkeypatch.setenv("GORGON_SANDBOX_URL", sandbox.url)
    get_settings.cache_clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owned.yaml").write_text(TEXT)
    return place


def posted(here: Place, team: str | None) -> str:
    response = here.http.post("/v1/runs", json={"source": TEXT, **({"team": team} if team else {})})
    assert response.status_code == 202, response.text
    return str(response.json()["run_id"])


def typed(*options: str) -> Callable[[Place, str | None], str]:
    def run(here: Place, team: str | None) -> str:
        more = [*(here.url if option == "URL" else option for option in options), *(["--team", team] if team else [])]
        result = CliRunner().invoke(build_cli(), ["run", "owned.yaml", "--json", *more])
        return str(json.loads(result.stdout)["run_id"])

    return run


WAYS: Mapping[str, Callable[[Place, str | None], str]] = {
    "POST": posted,
    "run": typed(),
    "run --detach": typed("--detach"),
    "run --server": typed("--server", "URL"),
    "run --server --detach": typed("--server", "URL", "--detach"),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_files_team_owns_the_run_and_its_budget_holds(here: Place, sandbox: Sandbox, way: str) -> None:
    run = here.ended(WAYS[way](here, None))
    assert (run["team"], run["status"]) == ("research", "failed")
    assert run["error"]["kind"] == "budget"
    assert "team research" in run["error"]["message"]
    assert sandbox.log() == []


@pytest.mark.parametrize("way", WAYS)
def test_a_request_may_name_another_team(here: Place, way: str) -> None:
    run = here.ended(WAYS[way](here, "support"))
    assert (run["team"], run["status"]) == ("support", "succeeded")


def test_a_resume_stays_with_the_team(here: Place) -> None:
    first = posted(here, None)
    here.ended(first)
    resumed = here.http.post(f"/v1/runs/{first}/resume").json()["run_id"]
    assert here.ended(resumed)["team"] == "research"


@pytest.mark.parametrize("team", ["", "x" * 101, "a\x00b"])
def test_what_cannot_be_a_teams_name(here: Place, team: str) -> None:
    response = here.http.post("/v1/runs", json={"source": TEXT, "team": team})
    assert (response.status_code, response.json()["errors"][0]["field"]) == (422, "team")
    if "\x00" not in team:
        assert CliRunner().invoke(build_cli(), ["run", "owned.yaml", "--team", team]).exit_code == 2


class TestAKeyForSomeTeams:
    @pytest.fixture
    def some(self, here: Place) -> Iterator[httpx2.Client]:
        with httpx2.Client(base_url=here.url, headers={"X-API-Key": SOME}) as http:
            yield http

    def refused(self, response: httpx2.Response) -> None:
        assert response.status_code == 403, response.text
        assert response.headers["content-type"] == "application/problem+json"
        body = response.json()
        assert (body["type"], body["team"]) == ("urn:gorgon:error:forbidden", "research")
        assert "'research'" in body["detail"]
        assert "support" in body["hint"]
        assert "GORGON_API_TEAMS" in body["hint"]

    def test_starts_runs_of_these_alone(self, here: Place, some: httpx2.Client) -> None:
        before = here.services.runs()["items"]
        self.refused(some.post("/v1/runs", json={"source": TEXT}))
        self.refused(some.post("/v1/runs", json={"source": TEXT, "team": "research"}))
        assert here.services.runs()["items"] == before
        started = some.post("/v1/runs", json={"source": TEXT, "team": "support"})
        assert here.ended(started.json()["run_id"])["team"] == "support"

    def test_neither_cancels_nor_resumes_nor_estimates_those_of_others(self, here: Place, some: httpx2.Client) -> None:
        run_id = posted(here, None)
        self.refused(some.post(f"/v1/runs/{run_id}/cancel"))
        here.ended(run_id)
        self.refused(some.post(f"/v1/runs/{run_id}/resume"))
        self.refused(some.post("/v1/workflows/plan", json={"source": TEXT}))
        assert some.post("/v1/workflows/plan", json={"source": TEXT, "team": "support"}).status_code == 200

    def test_the_command_line_says_so(self, here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GORGON_API_KEY", SOME)
        get_settings.cache_clear()
        result = CliRunner().invoke(build_cli(), ["run", "owned.yaml", "--server", here.url])
        assert result.exit_code == 2
        assert "may not act for the team 'research'" in result.stderr
        assert "GORGON_API_TEAMS" in result.stderr
