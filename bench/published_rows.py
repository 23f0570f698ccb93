"""What a row of published measurements says: which recipe ran, and over which code."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bench.published_words import (
    Cast,
    Row,
    Unplaced,
    fuses_lora,
    read_accumulation,
    read_attention,
    read_capability,
    read_cast,
    read_compute_dtype,
    read_loss,
    read_method,
    read_mixed_precision,
    read_number,
    read_optimizer,
    read_reentrant,
    read_sdpa,
    read_targets,
    read_version,
    read_yes,
)
from qlora_tui.memory import Device, ExecutionConfig, trainer_execution
from qlora_tui.memory.versions import CURRENT, Version
from qlora_tui.recipe.schema import Data, Lora, Quantization, Recipe, Training

_NOT_MODELED = {
    r"unsloth": "Unsloth's own layers are not modeled",
    r"torch[._]compile": "a compiled step keeps and makes other tensors",
    r"fsdp|deepspeed|zero-|\bddp\b|tensor parallel|pipeline parallel|\b[2-9]\d* ?gpus?\b|num_gpus=[2-9]": (
        "a model spread over several GPUs is not modeled"
    ),
    r"offload": "what is moved to the host is not known",
    r"axolotl|llama[-_ ]?factory|torchtune|litgpt|ms-swift|megatron|nemo\b|colossal|xtuner|mlx": (
        "this engine's own training code is not modeled"
    ),
    r"modules_to_save|full[- ]fine-?tun|full_ft": "it trains more than an adapter",
    r"\bdpo\b|\bgrpo\b|\bkto\b|reward model": "its loss is not that of supervised fine-tuning",
    r"scattermoe": "ScatterMoE's kernels are not modeled",
}
"""What no row's figure is given for, as patterns of its words, with the reason."""


@dataclass(frozen=True)
class Source:
    """What a published benchmark ran with, where its rows do not say."""

    transformers: Version
    """Pinned by the benchmark's requirements file."""
    mixed_precision: bool = False
    """``bf16=True`` or ``fp16=True`` in every scenario, so that 16-bit models run under autocast too."""


SOURCES = {
    "fms-acceleration/blob/main/scripts/benchmarks/refs/a100_80gb.csv": Source((4, 48)),
    "fms-acceleration/blob/main/scripts/benchmarks/refs/a100_80gb_granite.csv": Source((4, 45)),
    "fms-acceleration/blob/main/scripts/benchmarks/refs/a100_80gb_liger.csv": Source((4, 45), True),
    "fms-acceleration/blob/main/scripts/benchmarks/refs/a100_80gb_moe.csv": Source((4, 52)),
    "fms-acceleration/blob/main/scripts/benchmarks/refs_orca/": Source((4, 44)),
    "Anassbzdd/fitcheck": Source((5, 0)),
}
"""By a part of the address. fms-acceleration's ``scripts/benchmarks`` holds, beside each table, the scenarios
(``scenarios*.yaml``) and the versions (``requirements*.txt``) that made it."""


GROUPS = {
    "stock": "transformers and peft, by a plain loop or by Trainer",
    "trl": "TRL's SFTTrainer",
    "ours": "this project's trainer",
    "foreign": "other engines and kernels (FOAK, Liger, …)",
}


def group_of(row: Row, execution: ExecutionConfig) -> str:
    """Which of ``GROUPS`` a row belongs to."""
    words = f"{row['extra']} {row.get('source_url', '')}".lower()
    if execution.library_kernels or execution.loss in ("fused", "liger"):
        return "foreign"
    if "qlora-tui" in words or execution.own_fused:
        return "ours"
    return "trl" if "trl" in words or "fms-acceleration" in words else "stock"


