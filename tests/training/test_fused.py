"""LoRA as one function: what peft's forward gives, with less kept for the backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.recipe.schema import Lora, Model, Quantization, Recipe
from qlora_tui.training import adapter
from qlora_tui.training.compute_device import find_device
from qlora_tui.training.dropout import draws_random_numbers
from qlora_tui.training.fused import lora_linear
from qlora_tui.training.model_loading import checkpoint_activations, load_base
from tests.training.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("fused") / "model")


def adapted(folder: Path, *, dtype: Any = "float32", method: Any = "nf4", **lora: Any) -> Any:
    """The tiny model with an adapter that changes it."""
    recipe = Recipe(
        model=Model(id=str(folder)),
        quantization=Quantization(method=method, compute_dtype=dtype),
        lora=Lora(rank=4, alpha=8, **lora),
    )
    torch.manual_seed(0)
    base = load_base(folder, recipe, find_device(recipe), "segments")
    model = adapter.add_lora(base, recipe.lora, resolve_model(str(folder)).architecture)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


@contextmanager
def as_peft_does(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Adapters made here keep peft's forward."""
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "use_fused", lambda model: None)
        yield


def learn(model: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss of some tokens, and the gradient of every trained parameter."""
    ids = torch.arange(60).reshape(2, 30) % (model.config.vocab_size - 3) + 3
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", ["nf4", "fp4", "none", "int8"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_peft(
    folder: Path, method: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with as_peft_does(monkeypatch):
        expected, expected_gradients = learn(adapted(folder, method=method))
    model = adapted(folder, method=method)
    if checkpointing:
        checkpoint_activations(model.base_model.model, preserve_rng_state=False)
    loss, gradients = learn(model)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert gradients.keys() == expected_gradients.keys() and len(gradients) == 28
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.allclose(gradient, expected_gradients[name], rtol=1e-3, atol=1e-6), name


def test_under_autocast_fp32_inputs_are_cast_as_in_peft(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a LayerNorm hands on under autocast, where Trainer computes in fp16."""
    with as_peft_does(monkeypatch):
        stock = adapted(folder)
    with torch.autocast("cpu", torch.bfloat16):
        expected_loss, expected = learn(stock)
        loss, gradients = learn(adapted(folder))
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    for name, gradient in gradients.items():
        assert float((gradient - expected[name]).norm() / expected[name].norm()) < 0.05, name


def test_bf16_is_as_near_to_fp32_as_autocast_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, exact = learn(adapted(folder))
    with as_peft_does(monkeypatch):
        stock = adapted(folder, dtype="bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        _, usual = learn(stock)
    _, ours = learn(adapted(folder, dtype="bfloat16"))

    def distance(gradients: dict[str, Tensor]) -> float:
        return sum(float((gradients[n] - exact[n]).norm() / exact[n].norm()) for n in exact) / len(exact)

    assert 0 < distance(ours) < 1.2 * distance(usual)


@pytest.mark.parametrize(("dropout", "repeated"), [(0.0, False), (0.1, True)])
def test_recomputation_repeats_random_numbers_where_there_is_dropout(
    folder: Path, dropout: float, repeated: bool
) -> None:
    model = adapted(folder, dropout=dropout).get_base_model()
    checkpoint_activations(model)
    (options,) = {
        layer._gradient_checkpointing_func.keywords["preserve_rng_state"] for layer in model.model.layers
    }
    assert options is repeated


def test_a_recomputed_layer_does_not_multiply_by_down_again(folder: Path) -> None:
    model = adapted(folder)
    checkpoint_activations(model.get_base_model())
    calls = {"up_proj": 0, "down_proj": 0}
    for name, module in model.named_modules():
        if (kind := name.split(".")[-2] if "." in name else "") in calls and name.endswith("base_layer"):
            module.register_forward_hook(lambda *_, kind=kind: calls.__setitem__(kind, calls[kind] + 1))
    learn(model)
    layers = model.config.num_hidden_layers
    assert calls == {"up_proj": 2 * layers, "down_proj": layers}


@pytest.mark.parametrize("config", ["attention_dropout", "router_jitter_noise"])
def test_probabilities_in_configs_count_as_random_numbers(folder: Path, config: str) -> None:
    model = adapted(folder)
    assert not draws_random_numbers(model)
    setattr(model.config, config, 0.1)
    assert draws_random_numbers(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropout_drops_its_share_and_gradients_follow_what_was_kept(dtype: str) -> None:
    values = torch.ones(1001, 999, dtype=getattr(torch, dtype))
    torch.manual_seed(0)
    mask = lora_linear._dropout_mask(values, 0.05)
    passed = lora_linear.apply_dropout(values, mask)
    assert mask.element_size() == 1
    assert set(passed.flatten().tolist()) == {0.0, 1.0}
    assert (passed == 0).float().mean().item() == pytest.approx(0.05, abs=1e-3)
    assert (passed == 0).any(0).float().mean() > 0.99 and (passed == 0).any(1).float().mean() > 0.99


def test_with_dropout_the_mean_gradient_is_that_without(folder: Path) -> None:
    """Kept inputs are scaled up by as much as is dropped; a target in one layer, so that it acts linearly."""
    target = ("1.v_proj",)
    _, exact = learn(adapted(folder, target_modules=target))
    model = adapted(folder, target_modules=target, dropout=0.3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = None
    rounds = 100
    for _ in range(rounds):
        _, summed = learn(model)
    (name,) = (name for name in exact if "lora_A" in name)
    assert (
        torch.nn.functional.cosine_similarity(summed[name].flatten() / rounds, exact[name].flatten(), dim=0)
        > 0.98
    )
    assert float(summed[name].norm() / rounds / exact[name].norm()) == pytest.approx(1, abs=0.15)


def test_evaluation_drops_nothing_and_the_base_can_be_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with as_peft_does(monkeypatch):
        stock = adapted(folder, dropout=0.5).eval()
    ours = adapted(folder, dropout=0.5).eval()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, stock(ids).logits, atol=1e-5)
        with ours.disable_adapter(), stock.disable_adapter():
            assert torch.equal(ours(ids).logits, stock(ids).logits)


def test_targets_that_read_one_hidden_state_keep_it_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept_bytes(model: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ids = torch.arange(3, 203)[None]
            output = model(ids)
        assert output.logits.requires_grad
        return sum(sizes.values())

    with as_peft_does(monkeypatch):
        stock = kept_bytes(adapted(folder, dtype="bfloat16"))
    assert kept_bytes(adapted(folder, dtype="bfloat16")) < 0.7 * stock


def test_dora_is_left_to_peft(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with as_peft_does(monkeypatch):
        expected, _ = learn(adapted(folder, use_dora=True))
    assert learn(adapted(folder, use_dora=True))[0] == pytest.approx(expected, rel=1e-6)
