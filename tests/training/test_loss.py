"""The chunked loss is the stock loss, and is used where the model's own is the cross-entropy of its head."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qlora_tui.recipe.schema import Lora, Quantization, Recipe
from qlora_tui.training import loss, packed_attention
from qlora_tui.training import model as model_loading
from qlora_tui.training.checks import base
from qlora_tui.training.compute_device import find_device
from qlora_tui.training.scoring import no_grad_eval
from tests.training.families import FAMILIES, build
from tests.training.trained_weights import build_with_trained_weights

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ROUNDING = 2e-5


def labeled(model: Any, rows: int = 2, tokens: int = 23) -> tuple[Tensor, Tensor]:
    """Token ids, and labels of which about half are ignored."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (rows, tokens), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.5, loss.IGNORED)
    return ids, labels


def loss_and_gradient(model: Any, **inputs: Any) -> tuple[float, Tensor]:
    """The loss, and its gradient at the input of every layer together: at the embeddings."""
    embeddings = model.get_input_embeddings().weight
    embeddings.requires_grad_(True)
    value = model(**inputs).loss
    value.backward()
    gradient = embeddings.grad.clone()
    embeddings.grad = None
    embeddings.requires_grad_(False)
    return value.item(), gradient


def close(gradient: Tensor, expected: Tensor) -> bool:
    """Equal within the rounding of fp32."""
    return torch.allclose(gradient, expected, rtol=1e-3, atol=ROUNDING * expected.abs().max().item())


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("items", [None, 37])
def test_the_chunked_loss_is_the_stock_loss(
    model_type: str, items: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "LOSS_CHUNK_ROWS", 7)
    monkeypatch.setattr(loss, "block_rows", lambda device: 3)
    model = build(model_type, tie_word_embeddings=False)
    head = loss.find_head(model)
    assert isinstance(head, loss.ChunkedHead) and base.head_matches_model(model, head, CPU)
    ids, labels = labeled(model)
    inputs = {"input_ids": ids, "labels": labels, "num_items_in_batch": items}
    stock, stock_gradient = loss_and_gradient(model, **inputs)
    loss.use_loss(model, head)
    chunked, gradient = loss_and_gradient(model, **inputs)
    assert chunked == pytest.approx(stock, rel=ROUNDING)
    assert close(gradient, stock_gradient)


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "granite", "gemma2"])
def test_the_weighted_loss_is_what_a_hand_computes(
    model_type: str, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "LOSS_CHUNK_ROWS", 7)
    monkeypatch.setattr(loss, "block_rows", lambda device: 3)
    model = build(model_type, tie_word_embeddings=False)
    ids, labels = labeled(model)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) * (labels != loss.IGNORED)
    embeddings = model.get_input_embeddings().weight.requires_grad_(True)
    odds = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    own = -odds.gather(2, ids[:, 1:, None])[..., 0]
    by_hand = (own * weights[:, 1:]).sum() / weights[:, 1:].sum()
    (expected,) = torch.autograd.grad(by_hand, embeddings)
    head = loss.find_head(model)
    assert isinstance(head, loss.ChunkedHead)
    if chunked:
        loss.use_loss(model, head)
    else:
        loss.use_loss(model, "not supported")
    value, gradient = loss_and_gradient(
        model,
        input_ids=ids,
        labels=labels,
        loss_weights=weights,
        num_items_in_batch=float(weights[:, 1:].sum()),
    )
    assert value == pytest.approx(by_hand.item(), rel=ROUNDING)
    assert close(gradient, expected)


def test_an_undeclared_factor_of_the_head_is_detected() -> None:
    model = build("granite")
    model.config.logits_scaling = 1.0
    head = loss.find_head(model)
    assert isinstance(head, loss.ChunkedHead)
    model.config.logits_scaling = 3.0
    assert not base.head_matches_model(model, head, CPU)


def test_a_trained_head_is_left_to_the_stock_loss() -> None:
    model = build("llama", tie_word_embeddings=False)
    model.lm_head.weight.requires_grad_(True)
    assert loss.find_head(model) == "its head is trained"


