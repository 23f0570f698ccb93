from __future__ import annotations

import json

import msgspec
import pytest

from qlora_tui.data.inspection import inspect
from qlora_tui.data.read import rows
from qlora_tui.data.sources import HubFiles, hub_files, is_hub_id
from qlora_tui.errors import UserError
from qlora_tui.paths import cache_dir
from qlora_tui.recipe.schema import Source
from tests.data.fake_dataset_hub import dataset_hub


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


def test_a_missing_data_file_is_not_searched_on_the_hub() -> None:
    with pytest.raises(UserError, match="No such data") as caught:
        inspect(Source(path="data/rows.jsonl"))
    assert "hub" not in caught.value.what


@pytest.mark.slow
def test_without_network_both_readings_of_a_name_are_explained() -> None:
    with pytest.raises(UserError, match="No such data") as caught:
        inspect(Source(path="nobody/nothing"))
    assert "nobody/nothing is neither a local file nor a dataset" in caught.value.what
    assert caught.value.fix


ROWS = [{"prompt": f"q {n}", "completion": f"a {n}"} for n in range(700)]
FILES = {
    "README.md": b"---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\n---\n",
    "train.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
}


@pytest.mark.slow
def test_a_dataset_is_downloaded_once_and_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with dataset_hub(FILES) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        report = inspect(Source(path="owner/set"))
    assert report.counts.rows == 700
    assert report.files[0].format == "prompt-completion"
    assert "hub dataset owner/set, split train" in report.files[0].evidence
    files, _ = hub_files("owner/set")
    assert [row.value for file in files for row in rows(file)] == ROWS
    assert inspect(Source(path="owner/set")) == report


@pytest.mark.slow
def test_a_gated_dataset_says_how_to_get_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with dataset_hub(FILES, gated=True) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(UserError) as caught:
            hub_files("owner/gated")
    assert "Accept its terms" in caught.value.fix, caught.value


def test_a_note_whose_files_are_gone_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    note = cache_dir() / "datasets" / "owner--set.json"
    note.parent.mkdir()
    note.write_bytes(msgspec.json.encode(HubFiles(("/gone/set-train.arrow",), "train")))
    requests: list[str] = []

    def fetched(name: str) -> HubFiles:
        requests.append(name)
        return HubFiles((str(note),), "train")

    monkeypatch.setattr("qlora_tui.data.sources._fetch", fetched)
    assert hub_files("owner/set")[0] == [note]
    assert requests == ["owner/set"]
