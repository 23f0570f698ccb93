"""What a row of published measurements says: which recipe ran, and over which code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from qlora_tui.memory import CodePath
from qlora_tui.memory.codepath import Optimizer
from qlora_tui.recipe.schema import Data, Lora, Quantization, Recipe, Training

Row = dict[str, str]


class Unplaced(Exception):
    """A row whose code path or model cannot be told."""


def read_path(row: Row) -> tuple[Recipe, CodePath]:
    """The recipe and code path of a row, from its columns and the words in ``extra``.

    * ``prepare_model_for_kbit_training``: norms, embedding and head in float32 (``cast_to_float32``), unless
      ``peft_module_casting_to_bf16`` follows: then norms only.
    * ``Trainer`` or ``TRL`` benchmarks (fms-acceleration, transformers 4.4x): reentrant checkpointing,
      shifted logits, experts as separate modules; autocast where a 4-bit model ran with ``bf16=True``.
    * ``FOAK`` or ``fused``: fused RMSNorm, rotary, cross-entropy and (on 4-bit weights) LoRA kernels.
    * fitcheck's own measurements call ``out = model(…); out.loss.backward()``: the logits stay referred to.
    * ``liger``: fused linear cross-entropy. ``unsloth`` changes too much to be placed.
    """
    extra = row["extra"].lower()
    if "unsloth" in extra:
        raise Unplaced("Unsloth's own layers are not walked")
    method = _method(row["quant"])
    quantized = method != "none"
    trl_cast = "peft_module_casting" in extra
    fms = "fms-acceleration" in row.get("source_url", "") or "hf trainer" in extra or trl_cast
    fused = "foak" in extra or "fused" in extra
    loss: Literal["stock", "shifted", "liger", "fused"] = "shifted" if fms else "stock"
    if "liger" in extra:
        loss = "liger"
    elif fused:
        loss = "fused"
    dropout = re.search(r"lora_dropout=([\d.]+)", extra)
    path = CodePath(
        compute_bytes=4 if "fp32 compute" in extra or "compute fp32" in extra else 2,
        float16="fp16 compute" in extra or "compute fp16" in extra,
        cast_to_float32="prepare_model_for_kbit_training" in extra and not trl_cast,
        norms_float32=trl_cast,
        autocast=fms and quantized,
        loss=loss,
        logits_held="fitcheck" in row.get("source_url", ""),
        checkpointing=row["grad_ckpt"].lower() == "true",
        reentrant=fms,
        attention=_attention(row["attention"]),
        optimizer=_optimizer(row["optimizer"]),
        fused_kernels=fused,
        separate_experts=fms,
        expandable_segments=False,
        name=row["extra"].split(";")[0],
    )
    recipe = Recipe(
        quantization=Quantization(method=method, double_quantization=row["double_quant"].lower() == "true"),
        lora=Lora(
            rank=int(row["lora_r"]),
            target_modules=tuple(row["targets"].replace(",", " ").split()),
            dropout=float(dropout[1]) if dropout else 0.0,
        ),
        data=Data(max_length=int(row["seq_len"]), packing=False),
        training=Training(micro_batch=int(row["batch"]), gradient_accumulation=1),
    )
    return recipe, path


def _method(text: str) -> Literal["nf4", "fp4", "int8", "none"]:
    word = text.lower()
    if word.startswith(("none", "fp16", "bf16", "16")) or not word:
        return "none"
    if "fp4" in word:
        return "fp4"
    if "nf4" in word or "4bit" in word or "4-bit" in word:
        return "nf4"
    if "int8" in word or "8bit" in word or "8-bit" in word:
        return "int8"
    raise Unplaced(f"quantization {text!r} is not known")


def _attention(text: str) -> Literal["flash", "efficient", "math", "eager"]:
    word = text.lower()
    if "eager" in word:
        return "eager"
    if "mem" in word:
        return "efficient"
    if "math" in word:
        return "math"
    return "flash"


def _optimizer(text: str) -> Optimizer:
    word = text.lower()
    if "paged" in word:
        return "paged_adamw_8bit" if "8" in word else "paged_adamw_32bit"
    if "8bit" in word or "8-bit" in word:
        return "adamw_8bit"
    if "fused" in word:
        return "adamw_fused"
    if "adam" in word:
        return "adamw"
    raise Unplaced(f"optimizer {text!r} is not known")


def find_config(model_id: str, configs: Path) -> Path:
    """The config of a model, or of one with the same shape: another owner's copy, base for instruct.

    ``configs`` holds ``<org>__<name>/config.json`` or ``<org>__<name>.json``.
    """
    name = model_id.rpartition("/")[2]
    base = re.sub(r"[-_](instruct|chat|it)(?=[-_]|$)", "", name, flags=re.IGNORECASE)
    files = {path.parent.name: path for path in sorted(configs.glob("*/config.json"))}
    files |= {path.stem: path for path in sorted(configs.glob("*__*.json"))}
    whole = files.get(model_id.replace("/", "__"))
    if whole:
        return whole
    for shape in (name.lower(), base.lower()):
        for known, path in files.items():
            if known.rpartition("__")[2].lower() == shape:
                return path
    raise Unplaced(f"no config for {model_id}")
