"""Liger's loss is used where it was proved equal to ours, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.memory import Device, trainer_execution
from qlora_tui.recipe.schema import Data, Lora, Quantization, Recipe
from qlora_tui.training import loss as chunked_loss
from qlora_tui.training import loss as head_chunks
from qlora_tui.training.description import architecture_of
from qlora_tui.training.liger import verified_liger_loss
from tests.training.families import build
from tests.training.test_loss import close, labeled, loss_and_gradient

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


class FakeLiger(nn.Module):
    """What ``liger_kernel.transformers`` offers by this name, in plain torch."""

    def __init__(self, reduction: str = "mean", softcap: float | None = None) -> None:
        super().__init__()
        self.reduction, self.softcap, self.calls = reduction, softcap, 0

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        self.calls += 1
        logits = nn.functional.linear(_input, lin_weight, bias).float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return nn.functional.cross_entropy(logits, target, reduction=self.reduction)


class MeanReduction(FakeLiger):
    """Ignores the requested reduction."""

    def __init__(self, reduction: str = "mean", softcap: float | None = None) -> None:
        super().__init__("mean", softcap)


class WrongInputGrad(FakeLiger):
    """One whose gradient is of other states than its loss."""

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return super().forward(
            lin_weight, _input.detach() * 1.0 + (_input - _input.detach()) * 0.5, target, bias
        )


class UnscaledGrad(FakeLiger):
    """One whose gradient is that of the sum, whatever the sum is multiplied by after it."""

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        loss: Tensor = _UnscaledGrad.apply(super().forward(lin_weight, _input, target, bias))  # type: ignore[no-untyped-call]
        return loss


class _UnscaledGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return torch.ones_like(grad_outputs[0])


class Uncapped(FakeLiger):
    """One that knows no softcap."""

    def __init__(self, reduction: str = "mean", softcap: float | None = None) -> None:
        super().__init__(reduction)


class FirstChunk(FakeLiger):
    """One that takes every later row for the first."""

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        rows = torch.arange(len(target)) % (len(target) // 4)
        return super().forward(lin_weight, _input[rows], target[rows], bias)


class TargetOnlyGrad(FakeLiger):
    """One whose gradient knows of the targets only, and nothing of the softmax."""

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        chunked_loss = super().forward(lin_weight, _input.detach(), target, bias)
        own = -(_input.float() * lin_weight[target].float()).sum()
        return chunked_loss + own - own.detach()


class OneChannel(FakeLiger):
    """One whose gradient lacks a channel."""

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        given = torch.cat([_input[:, :5], _input[:, 5:6].detach(), _input[:, 6:]], dim=1)
        return super().forward(lin_weight, given, target, bias)


class SingleTokenForward(FakeLiger):
    """One that takes the last token's gradient for 9 tenths of it."""

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        last = 0.9 * _input[-1:] + 0.1 * _input[-1:].detach()
        return super().forward(lin_weight, torch.cat([_input[:-1], last]), target, bias)


class Unbiased(FakeLiger):
    """One that leaves the head's bias out."""

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return super().forward(lin_weight, _input, target, None)


class WithoutCompiler(FakeLiger):
    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        raise FileNotFoundError(
            "Failed to find C compiler. Please specify via CC environment variable.\nmore"
        )


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    def installed(kind: type[FakeLiger]) -> None:
        package, module = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
        module.LigerFusedLinearCrossEntropyLoss = kind  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "liger_kernel", package)
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)

    return installed


def head_of(model: Any) -> head_chunks.ChunkedHead:
    head = chunked_loss.find_head(model)
    assert isinstance(head, head_chunks.ChunkedHead)
    return head


def of_7b(vocabulary: int) -> Architecture:
    """A model of 4,096 hidden units."""
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 2,
        "vocab_size": vocabulary,
    }
    return architecture_of(
        {"model_type": "llama", "num_attention_heads": 32, "vocab_size": vocabulary, **sizes}
    )


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "granite", "cohere", "gemma2"])
def test_with_its_kernel_the_loss_is_the_stock_loss(model_type: str, install: Any) -> None:
    install(FakeLiger)
    model = build(model_type, tie_word_embeddings=False)
    head = head_of(model)
    kernel = verified_liger_loss(head, CPU)
    assert not isinstance(kernel, str)
    ids, labels = labeled(model)
    inputs = {"input_ids": ids, "labels": labels, "num_items_in_batch": 37}
    stock, stock_gradient = loss_and_gradient(model, **inputs)
    chunked_loss.use_loss(model, head, kernel)
    loss, gradient = loss_and_gradient(model, **inputs)
    assert loss == pytest.approx(stock, rel=2e-5) and close(gradient, stock_gradient)


