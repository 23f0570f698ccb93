"""Layers that pass through two buffers give the losses and gradients of a model that is on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_tui.catalog.config_parser import load_config
from qlora_tui.errors import UserError
from qlora_tui.memory.execution import Device, trainer_execution
from qlora_tui.memory.layout import build_layout
from qlora_tui.memory.static_memory import FROZEN, static_items
from qlora_tui.memory.weights import streamed_weights
from qlora_tui.recipe.schema import Model, Quantization, Recipe
from qlora_tui.training.compute_device import find_device
from qlora_tui.training.description import architecture_of
from qlora_tui.training.experts.routing import experts_4bit
from qlora_tui.training.model import checkpoint_activations, load_base
from qlora_tui.training.streaming import host_memory, placement
from qlora_tui.training.streaming.host_memory import HostMemory
from qlora_tui.training.streaming.placement import StreamedLayerError, StreamedLayers, place_streamed
from qlora_tui.training.streaming.slots import Extent, LayerSlots, Pass, all_tensors, extent_of, lay_out
from tests.training.families import build, with_adapter
from tests.training.recorded_copies import RecordedCopies
from tests.training.tiny_model import make_tiny_model
from tests.training.trained_weights import CLAIMED

pytestmark = pytest.mark.slow

LAYERS = 5
STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(
        tmp_path_factory.mktemp("models") / "deep", num_hidden_layers=LAYERS, attention_bias=True
    )


def recipe_of(folder: Path, streamed: int, **quantization: Any) -> Recipe:
    settings = {"compute_dtype": "float32", "streamed_layers": streamed, **quantization}
    return Recipe(model=Model(id=str(folder)), quantization=Quantization(**settings))


def load(folder: Path, **quantization: Any) -> Any:
    recipe = recipe_of(folder, 0, **quantization)
    return load_base(folder, recipe, find_device(recipe), "segments", to_host=True)


def adapted(model: Any, streamed: StreamedLayers | None = None) -> Any:
    """The model with an adapter, checkpointed and in training mode."""
    peft_model = with_adapter(model)
    checkpoint_activations(model)
    if streamed is not None:
        streamed.use_checkpoints()
    return peft_model.train()


def streamed_model(folder: Path, count: int = LAYERS, **quantization: Any) -> tuple[Any, RecordedCopies]:
    """A model with ``count`` streamed layers on a device that shows wrong copies."""
    model, copies = load(folder, **quantization), RecordedCopies()
    streamed = place_streamed(model, count, torch.device("cpu"), copies)
    return adapted(model, streamed), copies


def train(model: Any) -> list[Tensor]:
    """Losses, gradients, an evaluation and an answer of some steps."""
    generator = torch.Generator().manual_seed(2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    results = []
    for _ in range(STEPS):
        for _ in range(2):  # micro-batches
            tokens = torch.randint(300, (2, 12), generator=generator)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            results.append(loss.detach())
        results += [parameter.grad.clone() for parameter in trained]
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            results.append(model(input_ids=tokens).logits)
            results.append(model.generate(input_ids=tokens, max_new_tokens=3, do_sample=False))
        model.train()
    return results


@pytest.mark.parametrize(
    ("counts", "quantization"),
    [
        ((LAYERS, 2, 1), {}),
        ((LAYERS - 1,), {"method": "fp4", "double_quantization": False}),
        ((LAYERS,), {"method": "int8"}),
        ((LAYERS,), {"method": "none"}),
    ],
)
def test_streamed_layers_give_the_same_bits(folder: Path, counts: tuple[int, ...], quantization: Any) -> None:
    expected = train(adapted(load(folder, **quantization)))
    for count in counts:
        model, copies = streamed_model(folder, count, **quantization)
        results = train(model)
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True)), count
        assert copies.copied == count if count <= 2 else copies.copied > count * STEPS


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "falcon", "gpt2"])
def test_every_family_gives_the_same_bits(family: str) -> None:
    expected = train(adapted(build(family, num_hidden_layers=4)))
    model, copies = build(family, num_hidden_layers=4), RecordedCopies()
    streamed = place_streamed(model, 4, torch.device("cpu"), copies)
    results = train(adapted(model, streamed))
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


@pytest.mark.parametrize("model_type", ["deepseek_v2", "gpt_oss"])
def test_four_bit_experts_pass_through_the_buffers_too(tmp_path: Path, model_type: str) -> None:
    folder = tmp_path / model_type
    settings = {**CLAIMED[model_type], "num_hidden_layers": 4}
    if "layer_types" in settings:
        settings["layer_types"] = 2 * settings["layer_types"]
    build(model_type, **settings).save_pretrained(folder)
    expected = train(adapted(load(folder)))
    model, copies = load(folder), RecordedCopies()
    streamed = place_streamed(model, 4, torch.device("cpu"), copies)
    experts = [module for _, module in experts_4bit(model)]
    assert len(experts) >= 3  # DeepSeek's first layer has none
    packed = [extent_of(module.get_parameter("down_proj")) for module in experts]
    assert all(any(holds(slot, extent) for slot in copies.buffers) for extent in packed)
    results = train(adapted(model, streamed))
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


class Order:
    """Layers of 8 bytes in two slots, and the log of what was copied and computed."""

    def __init__(self, layers: int) -> None:
        self._copies = RecordedCopies()
        self._slots = LayerSlots([256] * layers, self._copies)
        self._tensors = [torch.full((8,), number, dtype=torch.uint8) for number in range(layers)]
        for number, tensor in enumerate(self._tensors):
            layer, buffer = lay_out([tensor]), torch.empty(256, dtype=torch.uint8)
            layer.write_to(buffer)
            self._slots.add(number, layer, buffer)

    def compute(self, purpose: Pass, *layers: int) -> str:
        """The log of these layers, each of which reads its own weights."""
        self._copies.log.clear()
        for number in layers:
            self._slots.enter(number, purpose)
            assert self._tensors[number].tolist() == [number] * 8
            self._copies.log.append(f"[{number}]")
        return " ".join(self._copies.log)


def test_each_copy_starts_before_the_layer_ahead_computes() -> None:
    order = Order(4)
    first = order.compute("forward", 0, 1, 2, 3)
    assert first == "copy 1 wait 1 copy 2 [0] wait 2 copy 3 [1] wait 3 copy 4 [2] wait 4 [3]"
    assert order.compute("backward", 3, 2, 1, 0) == "[3] copy 5 [2] wait 5 copy 6 [1] wait 6 [0]"
    assert order.compute("forward", 0, 1, 2, 3) == "[0] copy 7 [1] wait 7 copy 8 [2] wait 8 [3]"


def test_an_evaluation_copies_the_first_layer_ahead() -> None:
    order = Order(4)
    order.compute("no gradient", 0, 1, 2, 3)
    again = order.compute("no gradient", 0, 1, 2, 3)
    assert again == "wait 5 copy 6 [0] wait 6 copy 7 [1] wait 7 copy 8 [2] wait 8 copy 9 [3]"
    assert order.compute("forward", 0, 1) == "wait 9 copy 10 [0] wait 10 copy 11 [1]"


def test_layers_in_any_order_have_their_weights() -> None:
    order = Order(5)
    generator = torch.Generator().manual_seed(0)
    passes: tuple[Pass, ...] = ("forward", "backward", "no gradient")
    for number in torch.randint(15, (200,), generator=generator).tolist():
        order.compute(passes[number % 3], number // 3)


def test_a_single_streamed_layer_is_copied_once() -> None:
    order = Order(1)
    assert order.compute("forward", 0) == "copy 1 wait 1 [0]"
    assert order.compute("backward", 0) == order.compute("no gradient", 0) == "[0]"


@pytest.mark.parametrize("quantization", [{}, {"double_quantization": False}, {"method": "none"}])
def test_memory_of_the_device_is_as_estimated(tmp_path: Path, quantization: Any) -> None:
    folder = make_tiny_model(
        tmp_path / "wide", num_hidden_layers=4, hidden_size=256, intermediate_size=512, num_attention_heads=8
    )
    model, copies = load(folder, **quantization), RecordedCopies()
    streamed = place_streamed(model, 3, torch.device("cpu"), copies)
    slots = copies.allocated_bytes
    recipe = recipe_of(folder, 3, **quantization)
    architecture = architecture_of(load_config(folder / "config.json"))
    execution = trainer_execution(recipe, Device(), architecture)
    weights = streamed_weights(recipe, architecture, execution)
    assert weights is not None
    assert streamed.slot_bytes == slots == pytest.approx(weights.slot_bytes, rel=0.02)
    assert streamed.host_bytes == pytest.approx(weights.host_bytes, rel=0.02)
    # Memory outside the slots is on the device, and each storage counts once.
    extents = {extent_of(tensor) for tensor in all_tensors(model) if tensor.numel()}
    on_device = [extent for extent in extents if not any(holds(slot, extent) for slot in copies.buffers)]
    items = static_items(build_layout(recipe, architecture, execution))
    frozen = sum(items.get(key, 0) for key in FROZEN)
    assert sum(extent.size_bytes for extent in on_device) + slots == pytest.approx(frozen, rel=0.02)


def holds(buffer: Tensor, extent: Extent) -> bool:
    return 0 <= extent.address - buffer.data_ptr() < buffer.numel()


class Pinned(HostMemory):
    """Host memory that is pinned until it is unpinned."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.is_unpinned = False

    @property
    def is_pinned(self) -> bool:
        return not self.is_unpinned

    def unpin(self, why: str) -> None:
        super().unpin(why)
        self.is_unpinned = True


