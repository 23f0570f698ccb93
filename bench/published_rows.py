"""What a row of published measurements says: which recipe ran, and over which code."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

from qlora_tui.memory import Device, ExecutionConfig, trainer_execution
from qlora_tui.memory.execution import CURRENT, Optimizer, Version
from qlora_tui.recipe.schema import ALL_LINEAR, Data, Lora, Quantization, Recipe, Training

Row = dict[str, str]


class Unplaced(Exception):
    """A row whose code path or model is not modeled."""


_NOT_MODELED = {
    r"unsloth": "Unsloth's own layers are not modeled",
    r"foak|liger|fused [\w/()+]*(rmsnorm|lora|rope|ce|kernel)": "kernels of other projects are not modeled",
    r"\btrl\s*[=@v ]*\d|sfttrainer|peft_module_casting": "TRL's own preparation and loss are not modeled",
    r"(?<!no )chunk(ed|ing) (loss|ce|cross)": "a loss in chunks of other code is not modeled",
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

SOURCES: dict[str, Version] = {
    "fms-acceleration/blob/main/scripts/benchmarks/refs/a100_80gb.csv": (4, 48),
    "fms-acceleration/blob/main/scripts/benchmarks/refs/a100_80gb_granite.csv": (4, 45),
    "fms-acceleration/blob/main/scripts/benchmarks/refs_orca/": (4, 44),
    "Anassbzdd/fitcheck": (5, 0),
}
"""The version of transformers that a published benchmark pins in its requirements file, by a part of the
address."""


def read_execution(row: Row) -> tuple[Recipe, ExecutionConfig]:
    """The recipe and code path of a row, from its columns and the words in ``extra``.

    * ``prepare_model_for_kbit_training`` or ``fp32 upcast``: norms, embedding and head in float32
      (``cast_to_float32``). ``no upcast`` and ``without fp32 upcast`` say that nothing is cast.
    * ``Trainer`` and fms-acceleration's benchmarks: autocast on quantized weights, and on others where
      ``bf16=True`` is said. Any other row is taken for a plain loop, ``out = model(…);
      out.loss.backward()``, where the logits stay referred to.
    * The version of transformers is the one that a row names, its source pinned, or else the newest.
    * ``reentrant`` and ``non-reentrant`` (else the version's default), ``accumulation N``,
      ``lora_dropout=P``, ``dora``, ``lora bf16``, ``expandable_segments`` and the compute dtype are taken at
      their word.

    Raises Unplaced for what is not modeled (``_NOT_MODELED``, GPTQ and its like, other optimizers than
    Adam's) and for columns that are no numbers.
    """
    extra, source_url = row["extra"].lower(), row.get("source_url", "")
    _check_modeled(row)
    method = read_method(row["quant"])
    if "qlora-tui" in f"{extra} {source_url}":
        recipe = _recipe(row, method)
        return recipe, _our_execution(row, recipe)
    pinned = next((version for part, version in SOURCES.items() if part in source_url), CURRENT)
    version = read_version(extra) or pinned
    trainer = "fms-acceleration" in source_url or "trainer" in extra
    compute = read_compute_dtype(row)
    width = 4 if re.search(r"(fp32|float32)", compute) else 2
    execution = ExecutionConfig(
        compute_itemsize=width,
        float16="fp16" in compute or "float16" in compute.replace("bfloat16", ""),
        cast_to_float32=read_cast(extra),
        adapter_itemsize=2 if any(word in extra for word in _HALF_ADAPTER) else 4,
        autocast=trainer and width == 2 and (method != "none" or read_mixed_precision(extra)),
        loss="stock",
        transformers=version,
        logits_alive_in_backward=not trainer,
        checkpointing=read_yes(row, "grad_ckpt"),
        reentrant=read_reentrant(extra, version),
        attention=read_attention(row, width),
        sdpa=read_sdpa(row),
        optimizer=read_optimizer(row["optimizer"]),
        accumulates=read_accumulation(extra) > 1,
        capability=read_capability(row),
        expandable_segments="expandable_segments" in extra,
        name=row["extra"].split(";")[0],
    )
    return _recipe(row, method), execution


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


_NO_FLASH = ("T4", "V100", "P100", "RTX 20", "GTX", "TITAN")
"""GPUs before Ampere, where SDPA has no flash kernel."""


def read_mixed_precision(extra: str) -> bool:
    return bool(re.search(r"\b(bf16|fp16)\s*[=:]\s*true|mixed[_ -]precision|autocast\b(?!_)|\bamp\b", extra))


def read_version(extra: str) -> Version | None:
    """The version of transformers in a row's words, as in ``transformers==4.45.2``."""
    match = re.search(r"\btransformers\s*[=@v ]*(\d+)\.(\d+)", extra)
    return (int(match[1]), int(match[2])) if match else None


def read_targets(text: str) -> tuple[str, ...]:
    if re.fullmatch(r"all([ _-]?linear)?", text.strip().lower()):
        return (ALL_LINEAR,)
    return tuple(text.replace(",", " ").split())


def read_yes(row: Row, column: str) -> bool:
    """A blank says no."""
    word = row[column].strip().lower()
    if word in ("true", "yes", "1", "on", "enabled"):
        return True
    if word in ("", "false", "no", "0", "off", "none", "disabled", "n/a", "-"):
        return False
    raise Unplaced(f"{column} is {row[column]!r}, neither yes nor no")


def read_reentrant(extra: str, version: Version) -> bool:
    """Without a word of it, the default of ``gradient_checkpointing_enable``."""
    if "reentrant" not in extra:
        return version < (5, 0)
    return not re.search(r"(non|not)[- ]reentrant|use_reentrant\s*[=:]\s*false", extra)


def read_number(row: Row, column: str) -> int:
    text = row[column].replace(",", "").strip().removesuffix(".0")
    if text.isdigit() and int(text):
        return int(text)
    if column == "seq_len":
        raise Unplaced(f"seq_len is {row[column]!r}: the longest batch decides, and the row does not give it")
    if column == "lora_r" and not text:
        raise Unplaced("lora_r is blank: without an adapter the whole model is trained")
    raise Unplaced(f"{column} is {row[column]!r}, no number")


def read_compute_dtype(row: Row) -> str:
    """What ``extra`` says of it (``compute bf16``, ``fp16 compute``), else what ``quant`` does."""
    kind = r"(bf16|bfloat16|fp16|float16|fp32|float32)"
    patterns = rf"compute[_ ]?(?:dtype)?\s*[=:]?\s*(?:torch\.)?{kind}", rf"{kind}[- ]compute"
    for pattern in patterns:
        match = re.search(pattern, row["extra"].lower())
        if match:
            return match[1]
    match = re.search(kind, row["quant"].lower())
    return match[1] if match else ""


def read_cast(extra: str) -> bool:
    """Whether a row says that norms, embedding and head are cast to float32."""
    if re.search(r"(no|without)( fp32)? (upcast|cast|prepare_model)", extra):
        return False
    return "prepare_model_for_kbit_training" in extra or "fp32 upcast" in extra


def read_accumulation(extra: str) -> int:
    match = re.search(r"accum\w*\s*[=:]?\s*(\d+)", extra)
    return int(match[1]) if match else 1


def read_method(text: str) -> Literal["nf4", "fp4", "int8", "none"]:
    word = text.lower()
    other = re.search(r"gptq|awq|hqq|aqlm|gguf|marlin|mxfp4|fp8", word)
    if other:
        raise Unplaced(f"{other[0]}'s packed weights and kernels are not modeled")
    if "fp4" in word:
        return "fp4"
    if "nf4" in word or "4bit" in word or "4-bit" in word:
        return "nf4"
    if "int8" in word or "8bit" in word or "8-bit" in word:
        return "int8"
    if not word or word.startswith(("none", "fp16", "bf16", "fp32", "float", "bfloat", "16", "no")):
        return "none"
    raise Unplaced(f"quantization {text!r} is not known")


def read_attention(row: Row, width: int) -> Literal["flash", "efficient", "math", "eager"]:
    word = row["attention"].lower()
    if "flex" in word or "xformers" in word:
        raise Unplaced(f"attention {row['attention']!r} is not known")
    if "eager" in word:
        return "eager"
    if "mem" in word:
        return "efficient"
    if "math" in word:
        return "math"
    return "efficient" if "flash" not in word and (has_no_flash(row) or width == 4) else "flash"


def read_sdpa(row: Row) -> bool:
    """Whether transformers' SDPA code calls the kernel, as it does where a row names none."""
    word = row["attention"].lower()
    return "sdpa" in word or not re.search("flash|eager", word)


def read_capability(row: Row) -> tuple[int, int]:
    """Compute capability, as far as it matters here: before Ampere, an A100, Hopper, or any other."""
    if has_no_flash(row):
        return 7, 5
    if "A100" in row["gpu"]:
        return 8, 0
    return (9, 0) if re.search(r"H[12]00|GH200", row["gpu"]) else (8, 6)


def has_no_flash(row: Row) -> bool:
    """Whether the row's GPU is older than Ampere."""
    return any(name in row["gpu"] for name in _NO_FLASH)


def read_optimizer(text: str) -> Optimizer:
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
