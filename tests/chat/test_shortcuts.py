"""Chat's shortcuts give what transformers and peft give; a wrong one is found out, and replaced or named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import msgspec
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_tui.chat import adapters, cpu, decoding, generation, logits
from qlora_tui.chat.chat_types import ADAPTER, BASE, GREEDY, ChatSource
from qlora_tui.chat.decoding import PrefixCache
from qlora_tui.chat.generation import PREFILL_CHUNK_TOKENS, AnswerStream
from qlora_tui.chat.loading import load_session
from qlora_tui.chat.session import ChatSession
from qlora_tui.data.conversation import Message
from qlora_tui.recipe.schema import Model, Quantization, Recipe
from qlora_tui.training.checks import rounding
from tests.chat.adapters import make_adapter
from tests.training.families import FAMILIES, build
from tests.training.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow

QUESTION = [Message("user", "what does the quick brown fox say to the wise old owl in the oak")]


def answered(source: ChatSource, adapter_name: str) -> tuple[ChatSession, str]:
    session = load_session(source)
    sampling = replace(GREEDY, max_new_tokens=6)
    return session, "".join(
        said.text for said in session.ask(QUESTION, adapter_name=adapter_name, sampling=sampling)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["nf4", "none"])
def test_each_voice_is_checked_once_and_agrees(tiny_source: ChatSource, dtype: Any, method: Any) -> None:
    recipe = replace(tiny_source.recipe, quantization=Quantization(method=method, compute_dtype=dtype))
    session = load_session(replace(tiny_source, recipe=recipe))
    for adapter_name in ("adapter", "base", "step-2", "adapter"):
        assert list(
            session.ask(QUESTION, adapter_name=adapter_name, sampling=replace(GREEDY, max_new_tokens=2))
        )
    assert session.checked.keys() == {"adapter", "base", "step-2"} and not session.warning
    assert all(0 < one.noise < 0.2 and one.agrees for one in session.checked.values())


def scale_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = adapters.LoraForward.register

    def learn(self: adapters.LoraForward, adapter_name: str, layer: Any) -> None:
        right(self, adapter_name, layer)
        down, up = self._factors[adapter_name]
        self._factors[adapter_name] = (down, up / layer.scaling[adapter_name])

    patch.setattr(adapters.LoraForward, "register", learn)
    # Else the check of each layer leaves this adapter to peft.
    patch.setattr(adapters, "matches_peft", lambda layer, adapter_name, forward: True)


def heads_swapped(patch: pytest.MonkeyPatch) -> None:
    right = functional.scaled_dot_product_attention

    def swapped(query: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        one_token = query.shape[-2] == query.shape[1]
        output: Tensor = right(query.flip(-2) if one_token else query, *rest, **kwargs)
        return output

    patch.setattr(functional, "scaled_dot_product_attention", swapped)


@pytest.mark.parametrize("mutate", [scale_forgotten, heads_swapped], ids=lambda mutate: mutate.__name__)
def test_wrong_scores_are_replaced_by_the_librarys(
    mutate: Any, tiny_source: ChatSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = answered(tiny_source, "adapter")
    mutate(monkeypatch)
    session, answer = answered(tiny_source, "adapter")
    assert not session.checked["adapter"].agrees
    assert session.warning.startswith("Answers are slower")
    reply = session.ask(QUESTION, adapter_name="adapter", sampling=replace(GREEDY, max_new_tokens=1))
    assert list(reply) and reply.outcome is not None and reply.outcome.warning == session.warning
    assert answer == expected


def test_a_wrong_cache_is_not_used(tiny_source: ChatSource, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = answered(tiny_source, "adapter")
    right = decoding.GrowingLayer.update

    def update(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = right(self, keys, values, *args, **kwargs)
        return keys, values.flip(-2) if keys.shape[-2] % 16 == 0 else values

    monkeypatch.setattr(decoding.GrowingLayer, "update", update)
    session, answer = answered(tiny_source, "adapter")
    assert session.warning.startswith("Answers are slower: with a KV cache") and answer == expected


def test_a_check_that_fails_costs_no_answer(tiny_source: ChatSource, monkeypatch: pytest.MonkeyPatch) -> None:
    expected_session, expected = answered(tiny_source, "adapter")
    kinds = [type(vars(m).get("forward")) for m in expected_session._model.modules()]
    calls = []

    def fails(model: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(model)
        raise RuntimeError("a shape that nobody expected\nat line 3")

    monkeypatch.setattr(rounding, "rounding_errors", fails)
    session, answer = answered(tiny_source, "adapter")
    assert answer == expected
    assert session.warning.endswith("peft: RuntimeError: a shape that nobody expected.")
    assert [type(vars(m).get("forward")) for m in session._model.modules()] == kinds
    assert list(session.ask(QUESTION, adapter_name="adapter", sampling=replace(GREEDY, max_new_tokens=1)))
    assert len(calls) == 2, "with a cache and without, and not for a second answer"


def test_library_code_gives_the_model_back_after_an_error(tiny_source: ChatSource) -> None:
    session, _ = answered(tiny_source, "adapter")
    before = {m: vars(m).get("forward") for m in session._model.modules()}
    attention = session._model.config._attn_implementation
    with pytest.raises(RuntimeError), logits.library_code(session._model):
        assert not logits._replaced(session._model)
        raise RuntimeError
    assert {m: vars(m).get("forward") for m in session._model.modules()} == before
    assert session._model.config._attn_implementation == attention


def test_library_scores_leave_no_trace(tiny_source: ChatSource) -> None:
    session, answer = answered(tiny_source, "adapter")
    before = {m: vars(m).get("forward") for m in session._model.modules()}
    session.library_logits("adapter", [5, 6, 7])
    assert {m: vars(m).get("forward") for m in session._model.modules()} == before
    reply = session.ask(QUESTION, adapter_name="adapter", sampling=replace(GREEDY, max_new_tokens=6))
    assert "".join(said.text for said in reply) == answer
    assert torch.equal(
        session.library_logits("adapter", [5, 6, 7]), session.library_logits("adapter", [5, 6, 7])
    )


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INPUTS, OUTPUTS = 96, 160


# Adapters


def peft_layer(dtype: torch.dtype, **config: Any) -> Any:
    """A linear module with an adapter whose factors have outliers."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    torch.manual_seed(0)
    base = nn.Linear(INPUTS, OUTPUTS, dtype=dtype)
    layer = Linear(base, ADAPTER, LoraConfig(r=8), r=8, lora_alpha=24, **config)
    with torch.no_grad():
        for factor in (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight):
            factor.normal_(std=0.05)
            factor[3] *= 40
    return layer.to(dtype).requires_grad_(False).eval()


