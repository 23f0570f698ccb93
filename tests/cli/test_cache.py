"""``cache``: listing and deleting what can be made again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_tui import paths
from tests.cli.conftest import Call


@pytest.fixture
def cached() -> dict[str, Path]:
    """A quantized base and tokenized data."""
    places = {
        "quantized": paths.cache_dir() / "quantized" / "tiny-nf4-0123456789abcdef",
        "tokenized": paths.cache_dir() / "tokenized" / ("abcd" * 8),
    }
    for size, place in enumerate(places.values(), 1):
        place.mkdir(parents=True)
        (place / "file").write_bytes(b"x" * 1024 * size)
    (places["quantized"].parent / ".lock").touch()
    (places["quantized"].parent / "mine").mkdir()
    return places


def test_the_list_shows_kind_name_size_and_how_to_delete(call: Call, cached: dict[str, Path]) -> None:
    shown = call("cache")
    assert shown.code == 0
    assert "tiny-nf4-0123" in shown.out and "1 KiB" in shown.out and "3 KiB in all" in shown.out
    assert "qlora-tui cache --clear quantized" in shown.out and ".lock" not in shown.out


def test_json_has_paths_and_bytes(call: Call, cached: dict[str, Path]) -> None:
    data = json.loads(call("cache", "--json").out)
    assert data["total_bytes"] == 3072
    assert {item["path"] for item in data["items"]} == set(map(str, cached.values()))


def test_clear_deletes_one_kind_only(call: Call, cached: dict[str, Path]) -> None:
    shown = call("cache", "--clear", "quantized")
    assert "Deleted 1 KiB of quantized" in shown.out
    assert not cached["quantized"].exists() and cached["tokenized"].exists()
    assert (cached["quantized"].parent / "mine").exists()


def test_an_empty_cache_says_where_it_would_be(call: Call) -> None:
    assert str(paths.cache_dir()) in call("cache").out
