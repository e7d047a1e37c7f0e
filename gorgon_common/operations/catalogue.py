"""The operations of every integration, by name, with what each does to the outside world.

`uses:` names one of them (`github.create_issue`); the descriptors of the providers declare them.  For now a
declaration is the name and the effect; typed input and output and idempotency come with the integrations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gorgon_common.operations.effects import Effect
from gorgon_common.operations.providers import PROVIDERS

__all__ = ["Effect", "Operation", "OperationCatalogue", "load_operations"]


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
    for provider in PROVIDERS.values():
        for effect, names in provider.operations.items():
            for name in names.split():
                declared[f"{provider.name}.{name}"] = Operation(f"{provider.name}.{name}", effect)
    return OperationCatalogue(declared)