Speak = Callable[[adapters.LoraForward, str, Tensor], Tensor]
right: Speak = adapters.LoraForward.forward_with


def with_factors(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Speak:
    def speak(forward: adapters.LoraForward, adapter_name: str, x: Tensor) -> Tensor:
        factors = forward._factors[adapter_name]
        forward._factors[adapter_name] = change(*factors)
        try:
            return right(forward, adapter_name, x)
        finally:
            forward._factors[adapter_name] = factors

    return speak


WRONG_ADAPTERS: dict[str, Speak] = {
    "scale dropped": with_factors(lambda down, up: (down, up / 3)),
    "scale 2 % too large": with_factors(lambda down, up: (down, up * 1.02)),
    "one rank left out": with_factors(lambda down, up: (down, up * (torch.arange(8) != 5)[:, None])),
    "outputs shifted": with_factors(lambda down, up: (down, up.roll(1, dims=1))),
    "inputs shifted": with_factors(lambda down, up: (down.roll(1, dims=0), up)),
    "base left out": lambda forward, adapter_name, x: right(forward, adapter_name, x) - forward._base(x),
    "base twice": lambda forward, adapter_name, x: right(forward, adapter_name, x) + forward._base(x),
    "no adapter": lambda forward, adapter_name, x: right(forward, BASE, x),
}


def matches_peft(layer: Any) -> bool:
    forward = adapters.LoraForward(layer.get_base_layer(), adapters.ActiveAdapter(BASE))
    forward.register(ADAPTER, layer)
    return adapters.matches_peft(layer, ADAPTER, forward)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_that_adds_as_peft_is_accepted(dtype: torch.dtype) -> None:
    layer = peft_layer(dtype)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert matches_peft(layer)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(value.dtype == dtype for value in layer.state_dict().values())
    assert "forward" not in vars(layer) and "forward" not in vars(layer.get_base_layer())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WRONG_ADAPTERS)
def test_an_adapter_that_adds_anything_else_is_left_to_peft(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters.LoraForward, "forward_with", WRONG_ADAPTERS[name])
    assert not matches_peft(peft_layer(dtype))