@pytest.mark.parametrize(
    ("kind", "family", "why"),
    [
        (MeanReduction, "llama", "Liger's loss differs from the model's"),
        (Uncapped, "gemma2", "Liger's loss differs from the model's"),
        (WrongInputGrad, "llama", "Liger's gradient differs from the model's"),
        (UnscaledGrad, "llama", "Liger's gradient differs from the model's"),
        (FirstChunk, "llama", "Liger's loss differs from the model's"),
        (WithoutCompiler, "llama", "Liger fails here (FileNotFoundError: Failed to find C compiler."),
    ],
)
def test_a_wrong_or_failing_kernel_is_rejected_with_the_reason(
    kind: type[FakeLiger], family: str, why: str, install: Any
) -> None:
    install(kind)
    said = verified_liger_loss(head_of(build(family)), CPU)
    assert isinstance(said, str) and said.startswith(why) and "\n" not in said


WRONG = (TargetOnlyGrad, UnscaledGrad, FirstChunk, OneChannel, SingleTokenForward, Unbiased)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(FakeLiger, torch.float32), *product((FakeLiger, *WRONG), [torch.bfloat16])],
)
@pytest.mark.parametrize("tails", [1.0, 50.0])
def test_each_gradient_element_stays_within_the_dtypes_noise(
    kind: type[FakeLiger], tails: float, dtype: torch.dtype, install: Any
) -> None:
    """With the faint head of a trained model, whose softmax of random states would rest on every word."""
    install(kind)
    projection = nn.Linear(256, 4_000, dtype=dtype)
    nn.init.normal_(projection.weight, std=0.02, generator=torch.Generator().manual_seed(1))
    nn.init.normal_(projection.bias, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        projection.weight[:, 7] *= tails
        projection.weight[::500] *= tails**0.5
    said = verified_liger_loss(head_chunks.ChunkedHead(projection.requires_grad_(False), 1.0, None), CPU)
    assert isinstance(said, str) == (kind is not FakeLiger)


def test_weighted_tokens_use_our_own_loss(install: Any) -> None:
    install(FakeLiger)
    model = build("llama")
    head = head_of(model)
    ids, labels = labeled(model)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "labels": labels, "loss_weights": weights, "num_items_in_batch": 5}

    def unwanted(states: Tensor, targets: Tensor) -> Tensor:
        raise AssertionError

    chunked_loss.use_loss(model, head, unwanted)
    value, _ = loss_and_gradient(model, **inputs)
    assert value > 0


def test_liger_is_planned_where_installed_suitable_and_worthwhile() -> None:
    gpu, few, many = Device(liger=True), of_7b(vocabulary=32_000), of_7b(vocabulary=152_000)
    long = Recipe(data=Data(max_length=2048))
    assert trainer_execution(long, gpu, few).loss == "liger"
    assert trainer_execution(long, Device(), few).loss == "chunked"
    # It would read a head of a gigabyte twice for each 64 rows.
    assert trainer_execution(long, gpu, many).loss == "chunked"
    assert trainer_execution(Recipe(), gpu, few).loss == "chunked"
    half = replace(long, quantization=Quantization(compute_dtype="float16"))
    assert trainer_execution(half, gpu, few).loss == "chunked"
    assert trainer_execution(long, Device(liger=True, capability=(7, 5)), few).loss == "chunked"
    assert trainer_execution(replace(long, lora=Lora(trainable_tokens=("<x>",))), gpu, few).loss == "chunked"
    # It has no loss of single tokens.
    pairs = replace(long, data=Data(max_length=2048, preferences="dpo"))
    assert trainer_execution(pairs, gpu, few).loss == "chunked"


@pytest.mark.skipif(find_spec("liger_kernel") is None or find_spec("triton") is None, reason="no Liger here")
@pytest.mark.parametrize("model_type", ["llama", "granite"])
def test_the_real_kernel_is_found_equal_under_tritons_interpreter(model_type: str) -> None:
    code = (
        "import torch\n"
        "from tests.training.families import build\n"
        "from qlora_tui.training.liger import verified_liger_loss\n"
        "from qlora_tui.training.loss import find_head\n"
        f"found = verified_liger_loss(find_head(build({model_type!r})), torch.device('cpu'))\n"
        "assert callable(found), found\n"
    )
    env = {"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
