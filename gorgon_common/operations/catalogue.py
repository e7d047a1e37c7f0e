"""The operations of every integration, by name, with what each does to the outside world.

`uses:` names one of them (`github.create_issue`).  For now a declaration is the name and the effect; typed input and
output, idempotency and quota cost belong here as well and come with the integrations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Effect(StrEnum):
    """What an operation does to the outside world."""

    READ = "read"  # changes nothing: may be repeated
    WRITE = "write"  # changes something that can be found again
    SEND = "send"  # reaches a person: cannot be taken back


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of an integration."""

    name: str
    """With its integration: `github.create_issue`."""
    effect: Effect

    @property
    def integration(self) -> str:
        """The part before the dot."""
        return self.name.split(".", 1)[0]


_DECLARED: dict[str, dict[Effect, str]] = {
    "github": {
        Effect.READ: "list_repositories get_repository list_issues get_issue list_pull_requests get_pull_request "
        "get_diff read_file",
        Effect.WRITE: "create_issue update_issue comment create_pull_request review_pull_request commit_file "
        "create_branch dispatch_workflow create_check_run",
    },
    "notion": {
        Effect.READ: "search query_data_source get_page read_content",
        Effect.WRITE: "create_page update_page append_blocks archive_page create_entry",
    },
    "gmail": {
        Effect.READ: "list_messages get_message search",
        Effect.WRITE: "create_draft label",
        Effect.SEND: "send reply",
    },
    "slack": {
        Effect.READ: "list_channels read_history",
        Effect.WRITE: "update_message add_reaction",
        Effect.SEND: "post_message reply upload_file request_approval",
    },
    # What a request or a tool does is known to its author alone, so both count as writes until the step says otherwise.
    "http": {Effect.WRITE: "request"},
    "mcp": {Effect.WRITE: "call"},
    "openai": {Effect.READ: "summarize embed"},
    "anthropic": {Effect.READ: "summarize"},
}


class OperationCatalogue(Mapping[str, Operation]):
    """Operation name → operation, sorted by name."""

    def __init__(self, operations: Mapping[str, Operation]) -> None:
        self._operations = dict(sorted(operations.items()))

    def __getitem__(self, name: str) -> Operation:
        return self._operations[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._operations)

    def __len__(self) -> int:
        return len(self._operations)

    def integrations(self) -> dict[str, list[Operation]]:
        """Return integration → its operations."""
        grouped: dict[str, list[Operation]] = {}
        for operation in self._operations.values():
            grouped.setdefault(operation.integration, []).append(operation)
        return grouped


def load_operations() -> OperationCatalogue:
    """Return every operation that a workflow may use."""
    declared = {}
    for integration, effects in _DECLARED.items():
        for effect, names in effects.items():
            for name in names.split():
                declared[f"{integration}.{name}"] = Operation(f"{integration}.{name}", effect)
    return OperationCatalogue(declared)
