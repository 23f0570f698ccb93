"""One new token on a CPU is read in ways of our own, and scores as the libraries would have it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_tui.chat import adapters, cpu
from qlora_tui.chat.chat_types import ADAPTER, BASE, ChatSource
from qlora_tui.chat.decoding import PrefixCache
from qlora_tui.chat.session import ChatSession, load_session
from qlora_tui.recipe.schema import Model, Quantization, Recipe
from tests.chat.adapters import make_adapter
from tests.training.families import FAMILIES, build
from tests.training.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow

READ = [5, 17, 80, 33, 120, 7, 64, 9, 200, 31, 2, 45]
"""Longer than the families' sliding windows."""
SAID = [90, 11, 250, 3, 77]


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatSource:
    """A family's tiny model in fp32, and an adapter on it."""
    folder = make_tiny_model(tmp_path_factory.mktemp(request.param) / "model")
    build(request.param, vocab_size=384).save_pretrained(folder)
    adapter = make_adapter(folder, folder.parent / "adapter")
    quantization = Quantization(method="none", compute_dtype="float32")
    recipe = Recipe(model=Model(id=str(folder)), quantization=quantization)
    return ChatSource(recipe=recipe, adapters={ADAPTER: str(adapter)})


def scores(session: ChatSession, adapter_name: str) -> torch.Tensor:
    """(tokens, vocabulary): after a prompt in two parts, and after each of the tokens that follow it."""
    prefix_cache = PrefixCache(session._model.config)
    session.ensure_loaded(adapter_name)
    session.next_logits(adapter_name, READ[:5], prefix_cache)
    return torch.cat(
        [
            session.next_logits(adapter_name, ids, prefix_cache)
            for ids in (READ[5:], *([token] for token in SAID))
        ]
    )


