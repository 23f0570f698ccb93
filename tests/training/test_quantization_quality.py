"""The quality of a quantized base, measured layer by layer, is that of the whole model at once."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from qlora_tui.catalog.architecture_types import inner_name
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.errors import UserError
from qlora_tui.memory.quality import NOTABLE_GAIN, Quality, describe_quality, measure_in_child
from qlora_tui.recipe.schema import Data, Model, Quantization, Recipe, Source
from qlora_tui.training import quantization_quality
from qlora_tui.training.compute_device import find_device
from qlora_tui.training.experts.storage import round_to_4_bits
from qlora_tui.training.model import load_base, load_mapped
from qlora_tui.training.quantization_quality import StreamedModel, compare_layers
from qlora_tui.training.samples import Sample, SampleList
from qlora_tui.training.selftest import write_random_model
from qlora_tui.worker import JobStopped, Progress
from tests.training.families import build

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_trainers")]
NF4 = Quantization()


def samples() -> SampleList:
    """Rows of different lengths, the second half of each in the loss."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in (24, 17, 9)]
    masks = [[int(at >= len(row) // 2) for at in range(len(row))] for row in rows]
    return SampleList([Sample(tuple(ids), tuple(mask), None) for ids, mask in zip(rows, masks, strict=True)])


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def measured(folder: Path, settings: Quantization = NF4) -> Quality:
    device = find_device(Recipe())
    architecture = resolve_model(str(folder)).architecture
    return compare_layers(
        load_mapped(folder, device), architecture, settings, samples(), device, lambda *progress: None
    )


def at_once(folder: Path) -> float:
    """The divergence of the whole model with quantized weights, both models in memory."""
    device = find_device(Recipe())
    whole = load_mapped(folder, device).to(device.dtype).eval()
    quantized = copy.deepcopy(whole)
    architecture = resolve_model(str(folder)).architecture
    names = {inner_name(f"{module.name}.weight") for module in architecture.modules if module.quantizable}
    names |= {inner_name(each.name) for each in architecture.parameters if each.is_expert_matrices}
    changed = 0
    for name, parameter in quantized.named_parameters():
        if inner_name(name) in names:
            turned = parameter.data.T if architecture.model_type == "gpt2" else parameter.data
            restored = round_to_4_bits(turned, NF4)
            parameter.data = restored.T if architecture.model_type == "gpt2" else restored
            changed += 1
    assert changed
    total = count = 0.0
    with torch.inference_mode():
        for row in quantization_quality._rows(samples()):
            ids = torch.tensor([row.token_ids])
            logs, others = (
                model(input_ids=ids, use_cache=False).logits[0, row.places].float().log_softmax(-1)
                for model in (whole, quantized)
            )
            total += float((logs.exp() * (logs - others)).sum())
            count += len(row.places)
    return total / count


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3_5_text", "mixtral", "gpt2"])
def test_it_equals_the_comparison_of_whole_models(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = saved(build(model_type), tmp_path)
    quality = measured(folder)
    expected = at_once(folder)
    assert expected > 0 and quality.all_layers.divergence == pytest.approx(expected, rel=3e-3)
    assert quality.tokens == sum(len(row.places) for row in quantization_quality._rows(samples()))


def test_at_most_two_copies_of_a_layer_are_in_memory(tmp_path: Path) -> None:
    folder = saved(build("llama", num_hidden_layers=4), tmp_path)
    device = find_device(Recipe())
    model = load_mapped(folder, device)
    mapped = {name: p.data_ptr() for name, p in model.named_parameters() if "layers." in name}
    streamed = StreamedModel(model, resolve_model(str(folder)).architecture, NF4, device)
    with torch.inference_mode():
        streamed.hidden_states(quantization_quality._rows(samples()), measures_layers=True)
    layer = sum(p.numel() * device.dtype.itemsize for p in streamed.layers[0].parameters())
    assert layer < streamed.peak_layer_bytes <= 2 * layer
    assert {name: p.data_ptr() for name, p in model.named_parameters() if "layers." in name} == mapped


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_layer_with_outliers_is_named(method: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build("llama", num_hidden_layers=4)
    with torch.no_grad():
        for parameter in model.model.layers[2].parameters():
            if parameter.dim() == 2:
                parameter[:, ::16] *= 60
    quality = measured(saved(model, tmp_path), Quantization(method=method))
    assert quality.kept_layers == (2,) and quality.kept_bytes > 0
    if method == "nf4":
        assert quality.gain > NOTABLE_GAIN and "Keeping layer 2 in 16 bits" in describe_quality(quality)[-1]
        # What is taken over into a recipe is what was measured.
        skipping = measured(tmp_path, Quantization(skip=(quality.skip,)))
        assert skipping.all_layers.divergence == pytest.approx(quality.with_kept.divergence, rel=1e-4)


def test_it_runs_in_a_child_that_can_be_stopped(tmp_path: Path) -> None:
    rows = [{"prompt": f"Add {n}.", "completion": f"It is {n}."} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    folder = write_random_model(tmp_path / "model", [str(row) for row in rows], vocab_size=512, **shape)
    recipe = Recipe(
        model=Model(id=str(folder)), data=Data(sources=(Source(path=str(tmp_path / "rows.jsonl")),))
    )
    steps: list[Progress] = []
    quality = measure_in_child(recipe, on_progress=steps.append)
    assert quality.rows > 8 and 0 < quality.all_layers.divergence < 1 and len(quality.layers) == 2
    assert (steps[-1].done, steps[-1].total) == (6, 6)
    with pytest.raises(JobStopped):
        measure_in_child(recipe, should_stop=lambda: True)
    with pytest.raises(UserError, match="Nothing is quantized"):
        measure_in_child(replace(recipe, quantization=Quantization(method="none")))


def test_a_quantization_that_changes_nothing_is_said_to_change_nothing(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            # Each block of 64 holds one value and its negative, which 4 bits represent exactly.
            parameter.copy_(parameter.sign() * 0.5) if parameter.dim() == 2 else None
    quality = measured(saved(model, tmp_path), Quantization(double_quantization=False))
    assert quality.all_layers.divergence < 1e-6 and quality.all_layers.changed == 0


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_skipped_modules_are_loaded_in_16_bits(method: Any, tmp_path: Path) -> None:
    model = build("llama", num_hidden_layers=12, tie_word_embeddings=False)
    folder = saved(model, tmp_path)
    settings = Quantization(method=method, skip=("1.all-linear", "o_proj"))
    recipe = Recipe(model=Model(id=str(folder)), quantization=settings)
    device = find_device(recipe)
    loaded = load_base(folder, recipe, device, "segments")
    plain = {name for name, module in loaded.named_modules() if type(module) is torch.nn.Linear}
    modules = resolve_model(str(folder)).architecture.modules
    assert plain == {"lm_head", *(m.name for m in modules if m.layer == 1 or m.kind == "o_proj")}
    layer = loaded.model.layers[1].mlp.down_proj.weight
    assert torch.equal(layer.float(), model.model.layers[1].mlp.down_proj.weight.to(device.dtype).float())
    with pytest.raises(UserError, match=r'quantization\.skip has "k2_proj"'):
        load_base(folder, replace(recipe, quantization=Quantization(skip=("k2_proj",))), device, "segments")
