"""The first step against the library's: right code passes, each wrong path is named and replaced."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from inspect import unwrap
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5

from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.catalog.optional_kernels import KernelPackage
from qlora_tui.data.step_plan import PlannedStep, StepPlan
from qlora_tui.recipe.schema import Lora, Model, Quantization, Recipe
from qlora_tui.training import loss, packed_attention
from qlora_tui.training.adapter import add_lora
from qlora_tui.training.checks import first_step
from qlora_tui.training.checks.base import packing_is_isolated
from qlora_tui.training.checks.first_step import (
    FastPaths,
    StepNotComputedError,
    VerificationResult,
    _first_sequences,
    _in_every_process,
    verify_first_step,
    verify_step,
)
from qlora_tui.training.checks.step_comparison import (
    StepComparison,
    StepReference,
    excerpt_of,
    ready_to_compare,
)
from qlora_tui.training.compute_device import ComputeDevice, find_device
from qlora_tui.training.distributed import DistributedContext
from qlora_tui.training.fused import gated_mlp, norm_rotary
from qlora_tui.training.fused import lora as lora_group
from qlora_tui.training.fused import lora as lora_linear
from qlora_tui.training.model import PreparedBase, checkpoint_activations, prepare_base
from qlora_tui.training.samples import Sample, SampleList
from tests.support.every_model import taken, walks_over_models
from tests.training.families import build
from tests.training.rank import Rank
from tests.training.trained_weights import (
    CLAIMED,
    LENGTH_SCALED,
    build_with_trained_weights,
)

pytestmark = pytest.mark.slow

_SETTINGS: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
}
"""A soft cap that tiny logits reach; the Gemma 4 that the catalog knows."""
_SATURATED = {"deepseek_v3", "falcon"}
"""With these weights their attention looks at one token alone: in 16 bits, what reaches the queries is
rounding, whichever way it is computed."""
ACROSS_SAMPLES = ["bloom", "falcon", "gpt_neo", "lfm2", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"]
"""Attention of their own, or layers that pass a state on from token to token."""
UNLIKE = [
    *("llama", "qwen3", "gemma2", "phi3", "granite", "gemma3_text", "gpt_oss", "cohere2", "deepseek_v3"),
    *("gemma4_text", "gpt2", "granitemoe", "olmo2", "nemotron", "opt", "qwen2_moe", "seed_oss"),
    *(each for each in ACROSS_SAMPLES if each != "qwen3_5_text"),
]
"""Families of which each has a part that no other has: ``make check-models`` trains all types."""
FEW = [
    "gemma2",  # a cap of the logits, norms before and after
    "phi3",  # fused projections
    "granite",  # scaled embeddings and residuals
    "gpt_oss",  # sinks, experts with biases
    "cohere2",  # parallel blocks, norms with means
    "deepseek_v3",  # low-rank projections, shared experts
    "gpt2",  # transposed matrices, learned positions
    "lfm2",  # convolutions across samples
]
"""Those that ``make test`` takes."""
Mutation = Callable[[pytest.MonkeyPatch], None]


def excerpt(weights: float | None = None) -> SampleList:
    """Two samples of 20 and 13 tokens, the second half of each trained on."""
    generator = torch.Generator().manual_seed(3)
    ids = [tuple(torch.randint(3, 300, (n,), generator=generator).tolist()) for n in (20, 13)]
    labels = [tuple(int(at >= len(of_one) // 2) for at in range(len(of_one))) for of_one in ids]
    counts = [None if weights is None else tuple(weights * on for on in of_one) for of_one in labels]
    return SampleList([Sample(*each) for each in zip(ids, labels, counts, strict=True)])


def massive_channel(model_type: str, dtype: torch.dtype, **settings: Any) -> Any:
    """A model whose attention looks at several tokens, as trained models' does, with outliers elsewhere: norm
    weights of 0.2 to 5, one channel of the residual stream far above all others."""
    model = build(model_type, **settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if "norm" in name and isinstance(weight, torch.nn.Parameter):
                weight.copy_(torch.randn(weight.shape, generator=generator).mul_(0.5).exp_())
            if name.endswith("down_proj"):
                module.weight[7] *= 30
    return model.to(dtype)


def adapted(
    folder: Path,
    model_type: str,
    dtype: str,
    *,
    build: Callable[..., Any] = build_with_trained_weights,
    method: Any = "none",
    **lora: Any,
) -> tuple[Any, PreparedBase, ComputeDevice]:
    """A model of the family, ready to train as a run would train it."""
    build(model_type, getattr(torch, dtype), **_SETTINGS.get(model_type, {})).save_pretrained(folder)
    recipe = Recipe(
        model=Model(id=str(folder)),
        quantization=Quantization(method=method, compute_dtype=dtype),  # type: ignore[arg-type]  # of two
        lora=Lora(rank=4, alpha=8, **lora),
    )
    device = find_device(recipe)
    base = prepare_base(folder, recipe, device, "segments", "chunked", weighted=False)
    torch.manual_seed(0)
    return add_lora(base.model, recipe.lora, resolve_model(str(folder)).architecture), base, device


def verify(folder: Path, model_type: str) -> VerificationResult:
    model, base, device = adapted(folder, model_type, "float32")
    verified = verify_step(model, base, excerpt(), device, 0, DistributedContext())
    assert isinstance(verified, VerificationResult), verified
    return verified


@walks_over_models
@pytest.mark.parametrize("model_type", taken(UNLIKE, FEW))
def test_every_family_with_heavy_tails_keeps_its_fast_paths(model_type: str, tmp_path: Path) -> None:
    is_exact = model_type in _SATURATED or UNLIKE.index(model_type) % 2 == 0
    name = "float32" if is_exact else "bfloat16"
    model, base, device = adapted(tmp_path, model_type, name, dropout=0.1)
    assert base.loss == "chunked" and base.padding_free == (model_type not in ACROSS_SAMPLES)
    if not base.padding_free:
        # Also of a family whose attention would not be replaced.
        assert not packing_is_isolated(base.model, device.torch_device)
    verified = verify_step(model, base, excerpt(), device, 0, DistributedContext())
    assert isinstance(verified, VerificationResult), verified
    assert verified.agrees and verified.replaced == (), verified.comparison


def test_samples_around_the_original_context_train_packed(tmp_path: Path) -> None:
    """The longer sample of the excerpt has LongRoPE's long frequencies, the shorter one has not."""

    def longrope(model_type: str, dtype: torch.dtype) -> Any:
        return build(model_type, **LENGTH_SCALED["phi3 longrope"]).to(dtype)

    model, base, device = adapted(tmp_path, "phi3", "float32", build=longrope)
    assert base.padding_free
    settings = base.model.config.rope_parameters
    settings["original_max_position_embeddings"] = 16
    verified = verify_step(model, base, excerpt(), device, 0, DistributedContext())
    assert isinstance(verified, VerificationResult) and verified.agrees and verified.replaced == ()


