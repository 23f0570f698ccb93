"""What the trainer needs of the libraries is there, and its absence is a clear error."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytest.importorskip("torch")

from qlora_tui.errors import UserError
from qlora_tui.training import library_names

pytestmark = pytest.mark.slow


def test_the_libraries_have_every_name() -> None:
    named = [(library, name) for library, names in library_names.NAMES.items() for name in names]
    assert named and [each for each in named if not library_names.exists(*each)] == []


def test_a_missing_name_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(library_names.NAMES, "peft", ("utils.other:GoneWrapper",))
    with pytest.raises(UserError, match=r"peft\.utils\.other\.GoneWrapper"):
        library_names.require_names()


def test_each_library_has_an_upper_bound() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    declared = {each.name: each for each in map(Requirement, project["dependencies"])}
    for library in library_names.NAMES:
        assert any(bound.operator == "<" for bound in declared[library].specifier), library
