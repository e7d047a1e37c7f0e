"""What docs/providers.md says of models is what the descriptors have."""

from __future__ import annotations

import re
from pathlib import Path

from gorgon_common.roles.catalogue import TIERS
from gorgon_common.roles.models import model_providers, resolve_model
from gorgon_worker.providers.calling import STREAM_ABOVE

PAGE = (Path(__file__).parents[2] / "docs" / "providers.md").read_text(encoding="utf-8")


def test_the_table_of_tiers() -> None:
    for provider in model_providers():
        models = " | ".join(resolve_model(provider, tier) for tier in TIERS)
        assert f"| `{provider}` | {models} |" in PAGE


def test_the_bound_of_streaming() -> None:
    assert re.search(rf"`max_tokens: {STREAM_ABOVE}`", PAGE)
