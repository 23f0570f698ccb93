"""Base weights that were quantized once are read by later loads."""

from __future__ import annotations

import gc
import importlib
import json
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qlora_tui import settings
from qlora_tui.recipe.schema import Model, Quantization, Recipe
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.events import PhaseChanged
from qlora_tui.settings import Settings
from qlora_tui.training import model as model_loading
from qlora_tui.training import quantized_cache
from qlora_tui.training.compute_device import find_device
from qlora_tui.training.model import load_base
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events_of, losses
from tests.training.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow

GIB = 1 << 30
SHARD_BYTES = 20_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "base")


def load(folder: Path, on_progress: Any = None, **quantization: Any) -> nn.Module:
    recipe = recipe_of(folder, **quantization)
    model: nn.Module = load_base(folder, recipe, find_device(recipe), "segments", on_progress)
    return model


def recipe_of(folder: Path, **quantization: Any) -> Recipe:
    settings = {"compute_dtype": "float32", **quantization}
    return Recipe(model=Model(id=str(folder)), quantization=Quantization(**settings))


def stored_folder(folder: Path, **quantization: Any) -> Path | None:
    recipe = recipe_of(folder, **quantization)
    return quantized_cache.cache_path(folder, recipe, find_device(recipe))


def stored_folders() -> list[Path]:
    return [path for path in quantized_cache.quantized_dir().iterdir() if path.is_dir()]


