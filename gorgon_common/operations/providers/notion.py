"""Notion: three requests a second on average, reported by no header but `Retry-After`."""

from __future__ import annotations

from gorgon_common import queues
from gorgon_common.operations.dimensions import Dimension
from gorgon_common.operations.effects import Effect
from gorgon_common.operations.providers.descriptor import Provider

NOTION = Provider(
    name="notion",
    title="Notion",
    queue=queues.NOTION,
    dimensions=(Dimension("requests", 1.0, whole=1),),
    tier="default",
    tiers={"default": {"*": {"requests": 3}}},
    operations={
        Effect.READ: "search query_data_source get_page read_content",
        Effect.WRITE: "create_page update_page append_blocks archive_page create_entry",
    },
)
