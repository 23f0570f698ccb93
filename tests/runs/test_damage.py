from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_tui.checksums import NAME, digest, write_checksums
from qlora_tui.runs.damage import (
    ADAPTER_FILES,
    MARKER,
    adapter_damage,
    checkpoint_damage,
    checksum_damage,
)
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import Finished


def put_adapter(folder: Path) -> Path:
    """A small adapter in the formats that peft writes."""
    folder.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"a": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes(range(64))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return folder


def put_checkpoint(folder: Path, *, with_checksums: bool = True) -> Path:
    """A checkpoint; without checksums it is as older versions wrote it."""
    put_adapter(folder)
    with zipfile.ZipFile(folder / "optimizer.pt", "w") as archive:
        archive.writestr("optimizer/data/0", bytes(4096))
    if with_checksums:
        write_checksums(folder)
    (folder / MARKER).write_text(json.dumps({f.name: f.stat().st_size for f in folder.iterdir()}))
    return folder


def flip(file: Path, place: int) -> None:
    """Change one byte, as a bad disk or cable does."""
    content = bytearray(file.read_bytes())
    content[place] ^= 0xFF
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "adapter_config.json", NAME])
def test_a_flipped_byte_in_a_checkpoint_is_damage(tmp_path: Path, name: str) -> None:
    folder = put_checkpoint(tmp_path / "step-1")
    assert checkpoint_damage(folder) is None
    flip(folder / name, -9)
    damage = checkpoint_damage(folder)
    assert damage is not None and name in damage


def test_an_old_checkpoint_is_checked_by_its_archives(tmp_path: Path) -> None:
    folder = put_checkpoint(tmp_path / "step-1", with_checksums=False)
    assert checkpoint_damage(folder) is None
    flip(folder / "optimizer.pt", 1000)
    assert "optimizer.pt" in (checkpoint_damage(folder) or "")


@pytest.mark.parametrize("content", [b"", b"\0" * 200, b"\xff" * 200])
def test_an_old_adapter_emptied_by_a_power_cut_is_damage(tmp_path: Path, content: bytes) -> None:
    folder = put_adapter(tmp_path / "adapter")
    assert adapter_damage(folder) is None
    (folder / "adapter_model.safetensors").write_bytes(content)
    assert adapter_damage(folder) is not None


def test_only_the_named_files_of_an_adapter_are_read(tmp_path: Path) -> None:
    folder = put_checkpoint(tmp_path / "step-1")
    flip(folder / "optimizer.pt", 1000)
    assert adapter_damage(folder) is not None
    assert adapter_damage(folder, only=["adapter_model.safetensors", "adapter_config.json"]) is None


@pytest.mark.parametrize(
    "line",
    ["", "short  x\n", *(f"{'0' * 64}  {name}\n" for name in ("../recipe.toml", "/etc/passwd", "a\0b"))],
)
def test_a_damaged_list_of_checksums_reads_nothing_outside(tmp_path: Path, line: str) -> None:
    folder = put_adapter(tmp_path / "adapter")
    (folder / NAME).write_text(line)
    assert NAME in (adapter_damage(folder) or "")


def test_a_pipe_in_place_of_a_file_is_damage(tmp_path: Path) -> None:
    folder = put_adapter(tmp_path / "adapter")
    (folder / "tokenizer.json").write_text("{}")
    write_checksums(folder)
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    assert "tokenizer.json" in (adapter_damage(folder) or "")


def without_weights(sums: Path) -> None:
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(line for line in lines if "adapter_model" not in line))


def first_line_only(sums: Path) -> None:
    sums.write_text(sums.read_text().splitlines(keepends=True)[0])


@pytest.mark.parametrize("edit", [without_weights, first_line_only])
@pytest.mark.parametrize("put", [put_adapter, put_checkpoint])
def test_weights_that_the_checksums_do_not_list_are_damage(
    tmp_path: Path, put: Callable[[Path], Path], edit: Callable[[Path], None]
) -> None:
    folder = put(tmp_path / "adapter")
    write_checksums(folder)
    flip(folder / "adapter_model.safetensors", -1)
    edit(folder / NAME)
    assert NAME in (adapter_damage(folder) or "")
    assert NAME in (checksum_damage(folder, only=ADAPTER_FILES) or "")
    if put is put_checkpoint:
        assert checkpoint_damage(folder) is not None


def test_a_checkpoint_without_its_checksums_is_damage(tmp_path: Path) -> None:
    folder = put_checkpoint(tmp_path / "step-1")
    (folder / NAME).unlink()
    assert NAME in (checksum_damage(folder, only=ADAPTER_FILES) or "")
    assert NAME in (checkpoint_damage(folder) or "")


def unlisted_tokenizer(sums: Path) -> None:
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(line for line in lines if "tokenizer" not in line))


@pytest.mark.parametrize("edit", [unlisted_tokenizer, without_weights, Path.unlink])
def test_checksums_of_a_finished_run_that_were_edited_are_damage(
    tmp_path: Path, edit: Callable[[Path], None]
) -> None:
    folder = put_adapter(tmp_path / "adapter")
    (folder / "tokenizer.json").write_text("{}")
    write_checksums(folder)
    with EventWriter(tmp_path / "events.jsonl") as log:
        log.append(Finished(at=1.0, step=2, seconds=1.0, tokens_per_s=1.0, checksums=digest(folder)))
    assert adapter_damage(folder) is None
    edit(folder / NAME)
    assert NAME in (adapter_damage(folder) or "")
    assert NAME in (checksum_damage(folder, only=ADAPTER_FILES) or "")


def test_an_adapter_from_before_checksums_were_recorded_is_whole(tmp_path: Path) -> None:
    folder = put_adapter(tmp_path / "adapter")
    with EventWriter(tmp_path / "events.jsonl") as log:
        log.append(Finished(at=1.0, step=2, seconds=1.0, tokens_per_s=1.0))
    assert adapter_damage(folder) is None
