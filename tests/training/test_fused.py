"""Fused layers give what the library's give, with less kept for the backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.recipe.schema import Lora, Model, Quantization, Recipe
from qlora_tui.training import adapter, packed_attention
from qlora_tui.training.compute_device import find_device
from qlora_tui.training.fused import cpu_attention as lean_attention
from qlora_tui.training.fused import lora as lora_linear
from qlora_tui.training.fused import norm_rotary
from qlora_tui.training.fused.lora import SharedInput
from qlora_tui.training.model import checkpoint_activations, draws_random_numbers, load_base
from tests.training.families import build, with_adapter
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


LENGTHS = [5, 1, 23, 12]
SCALING = 0.3


def qkv(heads: int, shared: int, *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values as modules give them: a token after the other, then turned."""
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, shared, shared)
    return [
        torch.randn(1, sum(LENGTHS), count, 16, generator=generator).to(dtype).requires_grad_()
        for count in sizes
    ]


def attended(given: list[Tensor], *, ours: bool, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The output, and the gradients of queries, keys and values."""
    with monkeypatch.context() as patch:
        patch.setattr(packed_attention, "prefers_row_attention", lambda query: ours)
        mask = packed_attention.segment_mask(LENGTHS)
        q, k, v = (x.detach().requires_grad_() for x in given)
        queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
        out, _ = packed_attention.segment_attention(nn.Module(), queries, keys, values, mask, scaling=SCALING)
        torch.autograd.backward(out, torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


@pytest.mark.parametrize("multiple", [1, 32])
@pytest.mark.parametrize("block", [512, 7])
@pytest.mark.parametrize(("heads", "shared", "grouped"), [(6, 2, True), (6, 2, False), (4, 4, True)])
def test_attention_and_its_gradients_equal_the_stock_kernels(
    heads: int, shared: int, grouped: bool, block: int, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lean_attention, "token_multiple", lambda device, dtype: multiple)
    monkeypatch.setattr(lean_attention, "_kernel_supports_gqa", lambda: grouped)
    monkeypatch.setattr(lean_attention, "ATTENTION_BLOCK_ROWS", block)
    given = qkv(heads, shared)
    expected = attended(given, ours=False, monkeypatch=monkeypatch)
    computed = attended(given, ours=True, monkeypatch=monkeypatch)
    assert len(computed) == 4
    for one, other in zip(computed, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_bf16_gradients_are_nearly_as_accurate_as_the_stock_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = qkv(6, 2, dtype=torch.bfloat16)
    exact = attended([x.float() for x in given], ours=False, monkeypatch=monkeypatch)
    errors = [
        max(
            float((one.float() - other).norm() / other.norm())
            for one, other in zip(attended(given, ours=ours, monkeypatch=monkeypatch), exact, strict=True)
        )
        for ours in (True, False)
    ]
    assert errors[0] < 2 * errors[1] < 0.02


def test_scores_far_above_their_sum_are_masked_and_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the diagonal the exponential overflows."""
    given = [x.detach() * 40 for x in qkv(4, 2)]
    for tensor in attended(given, ours=True, monkeypatch=monkeypatch):
        assert torch.isfinite(tensor).all()


def rounding_of_scores(given: list[Tensor]) -> tuple[float, float]:
    """The norm that rounding the gradient of each score in fp32 leaves in those of queries and keys."""
    q, k, v = (x.detach().double().transpose(1, 2)[0] for x in given)
    group = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    sample = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    allowed = (sample[:, None] == sample).tril()
    weights = (SCALING * q @ k.mT).masked_fill(~allowed, -torch.inf).softmax(-1)
    grad = torch.linspace(-1, 1, q.numel()).view(-1, q.shape[0], q.shape[-1]).transpose(0, 1).double()
    eps = torch.finfo(torch.float32).eps
    scores = eps * SCALING * weights * (grad.abs() @ v.abs().mT)
    of_keys = (scores.mT @ q.abs()).view(-1, group, *k.shape[1:]).sum(1)
    return float((scores @ k.abs()).norm()), float(of_keys.norm())


@pytest.mark.parametrize("size", [1, 100, 1_000, 10_000])
def test_large_bf16_scores_have_gradients_as_accurate_as_stock(
    size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained models have scores in the hundreds, where nearly all of the softmax is one token's.

    Then a score's gradient is the difference of two equal numbers, of which rounding in fp32 leaves what the
    order of a CPU's additions leaves.
    """
    q, k, v = qkv(6, 2, dtype=torch.bfloat16)
    given = [(q.detach() * size).to(torch.bfloat16), k, v]
    exact = attended([x.double() for x in given], ours=False, monkeypatch=monkeypatch)
    ours, stock = (attended(given, ours=ours, monkeypatch=monkeypatch) for ours in (True, False))
    rounding = [0.0, *rounding_of_scores(given), 0.0]
    for name, one, other, expected, least in zip("oqkv", ours, stock, exact, rounding, strict=True):
        limit = 1.5 * (other - expected).norm() + 3e-3 * expected.norm() + least
        assert (one - expected).norm() <= limit, name


def test_in_bf16_what_all_keys_share_costs_no_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a bias gives it to them (Qwen2)."""
    q, k, v = qkv(6, 2, dtype=torch.bfloat16)
    bias = torch.randn(16, generator=torch.Generator().manual_seed(1)) * 8
    given = [q, (k.detach() + bias).to(torch.bfloat16), v]
    exact = attended([x.float() for x in given], ours=False, monkeypatch=monkeypatch)
    computed = attended(given, ours=True, monkeypatch=monkeypatch)
    errors = [
        float((one.float() - other).norm() / other.norm()) for one, other in zip(computed, exact, strict=True)
    ]
    assert max(errors) < 0.015


def test_float16_overflow_has_the_stock_kernels_gradients() -> None:
    """A query's log-sum over the scale is 80,000 here; float16 ends at 65,504."""
    given = [x.detach().half().transpose(1, 2) for x in qkv(4, 2)]
    given[0] = torch.full_like(given[0], 70.0)
    given[1] = (given[1] / 8 + 70.0).half()
    gradients = []
    for dtype in (torch.float16, torch.float32):
        q, k, v = (x.detach().to(dtype, copy=True).requires_grad_() for x in given)
        mask = packed_attention.segment_mask(LENGTHS)
        out, _ = packed_attention.segment_attention(nn.Module(), q, k, v, mask, scaling=0.1)
        torch.autograd.backward(out, torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape))
        gradients.append([x.grad.float() for x in (q, k, v) if x.grad is not None])
    assert len(gradients[0]) == 3
    # Toward the queries all keys are nearly the same: what is left is rounding.
    assert torch.isfinite(gradients[0][0]).all()
    for one, other in zip(*(of_one[1:] for of_one in gradients), strict=True):
        assert (one - other).norm() < 0.01 * other.norm()


def test_a_norm_that_does_more_stays_as_it_is() -> None:
    class ShiftedRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8), requires_grad=False)
            self.eps = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return functional.rms_norm(x, (8,), self.weight, self.eps) + 0.5

    model = nn.Sequential(ShiftedRMSNorm())
    norm_rotary.fuse_rms_norm(model)
    assert "forward" not in vars(model[0])


