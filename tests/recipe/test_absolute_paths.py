from __future__ import annotations

from pathlib import Path

import pytest

from qlora_tui.recipe.absolute_paths import with_absolute_paths
from qlora_tui.recipe.schema import Data, Model, Recipe, Source


def test_local_files_become_absolute_and_hub_ids_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(
        model=Model(id="./model"),
        data=Data(sources=(Source(path="rows.jsonl"), Source(path="org/dataset"))),
    )
    moved = with_absolute_paths(recipe)
    assert moved.model.id == str(tmp_path / "model")
    assert [s.path for s in moved.data.sources] == [str(tmp_path / "rows.jsonl"), "org/dataset"]
    assert moved.data.validation_path == ""
