"""GitHub.  Its limits apply to the whole account: one key for all of its calls."""

from __future__ import annotations

from gorgon_common import queues
from gorgon_common.operations.dimensions import HOUR, Counts, Dimension, Header
from gorgon_common.operations.effects import Effect
from gorgon_common.operations.providers.descriptor import Provider

GITHUB = Provider(
    name="github",
    title="GitHub",
    queue=queues.GITHUB,
    dimensions=(
        Dimension(
            "requests",
            HOUR,
            whole=1,
            header=Header(
                "x-ratelimit-limit",
                "x-ratelimit-remaining",
                "x-ratelimit-reset",
                moment=True,
                resource=("x-ratelimit-resource", "core"),
            ),
        ),
        # The secondary limits are in no header.
        Dimension("points", whole=5, counts=Counts.OPERATION, costs={"read": 1, "*": 5}),
        Dimension("writes", whole=1, counts=Counts.OPERATION, costs={"read": 0, "*": 1}),
    ),
    tier="default",
    tiers={"default": {"*": {"requests": 5000, "points": 900, "writes": 80, "concurrency": 100}}},
    operations={
        Effect.READ: "list_repositories get_repository list_issues get_issue list_pull_requests get_pull_request "
        "get_diff read_file",
        Effect.WRITE: "create_issue update_issue comment create_pull_request review_pull_request commit_file "
        "create_branch dispatch_workflow create_check_run",
    },
)
