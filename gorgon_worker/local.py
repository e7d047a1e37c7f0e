"""What `gorgon run` needs of this package: a worker, a sandbox and a home inside the process of the command.

The command line finds this module by name (`gorgon_common.cli.in_process`), because the core never imports this
package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from gorgon_common import lazy
from gorgon_common.bootstrap import Services
from gorgon_common.errors import GorgonError
from gorgon_worker.process_owner import is_deserted, new_home
from gorgon_worker.providers import CLIENTS
from gorgon_worker.runtime import Runtime
from gorgon_worker.sandbox_process import SandboxProcess

__all__ = ["LocalWorker", "SandboxProcess", "is_deserted", "new_home", "preload", "worker"]


class LocalWorker:
    """The worker of an embedded run."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def cancel(self, number: int) -> None:
        """Abort the calls of a run immediately, even if nothing can be stored."""
        self._runtime.cancel(number)

    def trouble(self) -> str:
        """Return what keeps the steps from going on, in a sentence; see `Runtime.trouble`."""
        return self._runtime.trouble()

    @property
    def given_up(self) -> GorgonError | None:
        """The error with which the worker has given up, if it has."""
        return self._runtime.machine.outage.final


def preload(queues: Sequence[str]) -> None:
    """Import the SDKs of these queues in the background, so that their first call is fast."""
    lazy.preload(CLIENTS[name] for name in queues if name in CLIENTS)


@contextmanager
def worker(
    services: Services, *, queues: Sequence[str], slots: int, home: str, target: str, sandbox_url: str | None
) -> Iterator[LocalWorker]:
    """Run the steps of `home` in this process until the context ends; see `embedded`."""
    embedded = lazy.load("gorgon_worker.embedded:embedded")  # Celery's worker; not needed for what is above
    with embedded(services, queues=queues, slots=slots, home=home, target=target, sandbox_url=sandbox_url) as runtime:
        yield LocalWorker(runtime)