@pytest.mark.parametrize(("first_lost", "last_lost"), [(0, 0), (3, 3), (2, 2), (1, 10)])
def test_layers_that_do_not_arrive_are_copied_from_other_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, first_lost: int, last_lost: int
) -> None:
    memories: list[Pinned] = []

    def pinned(device: torch.device) -> Pinned:
        memories.append(Pinned(device))
        return memories[0]

    class Lossy(RecordedCopies):
        def wait_for(self, copied: Any) -> None:
            if not first_lost <= copied.number <= last_lost:
                super().wait_for(copied)

    monkeypatch.setattr(placement, "HostMemory", pinned)
    if last_lost == 10:
        with pytest.raises(UserError, match="do not arrive"):
            place_streamed(load(folder), 2, torch.device("cpu"), Lossy())
        return
    streamed = place_streamed(load(folder), 2, torch.device("cpu"), Lossy())
    assert memories[0].is_unpinned is bool(last_lost) is bool(streamed.not_pinned)


def test_a_streamed_layer_is_not_trained_without_recomputation(folder: Path) -> None:
    model = load(folder)
    place_streamed(model, 2, torch.device("cpu"), RecordedCopies())
    peft_model = with_adapter(model).train()
    tokens = torch.arange(8)[None]
    with pytest.raises(StreamedLayerError):
        peft_model(input_ids=tokens)
    checkpoint_activations(model)
    with pytest.raises(StreamedLayerError):
        peft_model(input_ids=tokens)


def test_memory_shared_by_layers_stays_on_the_device(folder: Path) -> None:
    model = load(folder, method="none")
    first, second = model.get_decoder().layers[:2]
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    copies = RecordedCopies()
    place_streamed(model, LAYERS, torch.device("cpu"), copies)
    shared = extent_of(first.mlp.up_proj.weight)
    assert shared == extent_of(second.mlp.up_proj.weight)
    assert not any(holds(slot, shared) for slot in copies.buffers)


def test_too_little_host_memory_is_an_error_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "host_memory_bytes", lambda: 4 << 30)
    host_memory.require_host_memory(3 << 30)
    with pytest.raises(UserError, match=r"3\.5 GiB of host memory, but only 4\.0 GiB are free"):
        host_memory.require_host_memory(7 << 29)
