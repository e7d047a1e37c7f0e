"""The roles that agents play, read from the YAML files beside this module.

A role defines a purpose, a prompt and the fields of the answer.  A file has exactly the fields of `Role`.  Its
`output_schema` uses only `type`, `properties`, `items`, `enum` and `description`.  Reading it closes every object (all
properties required, no others), the form that both model providers accept for native structured output.  A verdict
(`approved`, `passed`) comes after its reasons, because a model writes the fields in order.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Any

from gorgon_common.documents import read_data
from gorgon_common.errors import NotFound

TIERS = ("fast", "standard", "strong")
EFFORTS = ("low", "medium", "high")


@dataclass(frozen=True, slots=True)
class Role:
    """One role.

    `system` is the system prompt; its first line is `Role: <name>`.  `task` is the prompt of a step that names this
    role and has no prompt.  `tier` is fast, standard or strong; `models.resolve_model(provider, tier)` gives the name
    of the model.  `max_tokens` caps the output of one call.  `allowed_tools` are the operations that a step may list
    under `tools:` for this role.
    """

    name: str
    purpose: str
    system: str
    task: str
    provider: str
    tier: str
    effort: str
    max_tokens: int
    output_schema: Mapping[str, Any]
    allowed_tools: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the machine form, as `gorgon roles show --json` prints it."""
        plain = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


class RoleCatalogue(Mapping[str, Role]):
    """Role name → role.  Lookup accepts aliases; iteration gives the proper names only, sorted."""

    def __init__(self, roles: Mapping[str, Role]) -> None:
        self._roles = dict(sorted(roles.items()))
        self._names = {name: name for name in self._roles}
        for role in self._roles.values():
            for alias in role.aliases:
                if alias in self._names:
                    raise ValueError(f"role {role.name}: the alias {alias} is taken by {self._names[alias]}")
                self._names[alias] = role.name

    def __getitem__(self, name: str) -> Role:
        return self._roles[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)

    def find(self, name: str) -> Role:
        """Return the role of this name or alias; raise NotFound with the nearest names where there is none."""
        if name in self._names:
            return self[name]
        near = difflib.get_close_matches(name, self._names, n=1)
        meant = f"Did you mean {near[0]}?  " if near else ""
        raise NotFound(f"There is no role {name!r}.", hint=f"{meant}Roles: {', '.join(self._roles)}.")

    @property
    def aliases(self) -> dict[str, str]:
        """Alias → proper name."""
        return {alias: name for alias, name in self._names.items() if alias != name}


@cache
def load_roles() -> RoleCatalogue:
    """Return the bundled roles; read once a process."""
    folder = resources.files(__package__)
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    roles = [read_role((folder / name).read_text(encoding="utf-8"), name) for name in names]
    return RoleCatalogue({role.name: role for role in roles})


def read_role(text: str, source: str) -> Role:
    """Return the role that a YAML text declares; `source` names it in errors (ValueError)."""
    data = read_data(text, file=source)
    known = {entry.name for entry in fields(Role)}
    needed = known - {"aliases", "allowed_tools"}
    if not isinstance(data, dict) or not needed <= data.keys() <= known:
        raise ValueError(
            f"{source}: a role has the fields {', '.join(sorted(needed))} and no others but aliases and allowed_tools"
        )
    if data["tier"] not in TIERS or data["effort"] not in EFFORTS:
        raise ValueError(f"{source}: tier is one of {', '.join(TIERS)}; effort one of {', '.join(EFFORTS)}")
    for name in ("aliases", "allowed_tools"):
        data[name] = tuple(data.get(name) or ())
    for name in ("system", "task", "purpose"):
        data[name] = data[name].strip()
    return Role(**{**data, "output_schema": close_schema(data["output_schema"])})


def close_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema with every object closed: all its properties required, and no others allowed."""
    closed = dict(schema)
    if "properties" in closed:
        closed["properties"] = {name: close_schema(part) for name, part in closed["properties"].items()}
        closed["required"] = list(closed["properties"])
        closed["additionalProperties"] = False
    if "items" in closed:
        closed["items"] = close_schema(closed["items"])
    return closed