IDS = torch.arange(3, 43)[None]


def groups_of(model: Any) -> list[SharedInput]:
    hooks = model.get_base_model().get_decoder()._forward_pre_hooks.values()
    return [owner for hook in hooks if isinstance(owner := hook.__self__, SharedInput)]


def names_of(model: Any) -> list[list[str]]:
    """The modules of each group, by the last part of their names."""
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    return [[names[member.module] for member in group.members] for group in groups_of(model)]


def step(model: Any, *, together: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and the gradient of each trained parameter."""
    model.zero_grad()
    for group in groups_of(model):
        group._is_shared = together
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.float().square().mean().backward()
    assert all(group._is_shared == together for group in groups_of(model))
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def distance(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of a gradient."""
    assert actual.keys() == expected.keys()
    return max(
        float((gradient.double() - expected[name].double()).norm() / expected[name].double().norm())
        for name, gradient in actual.items()
    )


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all modules": ("llama", {}),
    "biases": ("qwen2", {}),
    "norms of heads": ("qwen3", {}),
    "parallel halves": ("cohere", {}),
    "queries and values alone": ("llama", {"target_modules": ("q_proj", "v_proj")}),
    "up alone": ("llama", {"target_modules": ("up_proj", "o_proj")}),
    "rank-stabilised": ("llama", {"use_rslora": True}),
    "other ranks": ("llama", {"rank_pattern": {"k_proj": 2, "up_proj": 7}}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_peft(case: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    family, lora = CASES[case]
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "use_fused", lambda model: None)
        expected_logits, expected = step(with_adapter(build(family), **lora).train())
    model = with_adapter(build(family), **lora).train()
    if checkpointing:
        checkpoint_activations(model.get_base_model())
    logits, gradients = step(model)
    assert torch.allclose(logits, expected_logits, atol=1e-4)
    assert distance(gradients, expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_gradients_are_as_exact_as_alone(dtype: torch.dtype) -> None:
    """The adapters are float32, as on Turing and Pascal, which compute in float16."""
    _, exact = step(with_adapter(build("llama").to(dtype).float()).train())
    model = with_adapter(build("llama").to(dtype)).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    _, together = step(model)
    _, alone = step(model, together=False)
    assert {gradient.dtype for gradient in together.values()} == {torch.float32}
    assert 0 < distance(together, exact) < 1.2 * distance(alone, exact)


@pytest.mark.parametrize("entered", [torch.float16, torch.float32])
def test_float16_autocast_is_as_exact_as_alone(entered: torch.dtype) -> None:
    """Trainer's float16 mode, where a norm may hand on float32."""
    model = with_adapter(build("llama").half()).train()
    (group, *_) = groups_of(model)
    modules = [member.module for member in group.members]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, modules[0].in_features, generator=generator).to(entered)

    def outputs_and_gradients(together: bool) -> list[Tensor]:
        group._is_shared = together
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.float16):
            outputs = [module(leaf) for module in modules]
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        weights = [w for module in modules for w in (module.lora_A.default, module.lora_B.default)]
        gradients = [leaf.grad, *(weight.weight.grad for weight in weights)]
        model.zero_grad()
        return [*(output.detach() for output in outputs), *gradients]

    for one, other in zip(outputs_and_gradients(True), outputs_and_gradients(False), strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one.float(), other.float(), rtol=2e-2, atol=2e-3 * float(other.abs().max()))


def test_modules_of_one_input_are_grouped() -> None:
    attention, mlp = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
    assert names_of(with_adapter(build("llama"))) == [attention, mlp] * 2
    some = with_adapter(build("llama"), target_modules=("q_proj", "v_proj", "up_proj", "down_proj"))
    assert names_of(some) == [["q_proj", "v_proj"]] * 2


@pytest.mark.parametrize("lora", [{"dropout": 0.1}, {"use_dora": True}])
def test_dropout_and_dora_are_computed_one_by_one(lora: dict[str, Any]) -> None:
    assert not groups_of(with_adapter(build("llama"), **lora))


def calls_of(model: Any) -> tuple[SharedInput, list[Any], Tensor]:
    model.train()
    (group, *_) = groups_of(model)
    modules = [member.module for member in group.members]
    generator = torch.Generator().manual_seed(0)
    return group, modules, torch.randn(1, 5, modules[0].in_features, generator=generator)


def test_a_module_given_another_input_is_computed_by_itself() -> None:
    group, (q, k, v), x = calls_of(with_adapter(build("llama")))
    other = x + 1
    expected = [module(given).detach() for module, given in ((k, other), (q, x), (k, other), (v, x))]
    group._is_shared = False
    alone = [module(given) for module, given in ((k, other), (q, x), (k, other), (v, x))]
    for one, another in zip(expected, alone, strict=True):
        assert torch.allclose(one, another, atol=1e-5)


def test_outputs_that_nothing_took_end_the_sharing() -> None:
    model = with_adapter(build("llama"))
    group, (q, k, v), x = calls_of(model)
    q(x), k(x), v(x)
    group.before_forward(nn.Module(), ())
    assert group._is_shared and group._input is None
    q(x), v(x)
    group.before_forward(nn.Module(), ())
    assert (group._is_shared, group._outputs) == (False, {})


def test_without_gradients_nothing_is_computed_ahead() -> None:
    group, (q, _, _), x = calls_of(with_adapter(build("llama")))
    with torch.no_grad():
        q(x)
    assert not group._outputs


def test_a_disabled_adapter_is_left_out() -> None:
    model = with_adapter(build("llama"))
    group, (q, _, _), x = calls_of(model)
    with model.disable_adapter():
        assert torch.equal(q(x), q.get_base_layer()(x))
    assert not group._outputs
