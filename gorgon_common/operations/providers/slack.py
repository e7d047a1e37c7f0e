"""Slack: each method of a workspace has a tier, and each channel takes one message a second.

The limiter's key names the method in place of a model, so that each has its own buckets.
"""

from __future__ import annotations

from gorgon_common import queues
from gorgon_common.operations.dimensions import Dimension
from gorgon_common.operations.effects import Effect
from gorgon_common.operations.providers.descriptor import Provider

_TIER_1, _TIER_2, _TIER_3, _TIER_4 = ({"requests": amount} for amount in (1, 20, 50, 100))

SLACK = Provider(
    name="slack",
    title="Slack",
    queue=queues.SLACK,
    dimensions=(
        Dimension("requests", whole=1),
        Dimension("messages", 1.0, whole=1, per="channel"),
    ),
    tier="default",
    tiers={
        "default": {
            "chat.postMessage": {"messages": 1, "requests": 300},  # "several hundred messages a minute"
            "chat.update": _TIER_3,
            "conversations.history": _TIER_3,
            "conversations.replies": _TIER_3,
            "conversations.list": _TIER_2,
            "files.*": _TIER_4,
            "reactions.add": _TIER_3,
            "admin.*": _TIER_1,
            "*": _TIER_2,
        }
    },
    operations={
        Effect.READ: "list_channels read_history",
        Effect.WRITE: "update_message add_reaction",
        Effect.SEND: "post_message reply upload_file request_approval",
    },
)
