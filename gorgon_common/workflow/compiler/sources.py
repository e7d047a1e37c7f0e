"""The compiler's inputs as protocols: the file with its positions, the roles and the operations.

The loader, the roles and the operations live outside this package, which does not import them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from gorgon_common.errors import Problem
from gorgon_common.workflow.compiler.layout import Place
from gorgon_common.workflow.schema import Workflow


class Role(Protocol):
    """The parts of a role that the compiler reads."""

    @property
    def system(self) -> str: ...  # noqa: D102
    @property
    def task(self) -> str: ...  # noqa: D102
    @property
    def provider(self) -> str: ...  # noqa: D102
    @property
    def tier(self) -> str: ...  # noqa: D102
    @property
    def effort(self) -> str: ...  # noqa: D102
    @property
    def max_tokens(self) -> int: ...  # noqa: D102
    @property
    def output_schema(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def allowed_tools(self) -> Iterable[str]: ...  # noqa: D102


class Operation(Protocol):
    """The part of an operation that the compiler reads; `effect` is read, write or send."""

    @property
    def effect(self) -> str: ...  # noqa: D102


Roles = Mapping[str, Role]
Operations = Mapping[str, Operation]


class Source(Protocol):
    """A workflow with its positions in the file, such as the loader's LoadedWorkflow."""

    @property
    def spec(self) -> Workflow: ...  # noqa: D102

    def problem(
        self, message: str, path: Place = (), *, hint: str = "", offset: int | None = None, severity: str = "error"
    ) -> Problem:
        """Return a problem at a place in the file."""
        ...


class Bare:
    """A workflow without a file: its problems only have a path in the document."""

    def __init__(self, spec: Workflow) -> None:
        self.spec = spec

    def problem(
        self, message: str, path: Place = (), *, hint: str = "", offset: int | None = None, severity: str = "error"
    ) -> Problem:
        """Return a problem without line and column."""
        shown = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
        return Problem(message, path=shown, hint=hint, severity=severity)
