"""For whom a call is made: the organisation and team it belongs to, and who asked for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

FIRST_ORG = 1
"""The organisation of an installation that has only one."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Travels with every call, from the route or command down to the row.

    `org`: the number of the organisation; nothing may be read or written across it.  `team`: None if the caller belongs
    to no team.  `actor`: the key, person or process that asked, as the audit shows it: `key:ops`, `cli:ann`.
    """

    org: int = FIRST_ORG
    team: str | None = None
    actor: str = "system"

    def of_team(self, team: str | None) -> Scope:
        """Return the same scope for another team."""
        return replace(self, team=team)


SYSTEM = Scope()
"""The scope of Gorgon's own processes in an installation of one organisation."""