@pytest.fixture
def quantizations(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of weights that are quantized."""
    from bitsandbytes.nn import Params4bit

    shapes: list[torch.Size] = []
    right = Params4bit._quantize

    def quantize(self: Any, device: Any) -> Any:
        shapes.append(self.shape)
        return right(self, device)

    monkeypatch.setattr(Params4bit, "_quantize", quantize)
    return shapes


@pytest.mark.parametrize(("method", "double"), [("nf4", True), ("fp4", False)])
def test_a_second_load_quantizes_nothing_and_is_the_same(
    folder: Path, method: str, double: bool, quantizations: list[torch.Size]
) -> None:
    first = load(folder, method=method, double_quantization=double)
    assert quantizations
    quantizations.clear()
    progress: list[tuple[int, int]] = []
    second = load(
        folder, lambda done, total: progress.append((done, total)), method=method, double_quantization=double
    )
    assert not quantizations
    assert progress and progress[-1][0] == progress[-1][1]
    expected, values = first.state_dict(), second.state_dict()
    assert expected.keys() == values.keys()
    assert all(torch.equal(values[name], tensor) for name, tensor in expected.items())
    assert not any(parameter.requires_grad for parameter in second.parameters())
    assert second.config._name_or_path == str(folder)  # type: ignore[union-attr]
    ids = torch.arange(3, 30)[None]
    assert torch.equal(first(ids).logits, second(ids).logits)


@pytest.mark.parametrize("quantization", [{"method": "none"}, {"method": "int8"}])
def test_only_4_bit_weights_are_stored(folder: Path, quantization: dict[str, Any]) -> None:
    assert stored_folder(folder, **quantization) is None


def test_other_files_settings_or_versions_are_quantized_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change_config() -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-4}))

    def touch_weights() -> None:
        os.utime(folder / "model.safetensors", ns=(0, 1))

    def update_library() -> None:
        monkeypatch.setattr(quantized_cache, "version", lambda name: "99")

    places = [stored_folder(folder, **q) for q in ({}, {"method": "fp4"}, {"double_quantization": False})]
    places.append(stored_folder(folder, compute_dtype="bfloat16"))
    for change in (change_config, touch_weights, update_library):
        change()
        places.append(stored_folder(folder))
    assert None not in places and len(set(places)) == 7


def cut(stored: Path) -> None:
    weights = stored / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def without_a_tensor(stored: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(stored / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, stored / "model.safetensors", {"format": "pt"})


def no_json(stored: Path) -> None:
    (stored / "config.json").write_text("{")


@pytest.mark.parametrize("damage", [cut, without_a_tensor, no_json])
def test_damaged_weights_are_quantized_again(
    folder: Path, damage: Callable[[Path], None], quantizations: list[torch.Size]
) -> None:
    expected = load(folder).state_dict()
    stored = stored_folder(folder)
    assert stored is not None
    damage(stored)
    quantizations.clear()
    values = load(folder).state_dict()
    assert quantizations
    assert all(torch.equal(values[name], tensor) for name, tensor in expected.items())
    quantizations.clear()
    load(folder)
    assert not quantizations


@pytest.mark.parametrize("raises", [True, False])
def test_what_was_read_of_damaged_weights_is_freed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, raises: bool
) -> None:
    load(folder)
    alive: list[weakref.ref[torch.Tensor]] = []
    load_files = model_loading._load

    def damaged(path: Path, *args: Any, **settings: Any) -> Any:
        if path == folder:
            assert alive[0]() is None
            return load_files(path, *args, **settings)
        weights = torch.ones(8)
        alive.append(weakref.ref(weights))
        if raises:
            raise OSError("damaged")
        model = SimpleNamespace(weights=weights)
        model.cycle = model
        return model, {"missing_keys": {"lm_head.weight"}}

    monkeypatch.setattr(model_loading, "_load", damaged)
    gc.collect()
    gc.disable()
    try:
        load(folder)
    finally:
        gc.enable()
    assert alive


def test_the_least_recently_used_weights_are_deleted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(folder)
    (first,) = stored_folders()
    os.utime(first, (1, 1))
    size = sum(file.stat().st_size for file in first.iterdir())
    monkeypatch.setattr(
        quantized_cache, "load_settings", lambda: Settings(quantized_cache_gib=2.5 * size / GIB)
    )
    load(folder, method="fp4")
    assert len(stored_folders()) == 2
    load(folder)  # now it is the other one that was not used for longest
    load(folder, double_quantization=False)
    names = {path.name for path in stored_folders()}
    assert first.name in names and len(names) == 2 and not any("-fp4-" in name for name in names)


def test_stored_weights_are_in_memory_once(folder: Path) -> None:
    load(folder)
    loaded = load(folder)
    stored = stored_folder(folder)
    assert stored is not None
    mapped = [
        range(*(int(end, 16) for end in line.split()[0].split("-")))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(".safetensors") and str(stored) in line
    ]
    copied = [
        name
        for name, weight in loaded.named_parameters()
        if not any(weight.data_ptr() in addresses for addresses in mapped)
    ]
    assert copied == []


def test_a_base_for_host_memory_is_quantized_on_the_gpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[torch.device] = []

    @contextmanager
    def quantized_on(device: torch.device) -> Iterator[None]:
        devices.append(device)
        yield

    monkeypatch.setattr(model_loading, "quantized_on", quantized_on)
    recipe = recipe_of(folder)
    gpu = replace(find_device(recipe), torch_device=torch.device("cuda", 0))
    model = load_base(folder, recipe, gpu, "segments", to_host=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert devices == [gpu.torch_device]
    assert stored_folders() == [quantized_cache.cache_path(folder, recipe, gpu)]


def test_a_base_is_stored_file_by_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modeling_utils: Any = importlib.import_module("transformers.modeling_utils")
    saved: list[int] = []
    write = modeling_utils.safe_save_file

    def count(tensors: dict[str, torch.Tensor], *args: Any, **settings: Any) -> None:
        saved.append(sum(tensor.nbytes for tensor in tensors.values()))
        write(tensors, *args, **settings)

    monkeypatch.setattr(modeling_utils, "safe_save_file", count)
    assert quantized_cache._SHARD_BYTES <= 10**9
    monkeypatch.setattr(quantized_cache, "_SHARD_BYTES", SHARD_BYTES)
    first = load(folder).state_dict()
    largest = max(tensor.nbytes for tensor in first.values())
    assert len(saved) > 1 and max(saved) <= max(SHARD_BYTES, largest)
    again = load(folder).state_dict()
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize(("share", "folders"), [(0.9, 0), (1.0, 1)])
def test_no_base_is_stored_where_memory_is_short(
    folder: Path, monkeypatch: pytest.MonkeyPatch, share: float, folders: int
) -> None:
    file_bytes = 5 * SHARD_BYTES
    monkeypatch.setattr(quantized_cache, "_SHARD_BYTES", file_bytes)
    monkeypatch.setattr(quantized_cache, "free_host_bytes", lambda: int(share * file_bytes))
    load(folder)
    assert len(stored_folders()) == folders


def test_a_limit_of_nothing_stores_nothing(folder: Path) -> None:
    settings.config_path().write_text("quantized_cache_gib = 0\n")
    load(folder)
    assert stored_folders() == []


def test_a_full_disk_does_not_stop_the_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantized_cache, "publish", full)
    load(folder)
    assert list(quantized_cache.quantized_dir().iterdir()) == [quantized_cache.quantized_dir() / ".lock"]
    assert "No space left on device" in capfd.readouterr().out


def test_weights_that_another_process_stores_are_left_to_it(folder: Path) -> None:
    from qlora_tui.locks import locked

    with locked(quantized_cache.quantized_dir() / ".lock"):
        load(folder)
    assert stored_folders() == []


def test_a_second_run_trains_the_same(recipe: MakeRecipe, trainers: Trainers) -> None:
    runs = [create_run(recipe()) for _ in range(2)]
    phases = []
    for run in runs:
        assert trainers.run(run) == 0
        phases.append([event.detail for event in events_of(run, PhaseChanged) if event.phase == "loading"])
    assert "quantized earlier" in phases[1][-1] and "quantized earlier" not in phases[0][-1]
    assert losses(runs[0]) == losses(runs[1])