def read_execution(row: Row) -> tuple[Recipe, ExecutionConfig]:
    """The recipe and code path of a row, from its columns and the words in ``extra``.

    * ``prepare_model_for_kbit_training`` or ``fp32 upcast``: norms, embedding and head in float32
      (``cast_to_float32``), unless ``peft_module_casting_to_bf16`` follows: then norms only. ``no upcast``
      and ``without fp32 upcast`` say that nothing is cast. Where a row of TRL says none of these, its version
      decides (:func:`_trl_preparation`).
    * ``Trainer``, ``TRL`` and fms-acceleration's benchmarks: autocast on quantized weights, and on others
      where ``bf16=True`` is said, pinned (``SOURCES``) or TRL's default. Any other row is taken for a plain
      loop, ``out = model(…); out.loss.backward()``, where the logits stay referred to.
    * The version of transformers is the one that a row names, its source pinned, or else the newest.
    * ``FOAK`` or ``fused`` kernels: fused RMSNorm, rotary, cross-entropy and (on 4-bit weights) LoRA kernels.
    * ``liger``: fused linear cross-entropy and, without FOAK, its RMSNorm, rotary and gated-MLP kernels, as
      ``use_liger_kernel`` puts them in. ``chunked loss``: ours.
    * GPT-BigCode under a Trainer: logits that stay referred to, which its code does not explain.
    * ``reentrant`` and ``non-reentrant`` (else the version's default), ``accumulation N``,
      ``lora_dropout=P``, ``dora``, ``lora bf16``, ``expandable_segments`` and the compute dtype are taken at
      their word.

    Raises Unplaced for what is not modeled (``_NOT_MODELED``, GPTQ and its like, other optimizers than
    Adam's) and for columns that are no numbers.
    """
    extra = row["extra"].lower()
    _check_modeled(row)
    method = read_method(row["quant"])
    recipe = _recipe(row, method)
    if "qlora-tui" in f"{extra} {row.get('source_url', '')}":
        return recipe, _our_execution(row, recipe)
    source = next((known for part, known in SOURCES.items() if part in row.get("source_url", "")), None)
    version, trl = read_version("transformers", extra), read_version("trl", extra)
    version = version or (source.transformers if source else CURRENT)
    fused = "foak" in extra or re.search(r"fused [\w/()+]*(rmsnorm|lora|rope|ce|kernel)", extra) is not None
    liger = "liger" in extra and not fused
    trainer = "fms-acceleration" in row.get("source_url", "") or bool(re.search(r"trainer|\btrl\b", extra))
    width = 4 if re.search(r"(fp32|float32)", read_compute_dtype(row)) else 2
    float16 = "fp16" in read_compute_dtype(row) or "float16" in read_compute_dtype(row).replace(
        "bfloat16", ""
    )
    cast = read_cast(extra)
    adapter = 2 if any(word in extra for word in _HALF_ADAPTER) else 4
    if re.search(r"\btrl\b|sfttrainer", extra) and method != "none" and cast in (None, "all"):
        cast, adapter = _trl_preparation(trl, version, cast, float16=float16)
    mixed = read_mixed_precision(extra) or (source is not None and source.mixed_precision)
    mixed = mixed or (source is None and trl is not None and trl >= _TRL_MIXED_PRECISION)
    execution = ExecutionConfig(
        compute_itemsize=width,
        float16=float16,
        cast_to_float32=cast == "all",
        norms_float32=cast == "norms",
        adapter_itemsize=adapter,
        autocast=trainer and width == 2 and (method != "none" or mixed),
        loss=read_loss(extra, trl, fused=fused),
        transformers=version,
        logits_alive_in_backward=not trainer or "bigcode" in row["model_id"].lower(),
        checkpointing=read_yes(row, "grad_ckpt"),
        reentrant=read_reentrant(extra, version, trl),
        attention=read_attention(row, width),
        sdpa=read_sdpa(row),
        optimizer=read_optimizer(row["optimizer"]),
        accumulates=read_accumulation(extra) > 1,
        capability=read_capability(row),
        library_kernels=fused or liger,
        foak_lora=fused and method in ("nf4", "fp4") and fuses_lora(row["targets"]),
        liger_mlp=liger,
        expandable_segments="expandable_segments" in extra,
        name=row["extra"].split(";")[0],
    )
    return recipe, execution


def _our_execution(row: Row, recipe: Recipe) -> ExecutionConfig:
    device = Device(capability=read_capability(row))
    return replace(
        trainer_execution(recipe, device),
        checkpointing=read_yes(row, "grad_ckpt"),
        optimizer=read_optimizer(row["optimizer"]),
        name=row["extra"].split(";")[0],
    )


def _recipe(row: Row, method: Literal["nf4", "fp4", "int8", "none"]) -> Recipe:
    extra = row["extra"].lower()
    nested = read_yes(row, "double_quant") or re.search(r"\bdq\b|double", row["quant"].lower())
    dropout = re.search(r"dropout\s*[=:]?\s*(\d*\.?\d+)", extra)
    return Recipe(
        quantization=Quantization(method=method, double_quantization=bool(nested)),
        lora=Lora(
            rank=read_number(row, "lora_r"),
            target_modules=read_targets(row["targets"]),
            dropout=float(dropout[1]) if dropout else 0.0,
            use_dora="dora" in extra,
        ),
        data=Data(max_length=read_number(row, "seq_len"), packing=False),
        training=Training(
            micro_batch_size=read_number(row, "batch"), gradient_accumulation=read_accumulation(extra)
        ),
    )


def _check_modeled(row: Row) -> None:
    """Raises Unplaced."""
    words = f"{row['extra']} {row['quant']} {row['optimizer']}".lower()
    for pattern, reason in _NOT_MODELED.items():
        if re.search(pattern, words):
            raise Unplaced(reason)
    if re.search(r"^\s*([2-9]|\d\d+)\s*[x×*]|(?<![a-z])[x×*]\s*([2-9]|\d\d+)\s*$", row["gpu"].lower()):
        raise Unplaced("a model spread over several GPUs is not modeled")


_HALF_ADAPTER = ("lora in bf16", "lora bf16", "lora fp16", "lora in fp16", "autocast_adapter_dtype=false")
_TRL_WITHOUT_CAST: Version = (0, 26)
"""From here on SFTTrainer no longer calls ``prepare_model_for_kbit_training``, and has adapters on quantized
weights in bfloat16 (``sft_trainer.py``; before, ``prepare_peft_model`` in ``models/utils.py``)."""
_TRL_MIXED_PRECISION: Version = (0, 20)
"""``SFTConfig.bf16`` is True unless ``fp16`` is; 0.19 and earlier have Trainer's default, False."""


def _trl_preparation(
    trl: Version | None, version: Version, cast: Cast | None, *, float16: bool
) -> tuple[Cast | None, int]:
    """What is in float32 of a quantized model that SFTTrainer prepared, and the bytes of an adapter's weight.

    Where the row does not give TRL's version, the one that goes with transformers' is assumed. ``cast`` is
    what the row's own script did before.
    """
    if trl is None:
        trl = _TRL_WITHOUT_CAST if version >= (5, 0) else (0, 11)
    if trl >= _TRL_WITHOUT_CAST:
        return cast, 2
    return ("all" if float16 else "norms"), 4


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
