"""The bundled workflows and templates: YAML files in the folder `workflows`, listed in its `index.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from gorgon_common import bundled
from gorgon_common.documents import read_data
from gorgon_common.errors import NotFound
from gorgon_common.workflow.schema import suggest

_FOLDER = "workflows"


@dataclass(frozen=True, slots=True)
class Entry:
    """One bundled workflow.  `shows` lists the language features that it demonstrates."""

    name: str
    title: str
    description: str
    file: str
    shows: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the machine-readable form, as printed by `gorgon workflows ls --json`."""
        return {"name": self.name, "title": self.title, "description": self.description, "shows": list(self.shows)}


@cache
def entries() -> tuple[Entry, ...]:
    """Return the bundled workflows in the order of the index."""
    listed = read_data(_read("index.yaml"), file="index.yaml")["workflows"]
    return tuple(Entry(name=name, **{**entry, "shows": tuple(entry["shows"])}) for name, entry in listed.items())


def source(name: str) -> str:
    """Return the text of a bundled workflow.  Raises NotFound, suggesting the closest name."""
    for entry in entries():
        if entry.name == name:
            return _read(entry.file)
    names = [entry.name for entry in entries()]
    raise NotFound(f"There is no bundled workflow {name!r}.", hint=suggest(name, names))


def templates() -> tuple[str, ...]:
    """Return the names of the templates, `minimal` first."""
    files = (bundled.folder(_FOLDER) / "templates").iterdir()
    names = {entry.name.removesuffix(".yaml") for entry in files if entry.name.endswith(".yaml")}
    return ("minimal", *sorted(names - {"minimal"}))


def template(name: str) -> str:
    """Return the text of a template.  Raises NotFound."""
    if name not in templates():
        raise NotFound(f"There is no template {name!r}.", hint=f"Templates: {', '.join(templates())}.")
    return _read(f"templates/{name}.yaml")


def _read(path: str) -> str:
    return (bundled.folder(_FOLDER) / path).read_text(encoding="utf-8")
