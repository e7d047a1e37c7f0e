"""Finding bundled workflows and templates by name."""

from __future__ import annotations

import pytest

from gorgon_common.errors import NotFound
from gorgon_common.workflow import catalogue


def test_entries_are_the_index_in_its_order() -> None:
    names = [entry.name for entry in catalogue.entries()]
    assert names[0] == "feature-build"
    assert len(names) == len(set(names)) >= 6
    first = catalogue.entries()[0].to_dict()
    assert first["title"] == "Feature build"
    assert "fan-out" in first["shows"]


def test_source_is_the_text_of_the_file() -> None:
    for entry in catalogue.entries():
        assert f"\nname: {entry.name}\n" in catalogue.source(entry.name)


def test_an_unknown_workflow_names_the_nearest() -> None:
    with pytest.raises(NotFound) as caught:
        catalogue.source("feature_biuld")
    assert "feature-build" in caught.value.hint


def test_a_name_is_not_a_path() -> None:
    for name in ("../pyproject", "templates/minimal", "index", ""):
        with pytest.raises(NotFound):
            catalogue.source(name)
        with pytest.raises(NotFound):
            catalogue.template(name)


def test_templates_begin_with_the_smallest() -> None:
    assert catalogue.templates()[0] == "minimal"
    for name in catalogue.templates():
        assert "steps:" in catalogue.template(name)
