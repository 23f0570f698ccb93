"""What transformers' versions did differently, and that the walk follows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from msgspec import structs

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.memory import estimate
from qlora_tui.memory.execution import ExecutionConfig, Version
from qlora_tui.memory.layers import build_layout
from qlora_tui.memory.step import profile_step
from qlora_tui.recipe.schema import Data, Lora, Quantization, Recipe, Training
from tests.catalog.configs import config

RECIPE = Recipe(
    lora=Lora(target_modules=("q_proj", "v_proj")),
    data=Data(max_length=1024, packing=False),
    training=Training(micro_batch_size=2),
)
LOGITS = 2 * 1024 * 32000
STOCK = ExecutionConfig(loss="stock", reentrant=True, expandable_segments=False)


def _loss_bytes(name: str, version: Version) -> int:
    """Of the logits and all that comes of them, at the fullest moment of the loss's forward."""
    execution = replace(STOCK, transformers=version)
    layout = build_layout(RECIPE, parse_architecture(config(name)), execution)
    return profile_step(layout).head.forward["logits"]


def test_each_loss_holds_the_copies_its_code_makes() -> None:
    name, row = "mistralai/Mistral-7B-v0.1", 2 * 32000
    # log-softmax; the 16-bit logits; the logits in 32 bits; a copy without each sample's last position
    shifted = 4 * (LOGITS - row)
    assert _loss_bytes(name, (4, 49)) == pytest.approx((4 + 2 + 4) * LOGITS, abs=2048)
    assert _loss_bytes(name, (4, 48)) == pytest.approx((2 + 4) * LOGITS + 2 * shifted, abs=2048)
    assert _loss_bytes(name, (4, 45)) == pytest.approx(4 * LOGITS + 2 * shifted, abs=2048)


@pytest.mark.parametrize(
    ("version", "code"),
    [((4, 45), "rebound"), ((4, 48), "shifted"), ((5, 24), "padded")],
)
def test_the_loss_is_that_of_the_version(version: Version, code: str) -> None:
    assert replace(STOCK, transformers=version).loss_code == code


def test_granites_scaled_logits_are_no_copy_more_before_4_48() -> None:
    name, logits = "ibm-research/PowerLM-3b", 2 * 1024 * 49152
    assert _loss_bytes(name, (4, 45)) == pytest.approx(12 * logits, rel=0.001)
    assert _loss_bytes(name, (4, 48)) == pytest.approx(14 * logits, rel=0.001)


def test_experts_are_modules_of_their_own_before_version_5() -> None:
    assert replace(STOCK, transformers=(4, 57)).separate_experts
    assert not replace(STOCK, transformers=(5, 0)).separate_experts


def test_hopper_has_larger_workspaces_and_an_a100_a_larger_context() -> None:
    estimates = {
        capability: estimate(RECIPE, parse_architecture(config("Qwen/Qwen2.5-0.5B")), execution=execution)
        for capability in ((8, 0), (8, 6), (9, 0))
        for execution in (replace(STOCK, capability=capability),)
    }
    assert estimates[9, 0].bytes_of("workspace") == 2 * 32 * 2**20
    assert estimates[8, 6].bytes_of("workspace") == 2 * 8_519_680
    assert (
        estimates[8, 0].bytes_of("context") == 522 * 2**20
        and estimates[8, 6].bytes_of("context") == 141 * 2**20
    )
    assert estimates[8, 0].process_bytes - estimates[8, 0].reserved_bytes == 522 * 2**20


def test_flash_attention_caps_gemmas_scores_without_making_them() -> None:
    def scores(execution: ExecutionConfig) -> int:
        layout = build_layout(RECIPE, parse_architecture(config("google/gemma-2-2b")), execution)
        return profile_step(layout).layers[0].backward.get("scores", 0)

    assert scores(STOCK) == 0
    assert scores(replace(STOCK, own_fused=True)) > 0  # ours, sample by sample
    assert scores(replace(STOCK, attention="eager")) > 0


def test_a_head_in_float32_is_cast_under_autocast_and_saved() -> None:
    name, head = "mistralai/Mistral-7B-v0.1", 32000 * 4096
    heads = []
    for autocast in (False, True):
        execution = replace(STOCK, cast_to_float32=True, autocast=autocast, transformers=(5, 0))
        layout = build_layout(RECIPE, parse_architecture(config(name)), execution)
        heads.append(profile_step(layout).head)
    assert [part.forward.get("head", 0) for part in heads] == [0, 2 * head]
    assert heads[1].retained["head"] == 2 * head
    # Logits in 32 bits, the same for the loss, and log-softmax; or first in 16 bits
    assert heads[0].forward["logits"] == pytest.approx(8 * LOGITS, rel=0.001)
    assert heads[1].forward["logits"] == pytest.approx(10 * LOGITS, rel=0.001)


def test_under_autocast_peft_casts_inputs_of_16_bit_weights() -> None:
    casts = {}
    for method in ("none", "nf4"):
        recipe = structs.replace(
            RECIPE,
            quantization=Quantization(method=method),
            data=Data(max_length=768),
        )
        execution = replace(STOCK, autocast=True)
        layout = build_layout(recipe, parse_architecture(config("mistralai/Mistral-7B-v0.1")), execution)
        events = profile_step(layout).layers[0].recording.forward.events
        casts[method] = sum(size == 4 * 2 * 768 * 4096 for _, size in events)
    # Those of the norms in both; of the two adapted modules in 16 bits alone.
    assert casts["none"] - casts["nf4"] == 2
