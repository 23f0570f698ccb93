"""What a row of published measurements says: which recipe ran, and over which code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_tui.memory import CodePath
from qlora_tui.memory.codepath import Loss, Optimizer
from qlora_tui.memory.versions import CURRENT, Version
from qlora_tui.recipe.schema import ALL_LINEAR, Data, Lora, Quantization, Recipe, Training

Row = dict[str, str]


class Unplaced(Exception):
    """A row whose code path or model cannot be told."""


_NOT_WALKED = {
    "unsloth": "Unsloth's own layers are not walked",
    "torch.compile": "a compiled step keeps and makes other tensors",
    "torch_compile": "a compiled step keeps and makes other tensors",
    "fsdp": "a model spread over several cards is not walked",
    "deepspeed": "a model spread over several cards is not walked",
    "zero-": "a model spread over several cards is not walked",
    "offload": "what is moved to the host is not known",
}
_NO_FLASH = ("T4", "V100", "P100", "RTX 20", "GTX", "TITAN")
"""Cards before Ampere, where SDPA has no flash kernel."""


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


def group_of(row: Row, path: CodePath) -> str:
    """Which of ``GROUPS`` a row belongs to."""
    words = f"{row['extra']} {row.get('source_url', '')}".lower()
    if path.fused_kernels or path.loss in ("fused", "liger"):
        return "foreign"
    if "qlora-tui" in words or path.lean:
        return "ours"
    return "trl" if "trl" in words or "fms-acceleration" in words else "stock"


def read_path(row: Row) -> tuple[Recipe, CodePath]:
    """The recipe and code path of a row, from its columns and the words in ``extra``.

    * ``prepare_model_for_kbit_training`` or ``fp32 upcast``: norms, embedding and head in float32
      (``cast_to_float32``), unless ``peft_module_casting_to_bf16`` follows: then norms only. ``no upcast``
      and ``without fp32 upcast`` say that nothing is cast.
    * ``Trainer`` or ``TRL`` benchmarks (fms-acceleration, transformers 4.4x): reentrant checkpointing,
      shifted logits, experts as separate modules; autocast where a 4-bit model ran with ``bf16=True``.
    * ``FOAK`` or ``fused`` kernels: fused RMSNorm, rotary, cross-entropy and (on 4-bit weights) LoRA kernels.
    * GPT-BigCode under such a benchmark: logits that stay referred to, which its code does not explain.
    * fitcheck's own measurements call ``out = model(…); out.loss.backward()``: the logits stay referred to.
    * ``liger``: fused linear cross-entropy. ``chunked loss``: ours.
    * ``reentrant`` and ``non-reentrant``, ``accumulation N``, ``lora_dropout=P``, ``dora``, ``lora bf16``,
      ``expandable_segments`` and the compute dtype are taken at their word.

    Raises Unplaced for what is not walked (Unsloth, compiled steps, several cards, GPTQ and its like, other
    optimizers than Adam's) and for columns that are no numbers.
    """
    extra = row["extra"].lower()
    for word, reason in _NOT_WALKED.items():
        if word in extra:
            raise Unplaced(reason)
    method = _method(row["quant"])
    quantized = method != "none"
    trl_cast = "peft_module_casting" in extra
    fms = "fms-acceleration" in row.get("source_url", "") or "hf trainer" in extra or trl_cast
    source = next((known for part, known in SOURCES.items() if part in row.get("source_url", "")), None)
    fused = "foak" in extra or re.search(r"fused [\w/()+]*(rmsnorm|lora|rope|ce|kernel)", extra) is not None
    dropout = re.search(r"dropout\s*[=:]?\s*(\d*\.?\d+)", extra)
    width = 4 if re.search(r"(fp32|float32)", _compute_dtype(row)) else 2
    half = "lora in bf16", "lora bf16", "lora fp16", "lora in fp16", "autocast_adapter_dtype=false"
    path = CodePath(
        compute_bytes=width,
        float16="fp16" in _compute_dtype(row) or "float16" in _compute_dtype(row).replace("bfloat16", ""),
        cast_to_float32=_is_cast(extra) and not trl_cast,
        norms_float32=trl_cast,
        adapter_bytes=2 if any(word in extra for word in half) else 4,
        autocast=fms and (quantized or _mixed_precision(extra, source)),
        loss=_loss(extra, fused=fused),
        transformers=_transformers(row, source),
        logits_held="fitcheck" in row.get("source_url", "") or (fms and "bigcode" in row["model_id"].lower()),
        checkpointing=_yes(row, "grad_ckpt"),
        reentrant=_reentrant(extra, fms=fms),
        attention=_attention(row, width),
        sdpa="sdpa" in row["attention"].lower(),
        optimizer=_optimizer(row["optimizer"]),
        accumulates=_accumulation(extra) > 1,
        fused_kernels=fused,
        expandable_segments="expandable_segments" in extra,
        name=row["extra"].split(";")[0],
    )
    nested = _yes(row, "double_quant") or re.search(r"\bdq\b|double", row["quant"].lower())
    recipe = Recipe(
        quantization=Quantization(method=method, double_quantization=bool(nested)),
        lora=Lora(
            rank=_number(row, "lora_r"),
            target_modules=_targets(row["targets"]),
            dropout=float(dropout[1]) if dropout else 0.0,
            use_dora="dora" in extra,
        ),
        data=Data(max_length=_number(row, "seq_len"), packing=False),
        training=Training(micro_batch=_number(row, "batch"), gradient_accumulation=_accumulation(extra)),
    )
    return recipe, path


def _mixed_precision(extra: str, source: Source | None) -> bool:
    if re.search(r"\b(bf16|fp16)\s*[=:]\s*true|mixed[_ -]precision|autocast|\bamp\b", extra):
        return True
    return source is not None and source.mixed_precision


def _transformers(row: Row, source: Source | None) -> Version:
    """The version in the row's words, else what its source pinned, else the newest read."""
    found = re.search(r"transformers\s*[=@v ]*(\d+)\.(\d+)", row["extra"].lower())
    if found:
        return int(found[1]), int(found[2])
    return source.transformers if source else CURRENT


def _targets(text: str) -> tuple[str, ...]:
    if re.fullmatch(r"all([ _-]?linear)?", text.strip().lower()):
        return (ALL_LINEAR,)
    return tuple(text.replace(",", " ").split())


def _yes(row: Row, column: str) -> bool:
    """A blank says no."""
    word = row[column].strip().lower()
    if word in ("true", "yes", "1", "on", "enabled"):
        return True
    if word in ("", "false", "no", "0", "off", "none", "disabled", "n/a", "-"):
        return False
    raise Unplaced(f"{column} is {row[column]!r}, neither yes nor no")


def _reentrant(extra: str, *, fms: bool) -> bool:
    if "reentrant" not in extra:
        return fms
    return not re.search(r"(non|not)[- ]reentrant|use_reentrant\s*[=:]\s*false", extra)


def _number(row: Row, column: str) -> int:
    text = row[column].replace(",", "").strip().removesuffix(".0")
    if text.isdigit() and int(text):
        return int(text)
    if column == "seq_len":
        raise Unplaced(f"seq_len is {row[column]!r}: the longest batch decides, and the row does not give it")
    raise Unplaced(f"{column} is {row[column]!r}, no number")


def _compute_dtype(row: Row) -> str:
    """What ``extra`` says of it (``compute bf16``, ``fp16 compute``), else what ``quant`` does."""
    kind = r"(bf16|bfloat16|fp16|float16|fp32|float32)"
    patterns = rf"compute[_ ]?(?:dtype)?\s*[=:]?\s*(?:torch\.)?{kind}", rf"{kind}[- ]compute"
    for pattern in patterns:
        found = re.search(pattern, row["extra"].lower())
        if found:
            return found[1]
    found = re.search(kind, row["quant"].lower())
    return found[1] if found else ""


def _is_cast(extra: str) -> bool:
    if re.search(r"(no|without)( fp32)? (upcast|cast|prepare_model)", extra):
        return False
    return "prepare_model_for_kbit_training" in extra or "fp32 upcast" in extra


def _accumulation(extra: str) -> int:
    found = re.search(r"accum\w*\s*[=:]?\s*(\d+)", extra)
    return int(found[1]) if found else 1


def _loss(extra: str, *, fused: bool) -> Loss:
    if "liger" in extra:
        return "liger"
    if fused:
        return "fused"
    if re.search(r"chunked (loss|ce|cross)", extra):
        return "chunked"
    return "stock"


def _method(text: str) -> Literal["nf4", "fp4", "int8", "none"]:
    word = text.lower()
    other = re.search(r"gptq|awq|hqq|aqlm|gguf|marlin|mxfp4|fp8", word)
    if other:
        raise Unplaced(f"{other[0]}'s packed weights and kernels are not walked")
    if "fp4" in word:
        return "fp4"
    if "nf4" in word or "4bit" in word or "4-bit" in word:
        return "nf4"
    if "int8" in word or "8bit" in word or "8-bit" in word:
        return "int8"
    if not word or word.startswith(("none", "fp16", "bf16", "fp32", "float", "bfloat", "16", "no")):
        return "none"
    raise Unplaced(f"quantization {text!r} is not known")


def _attention(row: Row, width: int) -> Literal["flash", "efficient", "math", "eager"]:
    word = row["attention"].lower()
    if "flex" in word or "xformers" in word:
        raise Unplaced(f"attention {row['attention']!r} is not known")
    if "eager" in word:
        return "eager"
    if "mem" in word:
        return "efficient"
    if "math" in word:
        return "math"
    older = any(name in row["gpu"] for name in _NO_FLASH)
    return "efficient" if "flash" not in word and (older or width == 4) else "flash"


def _optimizer(text: str) -> Optimizer:
    """Adam's of torch or bitsandbytes; the bare ``adamw_torch`` of a Trainer takes many tensors at once."""
    word = text.lower()
    other = re.search(r"galore|apollo|anyprecision|schedule_free|ademamix|adamax|mini|torchao|4bit", word)
    if other or "adam" not in word:
        raise Unplaced(f"optimizer {text!r} is not known")
    if "paged" in word:
        return "paged_adamw_8bit" if re.search(r"8[-_ ]?bit", word) else "paged_adamw_32bit"
    if re.search(r"8[-_ ]?bit", word):
        return "adamw_8bit"
    return "adamw_fused" if "fused" in word else "adamw"


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