def test_a_model_whose_adapter_differs_computes_by_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList([peft_layer(torch.float32)])
    assert adapters.fuse_adapter(model, ADAPTER, adapters.ActiveAdapter(ADAPTER))
    adapters.restore_peft(model)
    monkeypatch.setattr(adapters.LoraForward, "forward_with", WRONG_ADAPTERS["scale dropped"])
    assert not adapters.fuse_adapter(model, ADAPTER, adapters.ActiveAdapter(ADAPTER))


# Heads in groups


def one_token(dtype: torch.dtype) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A layer of six query and two key heads, and what it attends with: scores to the hundreds."""
    module: Any = nn.Module()
    module.num_key_value_groups = 3
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 6, 1, 16, generator=generator) * 20
    key, value = (torch.randn(1, 2, 9, 16, generator=generator) for _ in range(2))
    key[..., 3] *= 30
    value[..., 5] *= 100
    return module, query.to(dtype), key.to(dtype), value.to(dtype)


Grouped = Callable[[float | None, Tensor | None, Tensor, Tensor, Tensor], Tensor]
grouped: Grouped = cpu._in_groups
WRONG_GROUPS: dict[str, Grouped] = {
    "heads transposed": lambda scaling, mask, q, k, v: grouped(scaling, mask, q, k, v)[
        :, :, [0, 3, 1, 4, 2, 5]
    ],
    "key heads exchanged": lambda scaling, mask, q, k, v: grouped(scaling, mask, q, k.flip(1), v),
    "value heads exchanged": lambda scaling, mask, q, k, v: grouped(scaling, mask, q, k, v.flip(1)),
    "scale dropped": lambda scaling, mask, q, k, v: grouped(None, mask, q, k, v),
    "scale 3 % too large": lambda scaling, mask, q, k, v: grouped(1.03 * (scaling or 0.25), mask, q, k, v),
    "the last key left out": lambda scaling, mask, q, k, v: grouped(
        scaling, None if mask is None else mask[..., :-1], q, k[:, :, :-1], v[:, :, :-1]
    ),
    "output 1 % too large": lambda scaling, mask, q, k, v: 1.01 * grouped(scaling, mask, q, k, v),
}
PADDING = torch.tensor([[0] * 3 + [1] * 6]).bool()[:, None, None]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_verified", {})


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_in_groups_are_proved_at_the_first_token(dtype: torch.dtype) -> None:
    for mask in (None, PADDING):
        cpu.attend(*one_token(dtype), mask, scaling=0.3)
    assert list(cpu._verified.values()) == [True, True]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WRONG_GROUPS)
def test_heads_grouped_otherwise_give_way_to_the_library(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_in_groups", WRONG_GROUPS[name])
    module, query, key, value = one_token(dtype)
    for mask in (PADDING, None):
        output, _ = cpu.attend(module, query, key, value, mask, scaling=0.3)
        expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
        assert torch.equal(output, expected)
    assert list(cpu._verified.values()) == [False, False]


@pytest.mark.usefixtures("fresh")
def test_padding_that_is_not_hidden_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_in_groups", lambda scaling, mask, q, k, v: grouped(scaling, None, q, k, v))
    cpu.attend(*one_token(torch.float32), PADDING, scaling=0.3)
    assert list(cpu._verified.values()) == [False]


# The CPU's layout of 4-bit weights


@pytest.fixture
def four_bit_layer() -> Callable[..., Any]:
    """Makes a 4-bit layer with outlier rows, columns and blocks."""
    from bitsandbytes.functional import has_avx512bf16
    from bitsandbytes.nn import Linear4bit

    if not has_avx512bf16():
        pytest.skip("this CPU has no product of 4-bit weights")

    def make(kind: str = "nf4", *, bias: bool = False, nested: bool = True) -> Any:
        torch.manual_seed(0)
        layer = Linear4bit(
            256,
            128,
            bias=bias,
            compute_dtype=torch.bfloat16,
            quant_type=kind,
            compress_statistics=nested,
        )
        weight = layer.weight.data
        weight.mul_(torch.randn_like(weight).exp())
        weight[3] *= 50
        weight[:, 70] *= 50
        return layer.requires_grad_(False).to(torch.bfloat16).to("cpu").eval()

    return make


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_cpus_layout_is_proved_on_a_copy(
    four_bit_layer: Callable[..., Any], kind: str, bias: bool, nested: bool
) -> None:
    layer = four_bit_layer(kind, bias=bias, nested=nested)
    layer.support_avx512bf16_for_cpu = False
    before = layer.weight.data.clone()
    assert cpu.layout_agrees(layer)
    assert torch.equal(layer.weight.data, before) and not layer.support_avx512bf16_for_cpu


def mixed_up(change: Callable[[Tensor, Any], Tensor]) -> Callable[..., Any]:
    """bitsandbytes' conversion with a mistake in it."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    def convert(weight: Tensor, state: Any, *rest: Any) -> Any:
        converted, state = _convert_weight_packed_for_cpu(weight, state, *rest)
        return change(converted, state), state

    return convert