def test_token_by_token_scores_equal_those_of_transformers_and_peft(
    source: ChatSource,
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    session = load_session(source)
    assert session._model.config._attn_implementation in (cpu.NAME, "eager")
    plain: Any = AutoModelForCausalLM.from_pretrained(source.recipe.model.id, attn_implementation="eager")
    tuned: Any = PeftModel.from_pretrained(plain, source.adapters[ADAPTER])
    ids = torch.tensor([READ + SAID])
    with torch.no_grad():
        expected = {ADAPTER: tuned(input_ids=ids).logits[0, len(READ) - 1 :]}
        with tuned.disable_adapter():
            expected[BASE] = tuned(input_ids=ids).logits[0, len(READ) - 1 :]
    assert not torch.allclose(expected[ADAPTER], expected[BASE], atol=0.1)
    for adapter_name in (ADAPTER, BASE, ADAPTER):
        torch.testing.assert_close(
            scores(session, adapter_name), expected[adapter_name], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(("heads", "shared"), [(6, 2), (4, 4)])
@pytest.mark.parametrize(("tokens", "masked"), [(1, False), (1, True), (3, False)])
def test_heads_in_groups_attend_as_head_by_head(heads: int, shared: int, tokens: int, masked: bool) -> None:
    module: Any = nn.Module()
    module.num_key_value_groups = heads // shared
    query = torch.randn(1, tokens, heads, 16).transpose(1, 2)
    key, value = torch.randn(1, shared, 9, 16), torch.randn(1, shared, 9, 16)
    mask = torch.rand(1, 1, tokens, 9) > 0.3 if masked else None
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    output, _ = cpu.attend(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(output, expected)


@pytest.fixture
def packed() -> Callable[..., Any]:
    """Makes a 4-bit layer of the layout for this CPU."""
    from bitsandbytes.functional import has_avx512bf16
    from bitsandbytes.nn import Linear4bit

    if not has_avx512bf16():
        pytest.skip("this CPU has no product of 4-bit weights")

    def make(kind: str = "nf4", *, bias: bool = False) -> Any:
        layer = Linear4bit(64, 128, bias=bias, compute_dtype=torch.bfloat16, quant_type=kind)
        layer.requires_grad_(False)
        return layer.to(torch.bfloat16).to("cpu").eval()

    return make


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_kernels_4_bit_product_equals_the_layers(
    packed: Callable[..., Any], kind: str, bias: bool
) -> None:
    layer = packed(kind, bias=bias)
    stock = layer.forward
    cpu.use_cpu_layout(nn.ModuleList([layer]))
    assert layer.forward is not stock
    with torch.inference_mode():
        wide = torch.randn(1, 1, 128, dtype=torch.bfloat16)
        one, many = wide[..., :64].clone(), torch.randn(1, 7, 64, dtype=torch.bfloat16)
        for x in (many, one, one.view(1, 64), one, wide[..., ::2], one.float(), many):
            given = layer(x)
            torch.testing.assert_close(given, stock(x), rtol=0, atol=0)


def test_an_unknown_bitsandbytes_version_uses_its_own_forward(
    packed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = packed()
    monkeypatch.setattr("bitsandbytes.__version__", "0.99.1.dev0")
    cpu.use_cpu_layout(nn.ModuleList([layer]))
    assert "forward" not in vars(layer)
    assert layer.support_avx512bf16_for_cpu


@pytest.fixture
def in_bf16(tiny_source: ChatSource, packed: Callable[..., Any]) -> ChatSource:
    """The tiny model in 4 bits, laid out for the CPU."""
    settings = msgspec.structs.replace(tiny_source.recipe.quantization, compute_dtype="bfloat16")
    recipe = msgspec.structs.replace(tiny_source.recipe, quantization=settings)
    return msgspec.structs.replace(tiny_source, recipe=recipe)


def test_straight_products_change_nothing_in_what_a_model_says(
    in_bf16: ChatSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = load_session(in_bf16)
    monkeypatch.setattr(cpu, "_SUPPORTED", re.compile("none"))
    stock = load_session(in_bf16)
    for adapter_name in (ADAPTER, BASE):
        torch.testing.assert_close(
            scores(straight, adapter_name), scores(stock, adapter_name), rtol=0, atol=0
        )


def test_reading_an_adapter_leaves_the_base_weights_unchanged(in_bf16: ChatSource) -> None:
    session = load_session(in_bf16)
    before = scores(session, BASE)
    layers = [m for m in session._model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    addresses = [layer.weight.data_ptr() for layer in layers]
    session.ensure_loaded(ADAPTER)
    torch.testing.assert_close(scores(session, BASE), before, rtol=0, atol=0)
    assert [layer.weight.data_ptr() for layer in layers] == addresses


def test_an_adapters_delta_is_the_same_batched_or_single() -> None:
    """Many in half precision, one in fp32."""
    base = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer: Any = nn.Module()
    layer.lora_A = nn.ModuleDict({ADAPTER: nn.Linear(64, 4, bias=False)}).requires_grad_(False)
    layer.lora_B = nn.ModuleDict({ADAPTER: nn.Linear(4, 48, bias=False)}).requires_grad_(False)
    layer.scaling = {ADAPTER: 2.0}
    forward = adapters.LoraForward(base, adapters.ActiveAdapter(ADAPTER))
    forward.register(ADAPTER, layer)
    x = torch.randn(1, 100, 64, dtype=torch.bfloat16)
    each = torch.cat([forward(x[:, i : i + 1]) for i in range(100)], dim=1)
    exact = (
        x.float() @ (base.weight.float() + 2 * layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight).T
    )
    for given in (forward(x), each):
        torch.testing.assert_close(given.float(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (1152, 4304), (4304, 1152)])
def test_a_layer_that_the_cpu_layout_cannot_hold_stays_unchanged(
    inputs: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the vision towers of Gemma 3: bitsandbytes would end with an assertion as it lays them out."""
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes.functional, "has_avx512bf16", lambda: True)
    layer = bitsandbytes.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.bfloat16).to("cpu")
    layer.support_avx512bf16_for_cpu = False
    before = layer.weight.data.clone()
    cpu.use_cpu_layout(nn.ModuleList([layer]))
    assert not layer.support_avx512bf16_for_cpu and torch.equal(layer.weight.data, before)
