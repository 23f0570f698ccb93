from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from qlora_tui.data.hub import HubFiles, hub_files, is_hub_id
from qlora_tui.data.inspect import inspect
from qlora_tui.data.read import rows
from qlora_tui.errors import Problem
from qlora_tui.paths import cache_dir
from qlora_tui.recipe.schema import Source


@pytest.mark.parametrize(
    ("name", "could_be"),
    [
        ("tatsu-lab/alpaca", True),
        ("owner/name.v2:subset", True),
        ("alpaca", False),
        ("/data/alpaca", False),
        ("./a/b", False),
        ("~/a", False),
        ("a/b/c", False),
        ("a b/c", False),
    ],
)
def test_ids_are_told_from_paths(name: str, could_be: bool) -> None:
    assert is_hub_id(name) is could_be


def test_a_missing_data_file_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(Problem, match="No such data") as caught:
        inspect(Source(path="data/rows.jsonl"))
    assert "hub" not in caught.value.what


@pytest.mark.slow
def test_without_a_way_to_the_hub_both_readings_of_the_name_are_named() -> None:
    with pytest.raises(Problem, match="No such data") as caught:
        inspect(Source(path="nobody/nothing"))
    assert "nobody/nothing is neither a file here nor a dataset" in caught.value.what
    assert caught.value.fix


@pytest.mark.slow
def test_the_child_process_loads_a_dataset_and_its_files_are_read_in_place(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    values = [{"prompt": f"q {n}", "completion": f"a {n}"} for n in range(700)]
    (folder / "train.jsonl").write_text("".join(json.dumps(v) + "\n" for v in values))
    (folder / "test.jsonl").write_text(json.dumps(values[0]) + "\n")
    words = [sys.executable, "-m", "qlora_tui.data.hub_fetch", str(folder)]
    done = subprocess.run(words, capture_output=True, check=True)
    found = msgspec.json.decode(done.stdout.splitlines()[-1], type=HubFiles)
    assert found.split == "train"
    assert [row.value for file in found.files for row in rows(Path(file))] == values
    note = cache_dir() / "datasets" / "owner--set.json"
    note.parent.mkdir()
    note.write_bytes(msgspec.json.encode(found))
    report = inspect(Source(path="owner/set"))
    assert report.counts.rows == 700
    assert "hub dataset owner/set, split train" in report.files[0].evidence
    assert hub_files("owner/set")[0] == [Path(file) for file in found.files]
