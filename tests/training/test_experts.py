"""4-bit experts and adapters on them: what transformers and peft compute on dequantized ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qlora_tui.adapters.base_weights import assign_deltas
from qlora_tui.adapters.deltas import read_deltas
from qlora_tui.adapters.merged_weights import MergedWeights, requantizer
from qlora_tui.adapters.stored_layout import StoredLayout
from qlora_tui.catalog.config_parser import load_config
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.catalog.model_validation import check_folder
from qlora_tui.chat.adapters import AdapterSet
from qlora_tui.chat.chat_types import BASE
from qlora_tui.chat.logits import library_code
from qlora_tui.engine.recorder import StorageRecorder
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Lora, Model, Quantization, Recipe
from qlora_tui.training import adapter
from qlora_tui.training.adapter import add_lora, save_adapter
from qlora_tui.training.checks.first_step import VerificationResult, verify_step
from qlora_tui.training.compute_device import find_device
from qlora_tui.training.description import architecture_of
from qlora_tui.training.distributed import DistributedContext
from qlora_tui.training.experts import loading, routing
from qlora_tui.training.experts.lora import fuse_experts
from qlora_tui.training.experts.routing import PROJECTIONS, experts_4bit, fused_experts
from qlora_tui.training.experts.storage import dequantize_mxfp4
from qlora_tui.training.fused.patching import PatchedForwards
from qlora_tui.training.model import checkpoint_activations, load_base, prepare_base
from tests.training.families import build
from tests.training.test_verify import excerpt, massive_channel
from tests.training.trained_weights import CLAIMED

pytestmark = pytest.mark.slow

FAMILIES = ("deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "qwen2_moe")
"""Routers, shared experts, biases and layouts of each kind."""
BOTH = ("experts.gate_up_proj", "experts.down_proj")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a tiny mixture of each family, as the family stores them."""
    return save(request.param, tmp_path_factory.mktemp("mixture") / request.param)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("qwen3_moe", tmp_path_factory.mktemp("mixture") / "qwen3_moe")


def save(model_type: str, folder: Path, **settings: Any) -> Path:
    build(model_type, **{**CLAIMED[model_type], **settings}).save_pretrained(folder)
    return folder


def load(folder: Path, **quantization: Any) -> Any:
    settings = {"compute_dtype": "float32", **quantization}
    recipe = Recipe(model=Model(id=str(folder)), quantization=Quantization(**settings))
    return load_base(folder, recipe, find_device(recipe), "eager")


def dequantized(folder: Path, packed: Any, **quantization: Any) -> Any:
    """The model with the family's own experts, whose weights are those of ``packed`` dequantized."""
    model = load(folder, experts=False, **quantization)
    quantized = dict(experts_4bit(packed))
    for name, module in fused_experts(model):
        for projection in PROJECTIONS:
            parameter = module.get_parameter(projection)
            for expert in range(len(parameter)):
                parameter.data[expert] = quantized[name].matrix(projection, expert, parameter.dtype)
    assert quantized.keys() == dict(fused_experts(model)).keys() != set()
    return model


