"""4-bit experts: what transformers and peft compute on dequantized ones, for each family of mixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.engine.trace_worker import StorageCounter
from qlora_tui.recipe.schema import Lora, Model, Quantization, Recipe
from qlora_tui.training import adapter
from qlora_tui.training.compute_device import find_device
from qlora_tui.training.experts import expert_loading
from qlora_tui.training.experts.experts_4bit import PROJECTIONS, experts_4bit, fused_experts
from qlora_tui.training.fused.patching import PatchedForwards
from qlora_tui.training.model_loading import checkpoint_activations, load_base
from tests.training.families import build
from tests.training.trained_weights import CLAIMED

pytestmark = pytest.mark.slow

FAMILIES = (
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
)
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
    torch.manual_seed(0)
    architecture = parse_architecture(model.config.to_dict())
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


def assert_same_step(packed: Any, plain: Any, *targets: str) -> None:
    """Both models with the same adapter, ``plain`` computed by transformers and peft alone."""
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


def test_a_step_is_that_of_dequantized_experts(folder: Path) -> None:
    packed = load(folder)
    assert_same_step(packed, dequantized(folder, packed), "all-linear", *BOTH)


@pytest.mark.parametrize("targets", [("q_proj",), BOTH[:1], ("1.experts.down_proj",)])
@pytest.mark.parametrize("method", ["fp4", "nf4"])
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


def test_the_reference_is_the_familys_own_code(folder: Path) -> None:
    model = adapted(load(folder), *BOTH)
    expected = step(model)
    paths = PatchedForwards(model, "experts")
    assert len(paths) == len(dict(experts_4bit(model)))
    paths.use_reference()
    model.zero_grad()
    actual = step(model)
    assert_close(actual[1], expected[1])
    assert all(
        0 < (actual[2][n] - g).norm() < 1e-4 * g.norm() for n, g in expected[2].items() if "experts" in n
    )


def test_stored_experts_are_read_again(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(qwen).state_dict()
    monkeypatch.setattr(expert_loading, "quantize_into", None)
    second = load(qwen).state_dict()
    assert second.keys() == first.keys()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


class AllocatedStorages(StorageCounter):  # type: ignore[no-untyped-call]  # torch's own
    """Counts what is allocated, and not the float32 parameters of the mapped weight file."""

    mapped_bytes: tuple[int, ...] = (64 * 192 * 64 * 4, 64 * 96 * 64 * 4)

    def _watch(self, tensor: Tensor, size: int) -> None:
        is_counted = tensor.device.type == "cpu" and size not in self.mapped_bytes
        super()._watch(tensor, size if is_counted else 0)


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
