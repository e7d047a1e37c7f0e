"""For whom a request acts: the scope that the API makes of its key."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from gorgon_api.app import create_app
from gorgon_api.auth import Principal, SingleKey
from gorgon_common.scope import Scope
from tests.support.memory_services import MemoryServices

KEY = "gk_a-secret-that-nobody-may-see"


@pytest.mark.parametrize(
    ("teams", "team"),
    [(None, None), (frozenset(), None), (frozenset({"web"}), "web"), (frozenset({"web", "ml"}), None)],
)
def test_a_key_of_one_team_acts_for_it(teams: frozenset[str] | None, team: str | None) -> None:
    assert Principal("ops", teams).scope == Scope(1, team, "key:ops")
    assert Principal("ops", teams, org=7).scope.org == 7


class Recording(MemoryServices):
    """Notes the scopes of the sessions that requests ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.scopes: list[Scope] = []

    def of(self, scope: Scope) -> Recording:
        self.scopes.append(scope)
        return self


def test_each_request_acts_for_its_key_and_never_tells_the_secret() -> None:
    session = Recording()
    principal = Principal("ops", frozenset({"web"}))
    with TestClient(create_app(session, SingleKey(KEY, principal)), headers={"X-API-Key": KEY}) as http:
        assert http.get("/v1/runs").status_code == 200
        assert http.get("/v1/runs", headers={"X-API-Key": "wrong"}).status_code == 401
        assert http.get("/health/ready").status_code == 200
    assert session.scopes == [Scope(1, "web", "key:ops")]
    assert KEY not in repr(session.scopes)
