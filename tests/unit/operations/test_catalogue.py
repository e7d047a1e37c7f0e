from __future__ import annotations

from gorgon_common.operations.catalogue import Effect, load_operations
from gorgon_common.workflow.legacy.steps import _RENAMED


def test_every_integration_declares_its_operations_with_their_effect() -> None:
    found = {name: [entry.name for entry in entries] for name, entries in load_operations().integrations().items()}
    assert {name: len(names) for name, names in found.items()} == {
        "anthropic": 1,
        "github": 17,
        "gmail": 7,
        "http": 1,
        "mcp": 1,
        "notion": 9,
        "openai": 2,
        "slack": 8,
    }
    assert found["http"] == ["http.request"]


def test_what_reaches_a_person_is_a_send_and_what_only_looks_is_a_read() -> None:
    operations = load_operations()
    assert operations["slack.post_message"].effect is Effect.SEND
    assert operations["gmail.create_draft"].effect is Effect.WRITE
    assert operations["github.read_file"].effect is Effect.READ
    assert operations["http.request"].effect is Effect.WRITE


def test_names_of_older_files_lead_to_operations_that_exist() -> None:
    assert set(_RENAMED.values()) <= set(load_operations())
