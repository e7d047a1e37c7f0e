"""Finds the folders that a distribution includes beside its Python packages: `workflows` and `dashboard`.

In the repository they are top-level folders.  The wheel installs them inside this package, because a distribution must
not claim top-level names that others use: llama-index-workflows installs a package named `workflows`.
"""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

FOLDER = "_bundled"
"""Where the wheel puts them; see `force-include` in pyproject.toml."""


def folder(name: str) -> Traversable:
    """Return a bundled folder: from the installed wheel, or from the repository in an editable install."""
    installed = resources.files("gorgon_common") / FOLDER / name
    return installed if installed.is_dir() else Path(__file__).parents[1] / name
