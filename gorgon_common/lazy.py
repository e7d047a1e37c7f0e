"""Imports on first use: the only module that imports inside a function.

SDKs take seconds to import (anthropic 2.0, openai 0.7; less in the parts that
`gorgon_worker.providers.deferred` imports), and most commands need none of them.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterable
from typing import Any

from gorgon_common.errors import ConfigurationError

_INSTALLED_BY = {
    "github": "github",
    "notion_client": "notion",
    "slack_sdk": "slack",
    "googleapiclient": "google",
    "streamlit": "dashboard",
    "flower": "flower",
    "mcp": "mcp",
}
"""Top-level module → Gorgon's extra that installs it."""


def load(name: str) -> Any:
    """Return the module `name`, or the attribute if it is written `module:attribute`.

    Raises ConfigurationError if the package is not installed, with the command that installs it.
    """
    module, _, attribute = name.partition(":")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top or top in sys.modules:
            raise  # the module exists, but one of its own imports is missing
        extra = _INSTALLED_BY.get(top)
        what = f"gorgon[{extra}]" if extra else "gorgon"
        raise ConfigurationError(
            f"The Python package {top!r} is not installed.", hint=f"Install it with: pip install '{what}'"
        ) from None
    return getattr(loaded, attribute) if attribute else loaded


def preload(names: Iterable[str]) -> threading.Thread:
    """Import modules in a background thread, so that their first use is fast.  A failure is reported at that use."""
    wanted = tuple(names)

    def work() -> None:
        for name in wanted:
            try:
                load(name)
            except Exception:  # noqa: BLE001  whatever it is, `load` raises it again where the module is needed
                return

    thread = threading.Thread(target=work, name="gorgon-preload", daemon=True)
    thread.start()
    return thread