def adapted(model: Any, *targets: str) -> Any:
    """The model with an adapter that changes it, computed by peft where the experts are 16-bit."""
    architecture = architecture_of(model.config.to_dict())
    torch.manual_seed(0)
    lora = Lora(rank=4, alpha=8, target_modules=targets)
    model = adapter.add_lora(model, lora, architecture)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def step(model: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, the gradient of the embedded tokens, and those of the trained parameters."""
    ids = torch.arange(48).reshape(2, 24) * 7 % 290 + 3
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    out = model(inputs_embeds=embedded, use_cache=False).logits
    (out.float() * torch.linspace(-1, 1, out.shape[-1])).square().mean().backward()
    assert embedded.grad is not None
    return out.detach(), embedded.grad, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert expected.norm() > 0, what
    assert float((actual - expected).norm() / expected.norm()) < 1e-4, what


def assert_same_step(packed: Any, plain: Any, *targets: str) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """Compare both models with the same adapter, ``plain`` computed by transformers and peft alone.

    Return the packed one with the gradients of its embedded tokens and trained parameters.
    """
    packed, plain = adapted(packed, *targets), adapted(plain, *targets)
    for module in plain.modules():
        vars(module).pop("forward", None)
    logits, grad, grads = step(packed)
    expected, expected_grad, expected_grads = step(plain)
    assert_close(logits, expected)
    assert_close(grad, expected_grad)
    assert grads.keys() == expected_grads.keys() != set()
    for name, gradient in grads.items():
        assert gradient.dtype == torch.float32
        assert_close(gradient, expected_grads[name], name)
    return packed, grad, grads


def test_a_step_is_that_of_dequantized_experts_and_of_the_familys_own_code(folder: Path) -> None:
    packed = load(folder)
    model, grad, grads = assert_same_step(packed, dequantized(folder, packed), "all-linear", *BOTH)
    paths = PatchedForwards(model, "experts")
    assert len(paths) == len(dict(experts_4bit(model)))
    paths.use_reference()
    model.zero_grad()
    _, by_library, of_library = step(model)
    assert_close(by_library, grad)
    assert all(0 < (of_library[n] - g).norm() < 1e-4 * g.norm() for n, g in grads.items() if ".experts." in n)


@pytest.mark.parametrize(
    ("targets", "method"),
    [(("q_proj",), "nf4"), (BOTH[:1], "fp4"), (("1.experts.down_proj",), "nf4")],
)
def test_any_part_of_the_experts_can_be_adapted(qwen: Path, targets: tuple[str, ...], method: str) -> None:
    settings = {"method": method, "double_quantization": method == "nf4"}
    packed = load(qwen, **settings)
    assert_same_step(packed, dequantized(qwen, packed, **settings), *targets)


def test_experts_in_16_bits_are_adapted_too(qwen: Path) -> None:
    assert_same_step(*(load(qwen, experts=False) for _ in range(2)), *BOTH)


def test_a_recomputed_step_is_the_same(qwen: Path) -> None:
    whole, recomputed = (adapted(load(qwen), *BOTH) for _ in range(2))
    checkpoint_activations(recomputed.base_model.model, preserve_rng_state=False)
    expected, actual = step(whole), step(recomputed)
    assert torch.equal(actual[1], expected[1])
    assert all(torch.equal(actual[2][name], gradient) for name, gradient in expected[2].items())


def test_stored_experts_are_read_again(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(qwen).state_dict()
    monkeypatch.setattr(loading, "quantize_into", None)
    second = load(qwen).state_dict()
    assert second.keys() == first.keys()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


class AllocatedStorages(StorageRecorder):  # type: ignore[no-untyped-call]  # torch's own
    """Counts what is allocated, and not the float32 parameters of the mapped weight file."""

    mapped_bytes: tuple[int, ...] = (64 * 192 * 64 * 4, 64 * 96 * 64 * 4)

    def __init__(self) -> None:
        super().__init__(device="cpu")

    def _watch(self, tensor: Tensor, size: int, item: str) -> None:
        super()._watch(tensor, 0 if size in self.mapped_bytes else size, item)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_loading_holds_one_matrix_in_16_bits(model_type: str, tmp_path: Path) -> None:
    experts = {"num_experts": 64, "num_local_experts": 64, "moe_intermediate_size": 96}
    folder = save(model_type, tmp_path, **experts, num_hidden_layers=1)
    with AllocatedStorages() as storages:
        model = load(folder, compute_dtype="bfloat16")
    (packed,) = dict(experts_4bit(model)).values()
    matrix_bytes = 2 * packed.layout("gate_up_proj").numel
    # Half a matrix is read beside the one that it is copied into, and quantized to a quarter.
    assert storages.peak_bytes - storages.live_bytes < 2 * matrix_bytes


_CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
_SMALL_SCALES = (118, 124)
"""Exponents with a bias of 127: weights of up to 0.75, as a trained model has."""


def mxfp4_tensors(experts: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Random blocks (experts, outputs, inputs / 32, 16) and scales (experts, outputs, inputs / 32), uint8."""
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
    scales = torch.randint(*_SMALL_SCALES, (experts, outputs, inputs // 32), dtype=torch.uint8)
    return blocks, scales


def save_both(folder: Path, **settings: int) -> tuple[Path, Path]:
    """Write the model with MXFP4 experts, and with what transformers makes of them in bfloat16."""
    packed, plain = folder / "mxfp4", folder / "bfloat16"
    build("gpt_oss", intermediate_size=64, **settings).bfloat16().save_pretrained(plain)
    tensors = load_file(plain / "model.safetensors")
    stored = dict(tensors)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors[name].shape
        blocks, scales = mxfp4_tensors(experts, outputs, inputs)
        tensors[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
        del stored[name]
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    packed.mkdir()
    config = json.loads((plain / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": _CONFIG}))
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    save_file(stored, packed / "model.safetensors", {"format": "pt"})
    return packed, plain


IDS = torch.arange(3, 60)[None]


@dataclass
class Trained:
    """A base, and an adapter that was trained on it in 4 bits."""

    base: Path
    adapter: Path
    logits: Tensor
    base_logits: Tensor


@pytest.fixture(scope="module", params=["qwen3_moe", "granitemoe", "gpt_oss"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param, **CLAIMED[request.param]).save_pretrained(folder / "base")
    packed = load(folder / "base")
    base_logits = logits_of(packed)
    model = adapted(packed, "q_proj", *BOTH)
    save_adapter(model, folder / "adapter")
    return Trained(folder / "base", folder / "adapter", logits_of(model.eval()), base_logits)


@torch.inference_mode()
def logits_of(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=IDS, use_cache=False).logits.float()
    return logits


def test_plain_peft_gives_the_same_logits(trained: Trained) -> None:
    from peft import PeftModel

    plain = dequantized(trained.base, load(trained.base))
    model: Any = PeftModel.from_pretrained(plain, str(trained.adapter))
    assert_close(trained.logits, logits_of(model))


def test_the_chat_switches_between_base_and_adapter(trained: Trained) -> None:
    model = load(trained.base)
    fuse_experts(model)
    adapters = AdapterSet(model, {"one": str(trained.adapter)})
    adapters.ensure_loaded("one")
    for name, expected in (("one", trained.logits), (BASE, trained.base_logits)):
        adapters.activate(name)
        assert_close(logits_of(model), expected)
        with library_code(model), adapters.through_peft("one"):
            assert_close(logits_of(model), trained.logits)


def test_merged_weights_are_those_of_the_training(trained: Trained) -> None:
    """Each tensor is rounded as in training, then changed by its part of the adapter."""
    from safetensors.torch import save_file

    file = trained.base / "model.safetensors"
    layout = StoredLayout(trained.base)
    updates = assign_deltas(read_deltas(trained.adapter), [file], trained.adapter, layout)
    rounding = requantizer(architecture_of(load_config(trained.base / "config.json")), Quantization())
    assert rounding is not None
    merged = {tensor.name: tensor.read() for tensor in MergedWeights(trained.base, updates, rounding)}
    before = file.read_bytes()
    try:
        save_file(merged, file, {"format": "pt"})
        assert_close(logits_of(load(trained.base, method="none")), trained.logits)
    finally:
        file.write_bytes(before)


def verify(
    folder: Path, model_type: str, dtype: Any, targets: tuple[str, ...], *, packed: bool | None = None
) -> VerificationResult:
    massive_channel(model_type, getattr(torch, dtype), **CLAIMED[model_type]).save_pretrained(folder)
    recipe = Recipe(
        model=Model(id=str(folder)),
        quantization=Quantization(compute_dtype=dtype),
        lora=Lora(rank=4, alpha=8, target_modules=targets),
    )
    device = find_device(recipe)
    base = prepare_base(folder, recipe, device, "segments", "chunked", weighted=False)
    assert packed is None or base.padding_free == packed
    torch.manual_seed(0)
    model = add_lora(base.model, recipe.lora, resolve_model(str(folder)).architecture)
    checkpoint_activations(base.model, preserve_rng_state=False)
    verified = verify_step(model, base, excerpt(), device, 0, DistributedContext())
    assert isinstance(verified, VerificationResult), verified
    return verified


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        ("deepseek_v2", "float32"),
        ("gpt_oss", "bfloat16"),
        ("qwen3_moe", "float32"),
        ("qwen3_moe", "bfloat16"),
    ],
)
def test_right_experts_pass(model_type: str, dtype: str, tmp_path: Path) -> None:
    verified = verify(tmp_path, model_type, dtype, ("all-linear", *BOTH), packed=True)
    assert verified.agrees and verified.replaced == (), verified.comparison


def without_adapter(patch: pytest.MonkeyPatch) -> None:
    """The adapter's part of the input's gradient is left out."""
    right = routing.Projection.input_gradient

    def gradient(self: Any, grad: Tensor, expert: int, memory: Tensor | None) -> Tensor:
        bare = routing.Projection(self.read, self.transposed, self.inputs, self.outputs, self.bias)
        return right(bare, grad, expert, memory)

    patch.setattr(routing.Projection, "input_gradient", gradient)


def other_slots(patch: pytest.MonkeyPatch) -> None:
    """Weights are those of other slots."""
    right = routing.sort_by_expert

    def sort(chosen: Tensor, experts: int) -> routing.Routes:
        routes = right(chosen, experts)
        return routing.Routes(routes.order.flip(0), routes.tokens, routes.counts)

    patch.setattr(routing, "sort_by_expert", sort)


@pytest.mark.parametrize("mutate", [without_adapter, other_slots])
def test_wrong_experts_are_replaced(
    mutate: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    verified = verify(tmp_path, "qwen3_moe", "float32", ("q_proj", *BOTH))
    assert verified.agrees and verified.replaced == ("experts",)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_both(tmp_path_factory.mktemp("gpt_oss"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_byte_is_decoded_as_transformers_decodes_it(dtype: torch.dtype) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 4, 4, 16)
    scales = torch.arange(108, 124, dtype=torch.uint8).reshape(1, 4, 4)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)[0].T
    assert torch.equal(dequantize_mxfp4(blocks[0], scales[0], dtype), expected)
    # Values of bfloat16 up to 256 are exact: transformers may have cast the bytes.
    cast = (blocks[0].bfloat16(), scales[0].bfloat16())
    assert torch.equal(dequantize_mxfp4(*cast, dtype), expected)


@pytest.mark.parametrize("method", ["nf4", "fp4"])
def test_experts_are_quantized_as_those_of_16_bit_files(folders: tuple[Path, Path], method: str) -> None:
    packed, plain = (load(folder, method=method, compute_dtype="bfloat16") for folder in folders)
    expected = dict(experts_4bit(plain))
    for name, experts in experts_4bit(packed):
        for projection in PROJECTIONS:
            tensors, others = experts.tensors(projection), expected[name].tensors(projection)
            assert all(torch.equal(tensors[suffix], others[suffix]) for suffix in others)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, plain(ids).logits)


class AllocatedBesideFile(AllocatedStorages):  # type: ignore[no-untyped-call]  # torch's own
    """Counts what is allocated, and not blocks and scales of the mapped weight file."""

    mapped_bytes = (64 * 128 * 32, 64 * 64 * 32, 64 * 128 * 2, 64 * 64 * 2)


def test_loading_holds_one_expert_in_16_bits(tmp_path: Path) -> None:
    folder, _ = save_both(tmp_path, num_local_experts=64, num_hidden_layers=1)
    with AllocatedBesideFile() as storages:
        model = load(folder, compute_dtype="bfloat16")
    (packed,) = dict(experts_4bit(model)).values()
    matrix_bytes = 2 * packed.layout("gate_up_proj").numel
    # Decoding has indices of four bytes a weight beside it.
    assert storages.peak_bytes - storages.live_bytes < 6 * matrix_bytes


def test_the_model_can_be_trained_but_not_in_16_bits(folders: tuple[Path, Path]) -> None:
    packed, _ = folders
    architecture, refusal = check_folder(packed, "gpt-oss")
    assert refusal is None and architecture is not None and architecture.quantized_as == "mxfp4"
    for settings, setting in (({"method": "none"}, "method"), ({"experts": False}, "experts")):
        with pytest.raises(UserError, match=f"quantization.{setting} is"):
            load(packed, **settings)