def scales_changed(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    def changed(weight: Tensor, state: Any) -> Tensor:
        state.absmax = change(state.absmax).contiguous()
        return weight

    return changed


def one_scale_off(scales: Tensor) -> Tensor:
    scales = scales.clone()
    scales.view(-1)[17] *= 1.5
    return scales


WRONG_LAYOUTS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "rows exchanged": lambda weight, state: weight.roll(1, dims=0).contiguous(),
    "nibbles exchanged": lambda weight, state: (weight >> 4) | (weight << 4),
    "scales 5 % too large": scales_changed(lambda scales: scales * 1.05),
    "scales of other blocks": scales_changed(lambda scales: scales.roll(1, dims=-1)),
    "one block's scale off": scales_changed(one_scale_off),
}


@pytest.mark.parametrize("name", WRONG_LAYOUTS)
def test_a_wrong_layout_is_not_used(
    name: str, four_bit_layer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = four_bit_layer()
    layer.support_avx512bf16_for_cpu = False
    x = torch.randn(1, 256).bfloat16()
    expected = layer(x)
    convert = mixed_up(WRONG_LAYOUTS[name])
    monkeypatch.setattr("bitsandbytes.nn.modules._convert_weight_packed_for_cpu", convert)
    cpu.use_cpu_layout(nn.ModuleList([layer]))
    assert not layer.support_avx512bf16_for_cpu and "forward" not in vars(layer)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("wrong_rows", [1, 3])
def test_a_kernel_called_wrongly_is_not_called_directly(
    four_bit_layer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, wrong_rows: int
) -> None:
    direct = cpu._direct_kernel

    def wrong(layer: Any) -> Callable[[Tensor], Tensor] | None:
        product = direct(layer)
        return product and (lambda x: product(x) * (1.01 if len(x) == wrong_rows else 1.0))

    monkeypatch.setattr(cpu, "_direct_kernel", wrong)
    layer = four_bit_layer()
    cpu.use_cpu_layout(nn.ModuleList([layer]))
    assert layer.support_avx512bf16_for_cpu and "forward" not in vars(layer)


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


SELECTS_KEYS = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "index_topk": 8, "index_head_dim": 16, "index_n_heads": 32, "num_key_value_heads": 4,
    "mlp_layer_types": ["dense", "dense"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "settings", "in_parts"),
    [("deepseek_v32", SELECTS_KEYS, True), ("mamba", {"hidden_size": 32}, False), ("mistral", {}, True)],
)
def test_a_conversation_is_answered_as_transformers_answers(
    model_type: str,
    settings: dict[str, Any],
    in_parts: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second question extends the first; both are longer than what the check reads."""
    monkeypatch.setattr(generation, "PREFILL_CHUNK_TOKENS", 7)
    folder = make_tiny_model(tmp_path / "model")
    model = build(model_type, vocab_size=384, **settings)
    model.save_pretrained(folder)
    quantization = Quantization(method="none", compute_dtype="float32")
    session = load_session(ChatSource(recipe=Recipe(model=Model(id=str(folder)), quantization=quantization)))
    prompt = session.prompt(QUESTION)
    session.ensure_loaded(BASE)
    session.check(BASE, prompt)
    assert not session.warning and (session.prefill_tokens == PREFILL_CHUNK_TOKENS) == in_parts
    cache = session.new_cache()
    for _ in range(2):
        sampling, splitter = replace(GREEDY, max_new_tokens=12), session.splitter(prompt)
        session.end_ids = frozenset()
        for _ in AnswerStream(session, BASE, prompt, cache, sampling, Event(), splitter):
            pass
        answer = cache.token_ids[len(prompt) :]
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(answer),
            do_sample=False,
            eos_token_id=-1,
        )
        assert answer == expected[0, len(prompt) :].tolist()
        prompt = [*cache.token_ids, *READ]


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