def test_nothing_to_learn_is_a_loss_of_zero_with_gradients() -> None:
    model = build("llama")
    head = loss.find_head(model)
    assert isinstance(head, loss.ChunkedHead)
    loss.use_loss(model, head)
    ids, labels = labeled(model)
    value, gradient = loss_and_gradient(
        model, input_ids=ids, labels=torch.full_like(labels, loss.IGNORED), num_items_in_batch=1
    )
    assert value == 0.0 and not gradient.any()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_samples_in_one_row_are_what_they_are_alone(model_type: str) -> None:
    """Against transformers' own eager attention, loss and gradient, sample by sample."""
    alone = build(model_type)
    together = copy.deepcopy(alone)
    assert packed_attention.use_packed_attention(together)
    loss.use_loss(together, "the library's")
    assert base.packing_is_isolated(together, CPU)
    lengths = [5, 17, 1, 12]
    ids, labels = labeled(alone, 1, sum(lengths))
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    labels[0, starts] = loss.IGNORED
    expected, expected_gradient = 0.0, torch.zeros(1)
    for start, length in zip(starts, lengths, strict=True):
        part = slice(start, start + length)
        if bool((labels[:, part] != loss.IGNORED).any()):
            value, gradient = loss_and_gradient(
                alone, input_ids=ids[:, part], labels=labels[:, part], num_items_in_batch=1
            )
            expected, expected_gradient = expected + value, expected_gradient + gradient
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    value, gradient = loss_and_gradient(
        together,
        input_ids=ids,
        labels=labels,
        position_ids=positions,
        segments=lengths,
        num_items_in_batch=1,
    )
    assert value == pytest.approx(expected, rel=ROUNDING)
    assert close(gradient, expected_gradient)


def test_generation_is_as_with_stock_attention() -> None:
    model = build("gemma2")
    ids, _ = labeled(model, 1)
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "use_cache": True}
    expected = model.generate(ids, **settings)
    packed_attention.use_packed_attention(model)
    loss.use_loss(model, "the library's")
    assert torch.equal(model.generate(ids, **settings), expected)


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_a_family_without_sdpa_is_loaded_with_segment_attention(model_type: str, tmp_path: Path) -> None:
    build(model_type).save_pretrained(tmp_path)
    recipe = Recipe(quantization=Quantization(method="none"))
    model = model_loading.load_base(tmp_path, recipe, find_device(recipe), "segments")
    assert packed_attention.use_packed_attention(model)
    loss.use_loss(model, "the library's")


@pytest.mark.parametrize("method", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_4_bit_gradients_are_exact_after_a_sample_was_generated(
    tiny_model: Path, method: Any, double: bool
) -> None:
    recipe = Recipe(
        quantization=Quantization(method=method, double_quantization=double, compute_dtype="float32"),
        lora=Lora(rank=8),
    )
    model = model_loading.load_base(tiny_model, recipe, find_device(recipe), "segments")
    reference = _dequantized(model)
    ids, labels = labeled(model)
    with no_grad_eval(model):
        model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True)
    model.train()
    value, gradient = loss_and_gradient(model, input_ids=ids, labels=labels)
    expected, expected_gradient = loss_and_gradient(reference, input_ids=ids, labels=labels)
    assert value == pytest.approx(expected, rel=1e-6)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_no_4_bit_weight_may_be_repacked(tiny_model: Path) -> None:
    recipe = Recipe()
    model = model_loading.load_base(tiny_model, recipe, find_device(recipe), "segments")
    guarded = [m.support_avx512bf16_for_cpu for m in model.modules() if hasattr(m, "quant_state")]
    assert guarded == [False] * 14


def _dequantized(model: Any) -> Any:
    """The same model with every 4-bit weight written out."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM

    config = model.config.__class__(**_plain(model.config))
    dense: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    weights = {}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        weights[name] = parameter if state is None else dequantize_4bit(parameter.data, state)
    dense.load_state_dict(weights, strict=False)
    dense.tie_weights()
    return dense.float().requires_grad_(False)


def _plain(config: Any) -> dict[str, Any]:
    settings: dict[str, Any] = config.to_dict()
    settings.pop("quantization_config", None)
    return settings


def test_padded_cpu_samples_attend_as_they_do_alone() -> None:
    torch.manual_seed(0)
    lengths: list[int] = [5, 32, 41]
    given = [torch.randn(1, heads, sum(lengths), 16).bfloat16() for heads in (4, 2, 2)]
    filled: Any = [x.clone().requires_grad_() for x in given]
    mask = packed_attention.segment_mask(lengths)
    attend_filled: Any = packed_attention.segment_attention
    out, _ = attend_filled(torch.nn.Module(), *filled, mask)
    out.float().square().sum().backward()
    alone: Any = [x.float().requires_grad_() for x in given]
    attend: Any = torch.nn.functional.scaled_dot_product_attention
    parts = [
        attend(*sample, is_causal=True, enable_gqa=True)
        for sample in zip(*(x.split(lengths, dim=2) for x in alone), strict=True)
    ]
    expected = torch.cat(parts, dim=2).transpose(1, 2)
    expected.square().sum().backward()  # type: ignore[no-untyped-call]  # torch's own
    assert torch.allclose(out.float(), expected, atol=0.02)
    for got, wanted in zip(filled, alone, strict=True):
        assert torch.allclose(got.grad.float(), wanted.grad, atol=0.02 * float(wanted.grad.abs().max()))


def test_a_quantized_model_releases_its_weight_file(tiny_model: Path) -> None:
    recipe = Recipe(quantization=Quantization(compute_dtype="float32"))  # as it is stored
    model = model_loading.load_base(tiny_model, recipe, find_device(recipe), "segments")
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert str(tiny_model) not in Path("/proc/self/maps").read_text()


def test_a_layer_computed_again_drops_what_it_dropped_before() -> None:
    """The base model's own dropout too: Granite, Phi-2, OPT and GPT-2 have one."""
    model = build("granite", attention_dropout=0.3).train()
    ids, labels = labeled(model)

    def step() -> tuple[float, Tensor]:
        torch.manual_seed(0)
        return loss_and_gradient(model, input_ids=ids, labels=labels)

    value, gradient = step()
    model_loading.checkpoint_activations(model)
    again, gradient_again = step()
    assert again == pytest.approx(value, rel=1e-6) and close(gradient_again, gradient)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WITH_FACTORS = ["llama", "granite", "cohere", "gemma2"]