def test_a_loss_of_routers_is_switched_off(tmp_path: Path) -> None:
    def balanced(model_type: str, dtype: torch.dtype) -> Any:
        return build(model_type, **{**CLAIMED[model_type], "output_router_logits": True})

    model, base, device = adapted(tmp_path, "qwen3_moe", "float32", build=balanced)
    assert base.router_loss_off and not base.model.config.output_router_logits and base.loss == "chunked"
    verified = verify_step(model, base, excerpt(), device, 0, DistributedContext())
    assert isinstance(verified, VerificationResult) and verified.agrees and verified.replaced == ()


@pytest.mark.parametrize("late", [0, 1])
def test_installed_kernels_are_compared_with_pytorch(
    late: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "torch_chunk_gated_delta_rule"
    right = unwrap(getattr(modeling_qwen3_5, name))

    @wraps(right)
    def kernel(*args: Any, **settings: Any) -> Any:
        output, state = right(*args, **settings)
        return output.roll(late, dims=1), state

    monkeypatch.setattr(modeling_qwen3_5, name, kernel)
    monkeypatch.setattr(KernelPackage, "is_installed", True)
    verified = verify(tmp_path, "qwen3_5_text")
    assert verified.agrees and verified.replaced == (("kernels",) if late else ())
    assert getattr(modeling_qwen3_5, name) is (right if late else kernel)


def no_offset(patch: pytest.MonkeyPatch) -> None:
    """Gemma's norm multiplies by the weight alone."""
    patch.setattr(norm_rotary, "_factor", lambda weight, variant: weight.float())


def norm_without_projection(patch: pytest.MonkeyPatch) -> None:
    """The norm's backward forgets that the root mean square depends on the input."""

    def backward(ctx: Any, gradient: Tensor) -> Any:
        _, spread = ctx.saved_tensors
        factor = norm_rotary._factor(ctx.weight, ctx.variant)
        return (gradient.float() * factor * spread).to(gradient.dtype), None, None, None

    patch.setattr(norm_rotary._FusedRmsNorm, "backward", staticmethod(backward))


def gate_and_up_swapped(patch: pytest.MonkeyPatch) -> None:
    right = gated_mlp.gated_down
    patch.setattr(gated_mlp, "gated_down", lambda gate, up, *rest: right(up, gate, *rest))


def scale_dropped(patch: pytest.MonkeyPatch) -> None:
    """A's gradient is half of what it is with the adapter's scale, 2."""
    right = lora_linear.grad_of_a
    patch.setattr(lora_linear, "grad_of_a", lambda *args: right(*args) / 2)


def columns_swapped(patch: pytest.MonkeyPatch) -> None:
    """Gate and up are given each other's columns of the product with A."""
    right = lora_group._by_adapter
    patch.setattr(lora_group, "_by_adapter", lambda *args, **options: right(*args, **options)[::-1])


def samples_not_separated(patch: pytest.MonkeyPatch) -> None:
    right = packed_attention.segment_mask
    patch.setattr(loss, "segment_mask", lambda lengths: right([sum(lengths)]))


def soft_cap_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = loss.losses_and_grads

    def wrong(logits: Tensor, targets: Tensor, head: loss.ChunkedHead, *, needs_grad: bool) -> Any:
        plain = loss.ChunkedHead(head.projection, head.multiplier, None)
        return right(logits, targets, plain, needs_grad=needs_grad)

    patch.setattr(loss, "losses_and_grads", wrong)


def multiplier_forgotten_in_backward(patch: pytest.MonkeyPatch) -> None:
    right = loss.losses_and_grads

    def wrong(logits: Tensor, targets: Tensor, head: loss.ChunkedHead, *, needs_grad: bool) -> Any:
        losses, logit_grads = right(logits, targets, head, needs_grad=needs_grad)
        return losses, None if logit_grads is None else logit_grads / head.multiplier

    patch.setattr(loss, "losses_and_grads", wrong)


@pytest.mark.parametrize(
    ("mutate", "model_type", "path", "dtype"),
    [
        (no_offset, "gemma3_text", "norms", "bfloat16"),
        (norm_without_projection, "llama", "norms", "float32"),
        (gate_and_up_swapped, "qwen3", "mlp", "bfloat16"),
        (scale_dropped, "mistral", "lora", "bfloat16"),
        (columns_swapped, "llama", "lora", "float32"),
        (samples_not_separated, "llama", "packed attention", "bfloat16"),
        (soft_cap_forgotten, "gemma2", "loss", "bfloat16"),
        (multiplier_forgotten_in_backward, "granite", "loss", "float32"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_wrong_path_is_named_and_replaced(
    mutate: Mutation, model_type: str, path: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base, device = adapted(tmp_path, model_type, dtype, build=massive_channel)
    mutate(monkeypatch)
    verified = verify_step(model, base, excerpt(), device, 0, DistributedContext())
    assert isinstance(verified, VerificationResult)
    assert verified.replaced == (path,) and verified.agrees and not verified.comparison.agrees


def test_two_wrong_paths_are_both_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, base, device = adapted(tmp_path, "llama", "float32")
    norm_without_projection(monkeypatch)
    gate_and_up_swapped(monkeypatch)
    verified = verify_step(model, base, excerpt(), device, 0, DistributedContext())
    assert isinstance(verified, VerificationResult) and verified.replaced == ("norms", "mlp")
    with ready_to_compare(model, device):
        as_left = StepReference(model, excerpt(), device).compare(packed=True, pad_id=0)
    assert as_left.agrees


def test_the_check_leaves_model_and_random_numbers_as_they_were(tmp_path: Path) -> None:
    model, base, device = adapted(tmp_path, "llama", "float32", dropout=0.1)
    checkpoint_activations(base.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    numbers = torch.get_rng_state()
    assert isinstance(
        verify_step(model, base, excerpt(0.5), device, 0, DistributedContext()), VerificationResult
    )
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert base.model.config._attn_implementation == "qlora_segments"
    dropouts = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts and set(dropouts) == {0.1}


def test_a_reference_step_that_is_not_finite_is_no_verdict(tmp_path: Path) -> None:
    model, base, device = adapted(tmp_path, "llama", "float32")
    with torch.no_grad():
        base.model.get_input_embeddings().weight.fill_(float("nan"))
    verdict = verify_step(model, base, excerpt(), device, 0, DistributedContext())
    assert isinstance(verdict, str) and "not a finite number" in verdict


def failing(calls: int, error: Exception) -> Callable[..., Any]:
    """``StepReference.compare`` that raises ``error`` at call number ``calls``."""
    stock, count = StepReference.compare, 0

    def compare(self: StepReference, **settings: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls:
            raise error
        return stock(self, **settings)

    return compare


def test_a_check_out_of_memory_leaves_every_path_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base, device = adapted(tmp_path, "llama", "float32", dropout=0.1)
    names = FastPaths(model, base).names
    norm_without_projection(monkeypatch)
    # All paths, again with more noise, none, and then the first one by itself.
    monkeypatch.setattr(StepReference, "compare", failing(4, MemoryError("no more")))
    with pytest.raises(StepNotComputedError, match="no more") as raised:
        verify_step(model, base, excerpt(), device, 0, DistributedContext())
    assert raised.value.out_of_memory
    assert FastPaths(model, base).names == names
    assert base.model.config._attn_implementation == "qlora_segments"
    assert all(parameter.grad is None for parameter in model.parameters())
    b = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert b and not any(p.any() for p in b.values())
    verdict = verify_step(model, base, excerpt(), device, 0, DistributedContext())
    assert isinstance(verdict, VerificationResult) and verdict.replaced == ("norms",)


@contextmanager
def no_collections() -> Iterator[None]:
    """Collect no garbage inside, unless the code does so itself."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_a_failed_step_is_in_no_reference_cycle() -> None:
    alive = []

    def step() -> None:
        activations = torch.ones(8)
        alive.append(weakref.ref(activations))
        raise MemoryError("no more")

    with no_collections():
        with pytest.raises(StepNotComputedError):
            _in_every_process(DistributedContext(), step)
        assert alive[0]() is None


def test_each_try_begins_without_the_tensors_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of other code may be in cycles too."""
    alive: list[weakref.ref[Tensor]] = []
    result = VerificationResult(StepComparison(1.0, 1.0, 0.0, 0.0, 0.0, ""))

    def step(*args: Any) -> VerificationResult:
        activations = torch.ones(8)
        assert not any(tensor() is not None for tensor in alive)
        alive.append(weakref.ref(activations))
        if len(alive) == 3:
            return result
        error = StepNotComputedError("no more", out_of_memory=True)
        raise error

    monkeypatch.setattr(first_step, "verify_step", step)
    monkeypatch.setattr(first_step, "_affordable_tokens", lambda *args: 64)
    run: Any = MagicMock()
    run.step_plan = StepPlan((PlannedStep(((0,), (1,)), 0.0, ends_epoch=True),), 1, 1)
    run.samples = excerpt()
    run.recipe.training.micro_batch_size = 2
    with no_collections():
        verify_first_step(run)
    assert len(alive) == 3


def test_a_path_that_raises_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise TypeError("an argument that transformers added")

    model, base, device = adapted(tmp_path, "llama", "float32")
    monkeypatch.setattr(loss, "losses_and_grads", broken)
    verdict = verify_step(model, base, excerpt(), device, 0, DistributedContext())
    assert isinstance(verdict, VerificationResult) and verdict.agrees and verdict.replaced == ("loss",)
    assert verdict.comparison.failure == "TypeError: an argument that transformers added"


@pytest.mark.parametrize(
    ("error", "reason"),
    [(MemoryError("no more"), None), (KeyError("rope_type"), "KeyError: 'rope_type'")],
    ids=["out of memory", "another error"],
)
def test_a_failure_in_one_process_is_one_of_all(
    error: Exception, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = [adapted(tmp_path / str(rank), "llama", "float32") for rank in (0, 1)]
    barrier, values = threading.Barrier(2), [None, None]
    stock, tries = StepReference.measure_noise, []

    def measure_noise(self: StepReference) -> None:
        if self._model is ready[1][0]:
            tries.append(self._excerpt.tokens)
            if len(tries) == 1:
                raise error
        stock(self)

    monkeypatch.setattr(StepReference, "measure_noise", measure_noise)

    def verify_in(rank: int) -> VerificationResult | str:
        model, base, device = ready[rank]
        processes = Rank(rank=rank, world_size=2, barrier=barrier, values=values)
        try:
            return verify_step(model, base, excerpt(), device, 0, processes)
        except StepNotComputedError as failure:
            if not failure.out_of_memory:
                return str(failure)
            return verify_step(model, base, excerpt(), device, 0, processes)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(verify_in, (0, 1))
    if reason is not None:
        assert first == second == reason
    else:
        assert (
            isinstance(first, VerificationResult) and first == second and first.agrees and not first.replaced
        )


def test_nothing_is_dropped_out_during_the_check(tmp_path: Path) -> None:
    model = build_with_trained_weights("falcon", torch.float32, hidden_dropout=0.3, attention_dropout=0.3)
    modes = {module: module.training for module in model.modules()}
    tokens = torch.tensor([excerpt().token_ids(0)])
    recipe = Recipe(model=Model(id="falcon"), quantization=Quantization(compute_dtype="float32"))
    with ready_to_compare(model, find_device(recipe)), torch.no_grad():
        assert model.training and torch.equal(model(tokens).logits, model(tokens).logits)
    assert model.config.hidden_dropout == model.config.attention_dropout == 0.3
    assert {module: module.training for module in model.modules()} == modes
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


def test_the_excerpt_has_two_samples_where_any_micro_batch_has() -> None:
    rows = [(0,), (1, 0)]
    steps = tuple(PlannedStep(sequences=(row,), epoch=1.0, ends_epoch=False) for row in rows)
    assert _first_sequences(StepPlan(steps, 2, 2), _Samples(), 1) == ((1, 0),)
    assert _first_sequences(StepPlan(steps[:1], 1, 1), _Samples(), 1) == ((0,),)


class _Samples:
    """One sample of 30 tokens, trained from 12 to 19, and one of 4."""

    def __len__(self) -> int:
        return 2

    def token_ids(self, i: int) -> list[int]:
        return [list(range(30)), list(range(100, 104))][i]

    def loss_mask(self, i: int) -> list[int]:
        return [[int(12 <= at < 20) for at in range(30)], [0, 0, 1, 1]][i]

    def weights(self, i: int) -> list[float] | None:
        return None

    def length(self, i: int) -> int:
        return [30, 4][i]

    def epoch(self, epoch: int, seed: int) -> list[int]:
        return [0, 1]


def test_an_excerpt_ends_with_the_last_trained_token() -> None:
    part = excerpt_of([(0,), (1,)], _Samples(), tokens=20)
    assert [list(part.token_ids(i)) for i in (0, 1)] == [list(range(10, 20)), [100, 101, 102, 103]]
    assert [list(part.loss_mask(i)) for i in (0, 1)] == [[0, 0, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1]]
    assert part.tokens == 14
