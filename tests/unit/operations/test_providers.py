"""All that Gorgon knows of a provider is in its descriptor: where else one is named, and that each is complete."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from gorgon_common import queues
from gorgon_common.operations.providers import DEFAULT_MODEL_PROVIDER, MODEL_PROVIDERS, PROVIDERS, SERVERS
from gorgon_common.ratelimit.quotas import CONCURRENCY
from gorgon_common.settings import Settings, variable_of

ROOT = Path(__file__).parents[3]
NAMES = re.compile("anthropic|openai", re.I)
MAY_NAME_THEM = {
    "gorgon_common/operations/providers/__init__.py": "the list of descriptors",
    "gorgon_common/operations/providers/openai.py": "a descriptor",
    "gorgon_common/operations/providers/anthropic.py": "a descriptor",
    "gorgon_common/queues.py": "the names of the queues, in the order of their stored numbers",
    "gorgon_common/settings.py": "the settings that users see",
    "gorgon_common/masking.py": "variables that hold secrets, also those of other programs; imports nothing",
    "gorgon_common/workflow/schema.py": "an example in the description of a field",
    "gorgon_common/workflow/legacy/base.py": "words of the older format",
    "gorgon_common/workflow/legacy/graphs.py": "words of the older format",
    "gorgon_common/workflow/legacy/steps.py": "words of the older format",
    "gorgon_common/client/schemas.py": "examples in the documentation of the HTTP API",
    "gorgon_common/cli/money_commands.py": "examples in help texts",
    "gorgon_common/cli/demo.py": "the workflow of the demonstration",
    "gorgon_common/cli/limits.py": "an example in a hint",
    "gorgon_worker/commands.py": "an example in a help text",
    "gorgon_worker/providers/openai.py": "an SDK adapter",
    "gorgon_worker/providers/anthropic.py": "an SDK adapter",
    "gorgon_worker/providers/replies.py": "the usage of each SDK",
    "gorgon_worker/providers/schemas.py": "the JSON Schema that each SDK accepts",
}


def mentions(path: Path) -> set[str]:
    """Return the identifiers and strings of a module that name a provider; docstrings do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in prose and NAMES.search(text):
                found.add(text)
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.FunctionDef(name=name) | ast.alias(name=name):
                if NAMES.search(name):
                    found.add(name)
    return found


def test_nothing_else_names_a_provider_of_models() -> None:
    packages = ("gorgon", "gorgon_common", "gorgon_worker", "gorgon_api")
    paths = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix(): mentions(path) for path in paths}
    named = {path: names for path, names in found.items() if names and "gorgon_api/sandbox/" not in path}
    assert {path: names for path, names in named.items() if path not in MAY_NAME_THEM} == {}
    assert MAY_NAME_THEM.keys() <= named.keys(), "an exception that is not needed any more"


def test_the_settings_of_a_descriptor_exist() -> None:
    for server in SERVERS.values():
        assert variable_of(server.key_setting) == server.key_variable
        assert variable_of(server.url_setting) == server.url_variable
        assert server.key(Settings()) is None or server.key_setting in Settings().model_fields_set


def test_only_its_own_server_is_official() -> None:
    openai = SERVERS["openai"]
    assert openai.official(Settings())
    assert openai.official(Settings(OPENAI_BASE_URL="https://eu.api.openai.com/v1"))
    assert not openai.official(Settings(OPENAI_BASE_URL="http://127.0.0.1:11434/v1"))


def test_descriptors_are_complete() -> None:
    assert DEFAULT_MODEL_PROVIDER in MODEL_PROVIDERS
    for name, provider in PROVIDERS.items():
        assert (provider.name, provider.queue in queues.ALL) == (name, True)
        known = {dimension.name for dimension in provider.dimensions} | {CONCURRENCY}
        assert len(known) == len(provider.dimensions) + 1
        for table in (*provider.tiers.values(), {"*": provider.sandbox}):
            for amounts in table.values():
                assert amounts.keys() <= known
        assert not provider.tiers or provider.tier in provider.tiers
        assert all(dimension.period > 0 and dimension.whole >= 0 for dimension in provider.dimensions)
        assert (provider.models is None) == (name not in MODEL_PROVIDERS)
        assert (provider.server is None) == (not provider.client)
