"""Gmail: quota units per user and second, as a moving average; the user is the account of the limiter's key."""

from __future__ import annotations

from gorgon_common import queues
from gorgon_common.operations.dimensions import Counts, Dimension
from gorgon_common.operations.effects import Effect
from gorgon_common.operations.providers.descriptor import Provider

GMAIL = Provider(
    name="gmail",
    title="Gmail",
    queue=queues.GMAIL,
    dimensions=(
        Dimension(
            "units",
            1.0,
            counts=Counts.OPERATION,
            costs={"gmail.send": 100, "gmail.reply": 100, "gmail.create_draft": 10, "*": 5},
        ),
    ),
    tier="default",
    tiers={"default": {"*": {"units": 250}}},
    operations={
        Effect.READ: "list_messages get_message search",
        Effect.WRITE: "create_draft label",
        Effect.SEND: "send reply",
    },
)
