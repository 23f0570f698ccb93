"""The estimate as its callers see it, and the timeline of which it is the maximum."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal

import pytest
from msgspec import structs

from qlora_tui.catalog.described import describe
from qlora_tui.cli.estimate import as_json
from qlora_tui.errors import UserError
from qlora_tui.memory import (
    Correction,
    Device,
    cheapest_changes,
    check_fit,
    compare,
    estimate,
    largest_model_size,
    largest_settings,
    trainer_execution,
)
from qlora_tui.memory.activations import attention_kernel, takes_one_call
from qlora_tui.memory.budget import budget_for
from qlora_tui.memory.estimate import ADAPTER_ITEMS, LOADING, Verdict, cached_estimate, step_timeline
from qlora_tui.memory.explain import fit_texts
from qlora_tui.memory.layout import build_layout
from qlora_tui.memory.levels import CUDA_LIBRARIES_BYTES, context_range
from qlora_tui.memory.static_memory import optimizer_step_bytes
from qlora_tui.memory.step import PHASES
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Data, Lora, Quantization, Recipe
from qlora_tui.recipe.training_settings import RecipeOptimizer, Training
from tests.catalog.configs import config
from tests.memory.models import device_with_trace, qwen_7b, tinyllama, traced_peaks
from tests.support.counting import count_estimates

pytestmark = pytest.mark.slow

GIB, MIB = 2**30, 2**20


DEVICES = {
    "growing segments": Device(),
    "fixed segments": Device(expandable_segments=False),
    "a CPU": Device(kind="cpu"),
}
MOST_CALLS = 30_000
"""Calls of functions in one estimate, in about 10 ms."""


def _calls_of_an_estimate(model: dict[str, Any], device: Device) -> int:
    architecture = describe(model)
    calls = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += event == "call"

    cached_estimate.cache_clear()
    sys.setprofile(count)
    try:
        estimate(Recipe(), architecture, device=device)
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_an_estimate_takes_few_calls_of_functions(device: Device) -> None:
    """Of 80 layers, and of layers with all that DeepSeek has."""
    names = ("meta-llama/Llama-3.1-70B", "deepseek-ai/DeepSeek-V2-Lite")
    calls = [_calls_of_an_estimate(config(name), device) for name in names]
    assert min(calls) > 1000 and max(calls) < MOST_CALLS, calls


def test_items_add_up_to_what_must_be_free() -> None:
    for estimated in compare(Recipe(), tinyllama()).values():
        assert sum(item.bytes for item in estimated.items) == estimated.process_bytes
        assert estimated.allocated_bytes <= estimated.reserved_bytes <= estimated.process_bytes


def test_fewer_bits_need_less_memory() -> None:
    estimates = compare(Recipe(), qwen_7b())
    assert estimates["nf4"].process_bytes < estimates["int8"].process_bytes < estimates["fp16"].process_bytes


def test_weights_of_a_7b_model_follow_the_formula() -> None:
    estimated = estimate(Recipe(quantization=Quantization(double_quantization=False)), qwen_7b())
    linear = qwen_7b().linear_params
    assert estimated.bytes_of("weights") == linear // 2
    assert estimated.bytes_of("scales") == pytest.approx(linear / 64 * 4, rel=0.001)


@pytest.mark.parametrize(
    ("key", "small", "large"),
    [
        ("training", Training(micro_batch_size=1), Training(micro_batch_size=4)),
        ("data", Data(max_length=512), Data(max_length=2048)),
        ("lora", Lora(rank=8), Lora(rank=64)),
        ("lora", Lora(target_modules=("q_proj",)), Lora()),
        ("training", Training(), Training(gradient_checkpointing="off")),
        ("training", Training(optimizer="adamw_8bit"), Training(optimizer="adamw")),
    ],
)
def test_more_costs_more(key: str, small: object, large: object) -> None:
    less = estimate(Recipe(**{key: small}), qwen_7b())  # type: ignore[arg-type]  # one section each
    more = estimate(Recipe(**{key: large}), qwen_7b())  # type: ignore[arg-type]
    assert less.process_bytes < more.process_bytes


def test_own_allocator_settings_reach_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    growing = estimate(Recipe(), qwen_7b(), device=budget_for(None, 24 * GIB).device)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    fixed = estimate(Recipe(), qwen_7b(), device=budget_for(None, 24 * GIB).device)
    assert fixed.reserved_bytes > growing.reserved_bytes


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(UserError, match="no_such_proj"):
        estimate(Recipe(lora=Lora(target_modules=("no_such_proj",))), tinyllama())


def test_targets_in_a_range_of_layers_train_only_those() -> None:
    some = estimate(Recipe(lora=Lora(target_modules=("0-10.all-linear",))), tinyllama())
    every = estimate(Recipe(), tinyllama())
    assert some.bytes_of("adapter") * 2 == every.bytes_of("adapter")


@pytest.mark.parametrize(
    ("needed_gib", "used_gib", "is_exact", "can_train", "longest", "shortest"),
    [
        (6.4, 9.5, True, True, "fits: uses ~9.5 of 12.0 GiB (here), needs at least 6.4", "uses ~9.5"),
        (
            0.5,
            1.3,
            False,
            False,
            "would fit: uses ~1.3 of 12.0 GiB (here), needs at least ~512 MiB",
            "uses ~1.3",
        ),
        (6.4, 6.4, True, True, "fits: uses 6.4 of 12.0 GiB (here)", "uses 6.4"),
        (6.4, 0.0, False, True, "fits: needs ~6.4 of 12.0 GiB (here)", "needs ~6.4"),
        (13.1, 13.1, False, True, "does not fit: needs ~13.1 of 12.0 GiB (here)", "needs ~13.1"),
    ],
)
def test_a_verdict_says_what_a_run_uses_and_what_it_needs_at_least(
    needed_gib: float, used_gib: float, is_exact: bool, can_train: bool, longest: str, shortest: str
) -> None:
    needed, used = round(needed_gib * GIB), round(used_gib * GIB)
    word: Literal["fits", "does not fit"] = "fits" if needed_gib < 12 else "does not fit"
    verdict = Verdict(word, needed, needed, needed, 12 * GIB, "", is_exact, used)
    texts = fit_texts(verdict, "here", can_train=can_train)
    assert texts[0] == longest and texts[-1].endswith(f"{shortest} of 12.0 GiB")


def test_it_fits_only_when_the_whole_band_does() -> None:
    estimated = estimate(Recipe(), qwen_7b())
    assert check_fit(estimated, 2 * estimated.process_bytes).word == "fits"
    assert check_fit(estimated, estimated.process_bytes).word == "uncertain"
    assert check_fit(estimated, estimated.band.low_bytes - 1).word == "does not fit"


def test_a_wide_band_is_not_tight_where_a_narrow_one_fits() -> None:
    wide = estimate(Recipe(), qwen_7b())
    narrow = replace(wide, band=replace(wide.band, high_bytes=wide.process_bytes + 1))
    least = wide.process_bytes * 100 // 95 + 1
    assert wide.band.high_bytes > least
    assert [check_fit(each, least).word for each in (wide, narrow)] == ["uncertain", "fits"]
    assert check_fit(wide, wide.band.high_bytes).word == "fits"
    assert check_fit(narrow, least - 2).word == "tight"


def test_what_fits_fits_and_the_next_size_does_not() -> None:
    recipe, model, gpu = Recipe(), qwen_7b(), 12 * GIB
    largest = largest_settings(recipe, model, gpu)
    at = Recipe(data=Data(max_length=largest.sequence_length))
    beyond = Recipe(data=Data(max_length=largest.sequence_length + 128))
    assert check_fit(estimate(at, model), gpu).fits_even_if_tight
    assert not check_fit(estimate(beyond, model), gpu).fits_even_if_tight
    assert check_fit(
        estimate(Recipe(training=Training(micro_batch_size=largest.micro_batch)), model), gpu
    ).fits_even_if_tight


def test_a_larger_gpu_fits_a_larger_class_of_model() -> None:
    labels = [largest_model_size(Recipe(), size * GIB) for size in (1, 8, 24, 48)]
    assert labels == [None, "7B", "32B", "72B"]


@pytest.mark.slow
def test_nothing_fits_on_a_gpu_smaller_than_the_weights() -> None:
    largest = largest_settings(Recipe(), qwen_7b(), 2 * GIB)
    assert (largest.sequence_length, largest.micro_batch, largest.rank) == (0, 0, 0)
    assert cheapest_changes(Recipe(), qwen_7b(), 2 * GIB) == ()
    report = as_json(Recipe(), qwen_7b(), 2 * GIB, Device())
    assert report["cheapest_changes"] == [] and report["least_bytes"] > 2 * GIB
    first, *_ = cheapest_changes(Recipe(), qwen_7b(), report["least_bytes"] + GIB)
    assert first.fits and first.estimate.total_bytes >= report["least_bytes"]


def test_the_cheapest_change_keeps_the_effective_batch() -> None:
    recipe = Recipe(data=Data(max_length=4096), training=Training(micro_batch_size=8))
    first, *others = cheapest_changes(recipe, qwen_7b(), 12 * GIB)
    assert first.recipe.effective_batch == recipe.effective_batch
    assert all(change.fits for change in (first, *others))


def test_several_changes_are_taken_together_when_one_is_not_enough() -> None:
    recipe = Recipe(data=Data(max_length=8192), training=Training(micro_batch_size=64))
    (only,) = cheapest_changes(recipe, qwen_7b(), 7 * GIB)
    assert ";" in only.label
    assert only.fits


@pytest.mark.parametrize(
    ("name", "most", "why"),
    [
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 2048, "learned poorly"),
        ("openai-community/gpt2", 1024, "makes the run fail"),
        ("facebook/opt-1.3b", 2048, "makes the run fail"),
    ],
)
def test_samples_beyond_the_models_context_are_warned_of(name: str, most: int, why: str) -> None:
    model = describe(config(name))
    assert as_json(Recipe(data=Data(max_length=most)), model, GIB, Device())["warnings"] == []
    (said,) = as_json(Recipe(data=Data(max_length=most + 1)), model, GIB, Device())["warnings"]
    assert why in said and f"Set the sequence length (data.max_length) to {most:,} or less" in said


def test_a_cpu_run_has_no_cuda_context() -> None:
    estimated = estimate(Recipe(), tinyllama(), device=Device(kind="cpu"))
    assert estimated.bytes_of("context") == 0
    assert estimated.bytes_of("runtime") > 0 and estimated.bytes_of("kernels") == 0
    assert estimated.execution.compute_itemsize == 4


@pytest.mark.parametrize(("optimizer", "itemsize"), [("paged_adamw_8bit", 20), ("lion", 12), ("adamw", 0)])
def test_steps_of_bitsandbytes_on_a_cpu_are_counted(optimizer: RecipeOptimizer, itemsize: int) -> None:
    recipe = Recipe(lora=Lora(train_embeddings=True), training=Training(optimizer=optimizer))
    architecture, cpu = qwen_7b(), Device(kind="cpu")
    execution = trainer_execution(recipe, cpu, architecture)
    step = optimizer_step_bytes(build_layout(recipe, architecture, execution))
    assert step == pytest.approx(itemsize * architecture.head.weight_params, abs=512)
    phase = estimate(replace_setting(recipe, "data.max_length", 128), architecture, device=cpu).peak_phase
    assert (phase == "optimizer step") == bool(itemsize)
    on_gpu = trainer_execution(recipe, Device(), architecture)
    assert not optimizer_step_bytes(build_layout(recipe, architecture, on_gpu))


def test_a_cuda_build_of_torch_costs_memory_on_cpus_only() -> None:
    plain, built = (
        [
            estimate(Recipe(), tinyllama(), device=Device(kind="cpu", cuda_libraries=libraries)),
            estimate(Recipe(), tinyllama(), device=Device(kind="cuda", cuda_libraries=libraries)),
        ]
        for libraries in (False, True)
    )
    more = built[0].process_bytes - plain[0].process_bytes
    assert more == built[0].bytes_of("runtime") - plain[0].bytes_of("runtime") == CUDA_LIBRARIES_BYTES
    assert built[1].process_bytes == plain[1].process_bytes


def test_a_bfloat16_cpu_holds_one_kernel_per_shape() -> None:
    device = Device(kind="cpu", native_bfloat16=True)
    fuller = Training(micro_batch_size=8, gradient_checkpointing="off")  # than while it is loaded
    some, more, most = (
        estimate(Recipe(data=data, training=fuller), tinyllama(), device=device).bytes_of("kernels")
        for data in (
            Data(max_length=512),
            Data(max_length=1024),
            Data(max_length=1024, packing=False),  # rows of every length
        )
    )
    assert 0 < some < more < most


def test_json_has_the_documented_shape() -> None:
    report = as_json(Recipe(), tinyllama(), 8 * GIB, Device())
    nf4 = report["precisions"]["nf4"]
    assert set(report["precisions"]) == {"nf4", "int8", "fp16"}
    assert nf4["total_bytes"] == sum(nf4["items"].values()) == nf4["tiers"]["process"]
    assert nf4["verdict"] == "fits"
    assert report["what_fits"]["sequence_length"] > 1024


def test_an_estimate_is_calculated_once() -> None:
    model = qwen_7b()
    cached_estimate.cache_clear()
    assert count_estimates(lambda: estimate(Recipe(), model)) == 1
    assert count_estimates(lambda: estimate(Recipe(), model)) == 0
    patterned = Recipe(lora=Lora(rank_pattern={"q_proj": 64}))
    assert estimate(patterned, model).process_bytes > estimate(Recipe(), model).process_bytes


def test_it_needs_no_machine_learning_library() -> None:
    code = "import sys, qlora_tui.memory; print(*{'torch', 'numpy', 'transformers'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == ""


def test_one_call_per_row_needs_no_copies_of_samples() -> None:
    recipe = Recipe(training=Training(micro_batch_size=8, gradient_checkpointing="off"))
    model = describe(config("meta-llama/Llama-3.1-8B"))
    one_call, by_sample = (estimate(recipe, model, device=Device(varlen=varlen)) for varlen in (True, False))
    assert one_call.execution.varlen and not by_sample.execution.varlen
    assert one_call.allocated_bytes < by_sample.allocated_bytes
    turing = estimate(recipe, model, device=Device(capability=(7, 5)))
    assert not turing.execution.varlen


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_triton_kernels_need_no_temporary_copies(checkpointing: Any) -> None:
    recipe = Recipe(training=Training(gradient_checkpointing=checkpointing))
    model = describe(config("meta-llama/Llama-3.1-8B"))
    by_torch, by_triton = (estimate(recipe, model, device=Device(triton=triton)) for triton in (False, True))
    assert by_triton.execution.triton and by_triton.allocated_bytes <= by_torch.allocated_bytes
    never = replace_setting(recipe, "model.kernels", "torch")
    assert estimate(never, model, device=Device(triton=True)).allocated_bytes == by_torch.allocated_bytes


def test_a_peak_while_loading_itemizes_the_training_step() -> None:
    device = Device(kind="cpu")
    few = Recipe(data=Data(max_length=16), training=Training(micro_batch_size=1))
    more = replace_setting(few, "lora.rank", 2 * few.lora.rank)
    first, second = (estimate(recipe, tinyllama(), device=device) for recipe in (few, more))
    assert first.peak_phase == second.peak_phase == LOADING
    assert second.bytes_of("adapter") == 2 * first.bytes_of("adapter") > 0
    assert first.bytes_of("optimizer") > 0
    assert first.step_bytes < second.step_bytes < second.total_bytes == first.total_bytes
    assert sum(item.bytes for item in first.items) == first.total_bytes


@pytest.mark.parametrize(
    ("model", "length", "gib"), [("Qwen/Qwen3-30B-A3B", 2048, 24), ("openai/gpt-oss-20b", 1024, 16)]
)
@pytest.mark.parametrize("adapted", [(), ("experts.gate_up_proj", "experts.down_proj")])
def test_mixtures_fit_with_4_bit_experts(model: str, length: int, gib: int, adapted: tuple[str, ...]) -> None:
    recipe = Recipe(
        lora=Lora(rank=8, target_modules=("all-linear", *adapted)),
        data=Data(max_length=length),
        training=Training(micro_batch_size=1),
    )
    architecture = describe(config(model))
    packed = estimate(recipe, architecture)
    assert packed.process_bytes < 0.95 * gib * GIB and not packed.notes
    (sentence,) = (item.explanation for item in packed.items if item.key == "experts")
    assert "0.5 byte" in sentence
    wide = estimate(replace_setting(recipe, "quantization.experts", False), architecture)
    assert wide.process_bytes > 2 * packed.process_bytes
    assert wide.notes == ("The experts stay in 16 bits: quantization.experts is off.",)


def test_experts_without_a_gate_are_estimated() -> None:
    mixture = describe(config("Qwen/Qwen3-30B-A3B"))
    ungated = structs.replace(
        mixture,
        parameters=tuple(
            structs.replace(each, name=each.name.replace("gate_up_proj", "up_proj"))
            for each in mixture.parameters
        ),
    )
    # Which stay in 16 bits in training.
    assert estimate(Recipe(), ungated).process_bytes > 2 * estimate(Recipe(), mixture).process_bytes
    adapted = Recipe(lora=Lora(target_modules=("all-linear", "experts.down_proj")))
    assert estimate(adapted, ungated).process_bytes > estimate(Recipe(), ungated).process_bytes


def test_targets_that_only_a_vision_tower_has_are_not_offered() -> None:
    model = qwen_7b()
    seen = tuple(structs.replace(m, part="vision") if m.kind == "q_proj" else m for m in model.modules)
    changes = cheapest_changes(Recipe(), structs.replace(model, modules=seen), GIB)
    assert all("lora.target_modules" not in change.settings for change in changes)


def test_frozen_embeddings_are_offered_where_they_are_trained() -> None:
    trained = Recipe(lora=Lora(train_embeddings=True))
    architecture, offer = qwen_7b(), "Train embeddings off"
    more = estimate(trained, architecture).process_bytes - estimate(Recipe(), architecture).process_bytes
    # Two matrices and their gradients, in fp32; paged states are not in the memory of the GPU.
    assert more > 2 * architecture.head.weight_params * 8
    labels = [change.label for change in cheapest_changes(trained, architecture, 12 * GIB)]
    assert any(offer in label for label in labels)
    assert all(offer not in change.label for change in cheapest_changes(Recipe(), architecture, 5 * GIB))


def test_quantized_experts_are_offered_where_they_are_not() -> None:
    recipe = Recipe(quantization=Quantization(experts=False), data=Data(max_length=1024))
    architecture = describe(config("Qwen/Qwen3-30B-A3B"))
    changes = cheapest_changes(recipe, architecture, 24 * GIB)
    assert any(change.fits and change.settings == {"quantization.experts": True} for change in changes)
    dense = cheapest_changes(recipe, qwen_7b(), 6 * GIB)
    assert not any("quantization.experts" in change.settings for change in dense)


def test_states_that_cannot_be_paged_are_in_torchs_memory() -> None:
    recipe = Recipe(training=Training(optimizer="paged_adamw_8bit"))
    paged, unpaged = (
        estimate(recipe, qwen_7b(), device=Device(managed_memory=managed)) for managed in (True, False)
    )
    states = paged.bytes_of("optimizer")
    assert unpaged.bytes_of("optimizer") == states > 0
    assert unpaged.allocated_bytes == paged.allocated_bytes + states


def test_the_backward_of_one_call_pads_each_sample() -> None:
    recipe, architecture = Recipe(), qwen_7b()
    execution = trainer_execution(recipe, Device(), architecture)
    # So many that the sums of the gradient of the queries are the peak.
    many, more = (
        estimate(recipe, architecture, execution=replace(execution, samples=samples))
        for samples in (10_000, 11_000)
    )
    rows = 1000 * 128 * architecture.heads
    grown = more.allocated_bytes - many.allocated_bytes
    assert grown == pytest.approx(rows * (architecture.head_dim + 1) * 4, rel=1e-3)


@pytest.mark.parametrize(("capability", "kernel"), [((8, 0), "flash"), ((8, 9), "efficient")])
def test_heads_that_flash_does_not_train_use_another_kernel(capability: tuple[int, int], kernel: str) -> None:
    architecture = structs.replace(qwen_7b(), heads=16, head_dim=224)
    execution = trainer_execution(Recipe(), Device(capability=capability), architecture)
    layout = build_layout(Recipe(), architecture, execution)
    heads = layout.layers[0].heads
    assert heads and attention_kernel(layout, heads) == kernel
    assert takes_one_call(layout) == (kernel == "flash")


@pytest.mark.parametrize(
    ("capability", "multiprocessors", "low", "expected", "high"),
    [
        pytest.param((7, 5), 40, 125, 140, 155, id="T4, measured 133 to 147"),
        pytest.param((8, 0), 108, 325, 522, 543, id="A100, measured 522"),
        pytest.param((8, 6), 28, 89, 190, 291, id="RTX 3060"),
        pytest.param((8, 9), 128, 384, 495, 606, id="RTX 4090"),
        pytest.param((9, 0), 132, 396, 507, 618, id="H100"),
        pytest.param((12, 0), 170, 508, 623, 738, id="RTX 5090"),
        pytest.param((8, 6), None, 125, 141, 467, id="an RTX 30 with any number"),
        pytest.param((10, 3), None, 125, 141, 541, id="a GPU that is not known"),
    ],
)
def test_the_context_grows_with_the_multiprocessors(
    capability: tuple[int, int], multiprocessors: int | None, low: int, expected: int, high: int
) -> None:
    device = Device(capability=capability, multiprocessors=multiprocessors)
    execution = trainer_execution(Recipe(), device)
    assert [size // MIB for size in context_range(execution)] == [low, expected, high]
    estimated = estimate(Recipe(), qwen_7b(), device=device)
    assert estimated.bytes_of("context") // MIB == expected
    assert f"a CUDA context of {low}" in estimated.band.reason
    assert estimated.bytes_of("workspace") == 2 * (32 * MIB if capability == (9, 0) else 8_519_680)


NAMES = ("Qwen/Qwen2.5-0.5B", "google/gemma-2-2b", "mistralai/Mixtral-8x7B-v0.1", "openai-community/gpt2")
RECIPES = {
    "default": Recipe(),
    "short": Recipe(data=Data(max_length=128)),
    "no accumulation": Recipe(training=Training(gradient_accumulation=1, optimizer="adamw")),
    "all kept": Recipe(training=Training(gradient_checkpointing="off", micro_batch_size=4)),
    "int8": Recipe(quantization=Quantization(method="int8")),
    "16 bits": Recipe(quantization=Quantization(method="none"), lora=Lora(rank=64, dropout=0.1)),
}


@pytest.mark.parametrize("device", [Device(), Device(kind="cpu")], ids=["gpu", "cpu"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_its_maximum_is_the_estimate_and_its_phase(recipe: Recipe, name: str, device: Device) -> None:
    architecture = describe(config(name))
    estimated = estimate(recipe, architecture, device=device)
    moments = step_timeline(recipe, architecture, estimated)
    fullest = max(moments, key=lambda moment: moment.total_bytes)
    assert fullest.total_bytes == estimated.process_bytes
    assert fullest.name == estimated.peak_phase
    step = max((m for m in moments if m.phase != LOADING), key=lambda moment: moment.total_bytes)
    for item in estimated.items:
        if item.key in ("activations", "checkpoints", *ADAPTER_ITEMS, "weights", "logits"):
            assert step.items[item.key] == item.bytes, item.key


def test_phases_follow_in_order_with_every_layer() -> None:
    architecture = qwen_7b()
    moments = step_timeline(Recipe(), architecture, estimate(Recipe(), architecture))
    grouped = [(phase, list(part)) for phase, part in groupby(moments, lambda moment: moment.phase)]
    assert tuple(phase for phase, _ in grouped) == PHASES
    numbers = {phase: len(part) for phase, part in grouped}
    assert numbers["forward"] == numbers["backward"] == architecture.layers
    first = next(moment for moment in moments if moment.phase == "backward")
    assert first.name == f"backward of layer {architecture.layers - 1}"
    assert all(size > 0 for moment in moments for size in moment.items.values())


def test_kept_activations_rise_in_forward_and_fall_in_backward() -> None:
    recipe = Recipe(training=Training(gradient_checkpointing="off"))
    architecture = qwen_7b()
    moments = step_timeline(recipe, architecture, estimate(recipe, architecture))
    forward = [m.total_bytes for m in moments if m.phase == "forward"]
    backward = [m.total_bytes for m in moments if m.phase == "backward"]
    assert forward == sorted(forward) and backward == sorted(backward, reverse=True)


def test_a_traced_step_has_the_traced_peak() -> None:
    recipe, architecture = Recipe(), qwen_7b()
    traced = traced_peaks(forward_bytes=2 << 30, backward_bytes=3 << 30)
    execution = trainer_execution(recipe, Device(), architecture)
    device = device_with_trace(recipe, architecture, execution, traced)
    estimated = estimate(recipe, architecture, device=device)
    assert estimated.peak_phase == "backward of layer 0"
    assert (estimated.allocated_bytes, estimated.reserved_bytes) == (4 << 30, 5 << 30)
    moments = step_timeline(recipe, architecture, estimated, traced)
    assert max(moment.total_bytes for moment in moments) == estimated.process_bytes
    forward, backward = (next(m for m in moments if m.phase == p) for p in ("forward", "backward"))
    assert backward.total_bytes - forward.total_bytes == 1 << 30


def test_a_correction_by_past_runs_is_part_of_the_overhead() -> None:
    device = Device(correction=Correction(runs=3, factor=1.2, low=0.9, high=1.1, outside_bytes=1 << 30))
    estimated = estimate(Recipe(), qwen_7b(), device=device)
    moments = step_timeline(Recipe(), qwen_7b(), estimated)
    assert max(moment.total_bytes for moment in moments) == estimated.process_bytes


def test_several_gpus_hold_gradients_in_the_buckets_of_ddp() -> None:
    once = Recipe(training=Training(gradient_accumulation=1, optimizer="adamw"))
    alone, together, accumulated = (
        estimate(replace_setting(once, f"training.{name}", value), qwen_7b())
        for name, value in (("gpus", 1), ("gpus", 2), ("gradient_accumulation", 2))
    )
    assert alone.allocated_bytes < together.allocated_bytes == accumulated.allocated_bytes
