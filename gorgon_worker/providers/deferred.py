"""Packages that import the modules below them one by one, as their names are asked for.

The `__init__` of an SDK imports every type of every service of its provider: Anthropic's takes 39 MB, of which calls to
models need a fifth.  Here such a package begins without having run its `__init__`.  A name that the `__init__` would
only have imported from a module below is taken from there; any other name lets it run.  So nothing is missing for
others that use the SDK in this process.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType
from typing import Any

_ASKED = ("__all__", "__title__", "__version__")
"""Names between underscores that an `__init__` may have; the import system asks for others, which must be missing."""
_executing = threading.local()


class _Package(ModuleType):
    """A package whose `__init__` has not run."""

    def __getattr__(self, name: str) -> Any:
        """Return what the package would have by this name, and keep it.  Raises AttributeError.

        There is no lock: it could wait for the import of a module whose importer waits for this package.  Two threads
        may do this at once; each module below is imported once, so both get the same.
        """
        running: set[str] = _executing.__dict__.setdefault("names", set())
        if self.__name__ in running or (name.startswith("__") and name not in _ASKED):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        source = self._imports().get(name)
        if source is not None:
            value = getattr(importlib.import_module(source[0]), source[1])
            setattr(self, name, value)
            return value
        if PathFinder.find_spec(f"{self.__name__}.{name}", self.__path__) is not None:
            return importlib.import_module(f"{self.__name__}.{name}")  # `from . import name`
        running.add(self.__name__)
        try:
            _loader(self).inner.exec_module(self)
        finally:
            running.discard(self.__name__)
        self.__class__ = ModuleType  # type: ignore[assignment]
        return getattr(self, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._imports()})

    def _imports(self) -> Mapping[str, tuple[str, str]]:
        """Return name → (module, its name there) for what the `__init__` imports from modules below."""
        loader = _loader(self)
        if loader.imports is None:
            found: dict[str, tuple[str, str]] = {}
            for line in ast.parse(Path(str(self.__file__)).read_bytes()).body:
                if isinstance(line, ast.ImportFrom) and line.level and line.module:
                    module = resolve_name("." * line.level + line.module, self.__name__)
                    found |= {entry.asname or entry.name: (module, entry.name) for entry in line.names}
            loader.imports = found
        return loader.imports


class _Waiting(Loader):
    """Makes a package, and leaves its `__init__` alone; `inner` would run it."""

    def __init__(self, inner: Loader) -> None:
        self.inner = inner
        self.imports: dict[str, tuple[str, str]] | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Package(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is run."""


class _Finder(MetaPathFinder):
    def __init__(self, top: str) -> None:
        self._top = top

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        top, *below = name.split(".")
        if top != self._top or any(part.startswith("_") for part in below):
            return None  # an SDK's private packages need one another whole
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.submodule_search_locations is not None and spec.loader is not None:
            spec.loader = _Waiting(spec.loader)
        return spec


def _loader(package: _Package) -> _Waiting:
    assert package.__spec__ is not None
    assert isinstance(package.__spec__.loader, _Waiting)
    return package.__spec__.loader


@contextlib.contextmanager
def deferred(top: str) -> Iterator[None]:
    """Let the package `top`, and those in it, begin without their `__init__`; for imports within the context.

    It does nothing where the package has been imported already.
    """
    if top in sys.modules:
        yield
        return
    finder = _Finder(top)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
