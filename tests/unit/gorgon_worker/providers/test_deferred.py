"""SDKs are imported in parts: what a worker must not load, and that nobody misses anything."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


def run(program: str) -> str:
    """Run Python code in a process of its own; return what it printed."""
    code = textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded(program: str) -> set[str]:
    """Return the modules that the code has loaded."""
    return set(run(program + "\nimport sys\nprint(*sys.modules)").split())


@pytest.mark.parametrize(("served", "other"), [("openai", "anthropic"), ("anthropic", "openai")])
def test_a_worker_of_one_queue_loads_one_sdk(served: str, other: str) -> None:
    found = loaded(
        f"from gorgon_worker import start, worker\n"
        f"from gorgon_worker.providers import CLIENTS\n"
        f"from gorgon_common import lazy\n"
        f"lazy.load(CLIENTS[{served!r}])"
    )
    assert served in found
    assert other not in found
    assert not {"fastapi", "uvicorn", "streamlit", "alembic", "celery.bin.celery"} & found


def test_a_worker_without_providers_loads_no_sdk() -> None:
    found = loaded("from gorgon_worker import start, worker, wiring, tasks")
    assert not {"openai", "anthropic", "genai_prices.data", "fastapi", "alembic"} & found


def test_a_call_takes_a_part_of_the_sdk() -> None:
    found = loaded("import gorgon_worker.providers.anthropic")
    assert sum(name.startswith("anthropic.") for name in found) < 1000  # 2,900 by an ordinary import
    assert not {"anthropic.lib.tools", "anthropic.lib.vertex", "anthropic.resources.beta.beta"} & found


@pytest.mark.parametrize("sdk", ["openai", "anthropic"])
def test_others_find_the_whole_sdk(sdk: str) -> None:
    """A command or an embedding application in this process may use it as well."""
    public = f"""
        import {sdk}, {sdk}.types
        names = [*{sdk}.__all__]
        kinds = [(name, getattr({sdk}, name)) for name in names]
        print(sorted((name, kind.__module__) for name, kind in kinds if isinstance(kind, type)))
        print(sorted(name for name in dir({sdk}.types) if name[0].isupper()))
    """
    assert run(f"\n        import gorgon_worker.providers.{sdk}" + public) == run(public)


def test_a_single_name_brings_its_module_alone() -> None:
    said = run(
        """
        import sys
        from gorgon_worker.providers.deferred import deferred
        with deferred("anthropic"):
            import anthropic.types
        from anthropic.types import TextBlock
        beta = "anthropic.types.beta.beta_text_block" in sys.modules
        print(TextBlock.__module__, beta, hasattr(anthropic.types, "Nil"))
        """
    )
    assert said == "anthropic.types.text_block False False"


def test_an_sdk_that_is_there_already_is_left_alone() -> None:
    said = run(
        """
        import anthropic
        before = anthropic.Anthropic
        import gorgon_worker.providers.anthropic as ours
        print(ours.anthropic is anthropic, ours.anthropic.Anthropic is before, type(anthropic).__name__)
        """
    )
    assert said == "True True module"
