"""The estimate against published measurements of transformers and peft (a part of the table in use)."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from bench import estimator
from bench.published_rows import Unplaced, read_execution
from tests.catalog.configs import CONFIGS

TABLE = Path(__file__).parent / "measured.csv"


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return estimator.run(TABLE, CONFIGS)


@pytest.mark.slow
def test_every_row_is_placed(result: dict[str, Any]) -> None:
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert result["unplaced"] == []
    assert len(result["rows"]) == len(rows)


@pytest.mark.slow
def test_errors_average_below_half_and_never_reach_minus_three_percent(result: dict[str, Any]) -> None:
    figures = result["summary"]
    assert figures["mean_pct"] < 0.5
    assert figures["worst_over_pct"] < 1
    assert figures["worst_under_pct"] > -3


@pytest.mark.slow
def test_no_run_out_of_memory_was_predicted_to_fit(result: dict[str, Any]) -> None:
    assert len(result["out_of_memory"]) == 2
    assert all(row["said_it_would_not_fit"] for row in result["out_of_memory"])
    assert result["ran_but_said_not_to_fit"] == []


def test_an_unmatchable_row_is_listed_with_its_reason(tmp_path: Path) -> None:
    lines = TABLE.read_text().splitlines()
    table = tmp_path / "table.csv"
    table.write_text("\n".join((lines[0], lines[1].replace("Qwen/Qwen2.5-1.5B-Instruct", "no/such-model"))))
    result = estimator.run(table, CONFIGS)
    assert result["rows"] == []
    assert result["unplaced"][0]["why"] == "no config for no/such-model"


@pytest.mark.slow
@pytest.mark.parametrize("id_", ["m071", "m093", "m098", "m101", "m137", "m143"])
def test_rows_of_older_versions_match_within_4_in_10_000(id_: str, result: dict[str, Any]) -> None:
    (row,) = (row for row in result["rows"] if row["id"] == id_)
    assert abs(row["error_pct"]) < 0.04, row


def test_bias_is_signed_and_low_estimates_are_counted() -> None:
    summary = estimator._summary([1.0, -4.0, None])
    assert summary["bias_pct"] == -1.5 and summary["mean_pct"] == 2.5
    assert summary["under_by_more_than_3_pct"] == 1 and summary["rows"] == 2


def _row(**changes: str) -> dict[str, str]:
    """The first row of the table, on another code path."""
    with TABLE.open(newline="") as file:
        return next(csv.DictReader(file)) | changes


@pytest.mark.parametrize(
    ("column", "text", "field", "value"),
    [
        ("optimizer", "adamw_bnb_8bit", "optimizer", "adamw_8bit"),
        ("optimizer", "paged_adamw_32bit", "optimizer", "paged_adamw_32bit"),
        ("optimizer", "paged_adamw_8bit", "optimizer", "paged_adamw_8bit"),
        ("optimizer", "adamw_torch_fused", "optimizer", "adamw_fused"),
        ("attention", "sdpa", "attention", "efficient"),  # the row's GPU has no flash kernel
        ("attention", "flash_attention_2", "attention", "flash"),
        ("attention", "sdpa(math)", "attention", "math"),
        ("grad_ckpt", "false", "checkpointing", False),
        ("grad_ckpt", "On", "checkpointing", True),
        ("grad_ckpt", "", "checkpointing", False),
        ("extra", "use_reentrant=False", "reentrant", False),
        ("extra", "use_reentrant=True", "reentrant", True),
        ("extra", "no prepare_model_for_kbit_training", "cast_to_float32", False),
        ("extra", "HF Trainer; bf16", "autocast", True),
        ("extra", "transformers==4.45.2", "transformers", (4, 45)),
        ("extra", "torch2.10+cu128/transformers5.0/peft0.19", "transformers", (5, 0)),
        ("attention", "sdpa", "sdpa", True),
        ("attention", "flash_attention_2", "sdpa", False),
        ("attention", "eager", "sdpa", False),
        ("attention", "", "sdpa", True),
        ("attention", "sdpa(flash)", "sdpa", True),
        ("gpu", "A100 80GB", "capability", (8, 0)),
        ("gpu", "H100 80GB", "capability", (9, 0)),
        ("gpu", "RTX 3090 24GB", "capability", (8, 6)),
        ("extra", "reentrant ckpt", "reentrant", True),
        ("extra", "non-reentrant ckpt", "reentrant", False),
        ("extra", "HF default loss (no chunking)", "loss", "stock"),
        ("extra", "qlora-tui 0.9", "loss", "chunked"),
        ("extra", "QLoRA without fp32 upcast", "cast_to_float32", False),
        ("extra", "norms, embedding and head with fp32 upcast", "cast_to_float32", True),
        ("extra", "bnb_4bit_compute_dtype=torch.float32", "compute_itemsize", 4),
        ("extra", "compute bfloat16", "float16", False),
        ("extra", "compute fp16", "float16", True),
        ("extra", "LoRA bf16", "adapter_itemsize", 2),
        ("extra", "gradient_accumulation_steps=8", "accumulates", True),
        ("extra", "expandable_segments:True", "expandable_segments", True),
    ],
)
def test_a_row_is_read_by_its_words(column: str, text: str, field: str, value: object) -> None:
    _, execution = read_execution(_row(**{column: text}))
    assert getattr(execution, field) == value


@pytest.mark.parametrize(
    ("column", "text", "why"),
    [
        ("quant", "gptq-4bit", "gptq"),
        ("optimizer", "lion_8bit", "lion_8bit"),
        ("optimizer", "galore_adamw", "galore_adamw"),
        ("optimizer", "sgd", "sgd"),
        ("attention", "flex_attention", "flex"),
        ("extra", "torch.compile; bf16", "compiled"),
        ("extra", "DeepSpeed ZeRO-3", "several GPUs"),
        ("extra", "Unsloth 2025.1", "Unsloth"),
        ("extra", "FOAK: fused kernels; HF Trainer", "kernels of other"),
        ("extra", "HF Trainer; use_liger_kernel", "kernels of other"),
        ("extra", "TRL 0.22; bf16 compute", "TRL"),
        ("extra", "bf16 compute; chunked loss", "chunks"),
        ("lora_r", "", "whole model"),
        ("extra", "2 GPUs; bf16", "several GPUs"),
        ("gpu", "2x A100 80GB", "several GPUs"),
        ("gpu", "A100 80GB x 4", "several GPUs"),
        ("extra", "LLaMA-Factory", "engine"),
        ("extra", "TRL DPO", "supervised"),
        ("extra", "modules_to_save=lm_head", "more than an adapter"),
        ("seq_len", "dataset", "the longest batch decides"),
        ("grad_ckpt", "every 2nd layer", "grad_ckpt"),
    ],
)
def test_code_that_is_not_modeled_says_why(column: str, text: str, why: str) -> None:
    with pytest.raises(Unplaced, match=why):
        read_execution(_row(**{column: text}))


@pytest.mark.parametrize(
    ("text", "dropout"), [("lora_dropout: 0.1; x", 0.1), ("dropout=.05.", 0.05), ("no dropout", 0.0)]
)
def test_dropout_is_read_however_it_is_written(text: str, dropout: float) -> None:
    recipe, _ = read_execution(_row(extra=text))
    assert recipe.lora.dropout == dropout


@pytest.mark.parametrize(
    ("words", "autocast", "held"),
    [
        ("plain loop; compute bf16", False, True),
        ("HF Trainer; compute bf16", False, False),
        ("HF Trainer; bf16=True", True, False),
        ("LoRA fp32 by autocast_adapter_dtype; fp16 compute", False, True),
    ],
)
def test_16_bit_weights_use_autocast_only_where_the_trainer_did(
    words: str, autocast: bool, held: bool
) -> None:
    _, execution = read_execution(_row(extra=words, quant="none(bf16)", double_quant="", source_url=""))
    assert (execution.autocast, execution.logits_alive_in_backward) == (autocast, held)


def test_one_gpu_of_a_numbered_series_is_one_gpu() -> None:
    for gpu in ("RTX 3090 24GB", "GTX 1080", "NVIDIA RTX A6000 48GB", "1x A100 80GB"):
        read_execution(_row(gpu=gpu))


def test_units_and_out_of_memory_words_ignore_case(tmp_path: Path) -> None:
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))[:4]
    words = (("7,180", " MB"), ("OOM ", "GiB"), ("Out of memory", ""), ("6.69", "gib"))
    table = tmp_path / "table.csv"
    with table.open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        for row, (measured, unit) in zip(rows, words, strict=True):
            writer.writerow(row | {"measured_gb": measured, "unit": unit})
    result = estimator.run(table, CONFIGS)
    assert result["unplaced"] == [] and len(result["out_of_memory"]) == 2
    assert result["rows"][0]["measured_bytes"] == 7_180_000_000


def test_the_words_of_a_row_decide_the_recipe_too() -> None:
    words = "lora_dropout=0.05; DoRA; gradient accumulation 4"
    recipe, _ = read_execution(_row(extra=words, quant="nf4+dq", targets="all linear"))
    assert recipe.lora.target_modules == ("all-linear",)
    assert (recipe.lora.dropout, recipe.lora.use_dora) == (0.05, True)
    assert recipe.quantization.double_quantization
    assert recipe.training.gradient_accumulation == 4