def head_of(model: Any) -> loss.ChunkedHead:
    head = loss.find_head(model)
    assert isinstance(head, loss.ChunkedHead)
    return head


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", WITH_FACTORS)
def test_only_a_head_read_with_its_own_factors_is_proved(model_type: str, dtype: torch.dtype) -> None:
    model = build_with_trained_weights(model_type, dtype)
    head = head_of(model)
    assert base.head_matches_model(model, head, CPU)
    assert "forward" not in vars(model.get_output_embeddings()) and not model.get_decoder()._forward_hooks
    caps = [None, 30.3, 31.0] if head.softcap else [30.0, 1000.0]
    wrong: list[dict[str, Any]] = [{"multiplier": head.multiplier * n} for n in (1.01, 0.99, -1.0, 2.0)]
    for change in [*wrong, *({"softcap": cap} for cap in caps)]:
        assert not base.head_matches_model(model, dataclasses.replace(head, **change), CPU), change


def before(change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """The model changes hidden states on the way to its head."""
    return lambda model: model.get_output_embeddings().register_forward_pre_hook(
        lambda module, given: (change(given[0]),)
    )


def after(change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """The model changes the logits that come out of its head."""
    return lambda model: model.get_output_embeddings().register_forward_hook(
        lambda module, given, logits: change(logits)
    )


def first_token_favored(logits: Tensor) -> Tensor:
    return logits + functional.one_hot(torch.tensor(0), logits.shape[-1])


MUTANTS: dict[str, Callable[[Any], None]] = {
    "states scaled": before(lambda states: states * 0.99),
    "one channel of the states dropped": before(
        lambda states: states * (torch.arange(states.shape[-1]) != 5)
    ),
    "states normed": before(lambda states: functional.rms_norm(states, states.shape[-1:])),
    "logits scaled": after(lambda logits: logits * 1.005),
    "logits capped at 1,000": after(lambda logits: 1000 * torch.tanh(logits / 1000)),
    "logits clamped": after(lambda logits: logits.clamp(min=-8, max=8)),
    "a bias for one token": after(first_token_favored),
}


@pytest.mark.parametrize("model_type", WITH_FACTORS)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_model_that_does_anything_else_keeps_all_logits(name: str, model_type: str) -> None:
    for dtype in DTYPES:
        model = build_with_trained_weights(model_type, dtype, tie_word_embeddings=False)
        head = head_of(model)
        MUTANTS[name](model)
        assert not base.head_matches_model(model, head, CPU), dtype


@pytest.mark.parametrize("chunks", [True, False])
def test_the_loss_function_of_a_class_is_not_used(chunks: bool) -> None:
    """BART's decoder expects labels that are shifted already."""
    model = build("llama")
    model.loss_function = lambda logits, labels, *args, **kwargs: functional.cross_entropy(
        logits[0].float(), labels[0]
    )
    head = head_of(model)
    assert base.head_matches_model(model, head, CPU)
    ids, labels = labeled(model, rows=1)
    expected = functional.cross_entropy(model(input_ids=ids).logits[0, :-1], labels[0, 1:])
    loss.use_loss(model, head if chunks else "not in chunks")
    value, _ = loss_and_gradient(model, input_ids=ids, labels=labels)
    assert value == pytest.approx(expected.item(), rel=ROUNDING)
