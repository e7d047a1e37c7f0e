"""Authentication: a key ring maps an API key to a principal.  Hashed keys in a database can become another key ring."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Annotated, Protocol

from fastapi import Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from gorgon_api.errors import Unauthorized
from gorgon_common.errors import Forbidden
from gorgon_common.scope import FIRST_ORG, Scope

_PREFIX = "gk_"


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller of a request.

    `name`: of the key, never the key itself.  `teams`: those that it may act for (None: every team).
    """

    name: str
    teams: frozenset[str] | None = None
    org: int = FIRST_ORG

    @property
    def scope(self) -> Scope:
        """The scope of the caller's requests; it has a team if the key belongs to exactly one."""
        team = next(iter(self.teams)) if self.teams is not None and len(self.teams) == 1 else None
        return Scope(self.org, team, f"key:{self.name}")

    def require(self, team: str) -> None:
        """Raise Forbidden unless the caller may act for a team: start or cancel its runs, set its budget."""
        if self.teams is not None and team not in self.teams:
            raise Forbidden(f"This API key may not act for the team {team!r}.", hint=self._hint(), team=team)

    def require_all(self, what: str) -> None:
        """Raise Forbidden unless the caller may act for every team, which the operation `what` requires."""
        if self.teams is not None:
            raise Forbidden(f"{what} concerns every team, and this API key may not act for all.", hint=self._hint())

    def _hint(self) -> str:
        known = ", ".join(sorted(self.teams or ())) or "none"
        return f"Teams that it may act for: {known}. GORGON_API_TEAMS on the server sets them."


class KeyRing(Protocol):
    """Looks up API keys."""

    def find(self, key: str) -> Principal | None:
        """Return the key's principal, or None if the key is unknown."""
        ...


class SingleKey:
    """The single key in GORGON_API_KEY; only its hash is kept."""

    def __init__(self, key: str, principal: Principal = Principal("api-key")) -> None:
        self._digest = _digest(key)
        self._principal = principal

    def find(self, key: str) -> Principal | None:
        """Return the principal if the key matches; compares in constant time."""
        return self._principal if hmac.compare_digest(_digest(key), self._digest) else None


def generate_key() -> str:
    """Return a new key of 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(32)


_BEARER = HTTPBearer(auto_error=False, scheme_name="bearer", description="The key: `Authorization: Bearer KEY`.")
_HEADER = APIKeyHeader(name="X-API-Key", auto_error=False, scheme_name="api-key", description="The same key.")


def authenticate(
    request: Request,
    _bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)] = None,
    _header: Annotated[str | None, Security(_HEADER)] = None,
) -> Principal:
    """Return the caller of the request; the two schemes are only for the OpenAPI document.  Raises Unauthorized."""
    key = _presented(request)
    if key is None:
        raise Unauthorized
    ring: KeyRing = request.app.state.keys
    principal = ring.find(key)
    if principal is None:
        raise Unauthorized("This API key is not known.")
    return principal


def _presented(request: Request) -> str | None:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return request.headers.get("X-API-Key") or None


def _digest(key: str) -> bytes:
    # The keys have 256 random bits, so a slow hash would add no protection and slow down every request.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
