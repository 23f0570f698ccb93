"""The columns of a published measurement, and the words of its ``extra``, as the values they stand for.

Functions that take a row raise :class:`Unplaced` for what they cannot read.
"""

from __future__ import annotations

import re
from typing import Literal

from qlora_tui.memory.execution import Loss, Optimizer
from qlora_tui.memory.versions import Version
from qlora_tui.recipe.schema import ALL_LINEAR

Row = dict[str, str]
Cast = Literal["all", "norms", "nothing"]
"""To float32: norms, embedding and head; norms only; nothing."""


class Unplaced(Exception):
    """A row whose code path or model is not modeled."""


_NO_FLASH = ("T4", "V100", "P100", "RTX 20", "GTX", "TITAN")
"""GPUs before Ampere, where SDPA has no flash kernel."""

_TRL_NON_REENTRANT: Version = (0, 27)
_TRL_CHUNKED: Version = (1, 7)
"""``loss_type="chunked_nll"`` is the default from here on (``sft_config.py``)."""
_TRL_TILED: Version = (1, 15)
"""``add_fused_lm_head`` from here on (``trl/trainer/utils.py``)."""


def fuses_lora(targets: str) -> bool:
    """Whether FOAK puts adapters and 4-bit weights into one function: queries, keys and values only where all
    three have an adapter (``build_lora_fused_ops``). Raises Unplaced for what is not modeled."""
    names = set(read_targets(targets))
    queries, mlp = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj", "down_proj"}
    if ALL_LINEAR in names or mlp <= names:
        raise Unplaced("FOAK's fused LoRA on an MLP is not modeled")
    triggered = queries <= names or "o_proj" in names
    if triggered and not (queries <= names and names <= queries | {"o_proj"}):
        raise Unplaced(f"FOAK's fused LoRA on {targets} only is not modeled")
    return triggered


def read_mixed_precision(extra: str) -> bool:
    return bool(re.search(r"\b(bf16|fp16)\s*[=:]\s*true|mixed[_ -]precision|autocast\b(?!_)|\bamp\b", extra))


def read_version(library: str, extra: str) -> Version | None:
    """The version of a library in a row's words, as in ``transformers==4.45.2`` or ``trl 0.11``."""
    match = re.search(rf"\b{library}\s*[=@v ]*(\d+)\.(\d+)", extra)
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


def read_reentrant(extra: str, version: Version, trl: Version | None) -> bool:
    """Without a word of it, the default of ``gradient_checkpointing_enable``, unless TRL has its own."""
    if "reentrant" not in extra:
        return version < (5, 0) and not (trl and trl >= _TRL_NON_REENTRANT)
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


def read_cast(extra: str) -> Cast | None:
    """What a row says is cast to float32 ("all" is norms, embedding and head); None if it is silent."""
    if re.search(r"(no|without)( fp32)? (upcast|cast|prepare_model)", extra):
        return "nothing"
    if "peft_module_casting" in extra:
        return "norms"
    return "all" if "prepare_model_for_kbit_training" in extra or "fp32 upcast" in extra else None


def read_accumulation(extra: str) -> int:
    match = re.search(r"accum\w*\s*[=:]?\s*(\d+)", extra)
    return int(match[1]) if match else 1


def read_loss(extra: str, trl: Version | None, *, fused: bool) -> Loss:
    """TRL's own, where a row names a version that has one, unless it says that the stock loss was taken."""
    if "liger" in extra:
        return "liger"
    if fused:
        return "fused"
    if re.search(r"chunked (loss|ce|cross)", extra):
        return "chunked"
    if trl is None or trl < _TRL_CHUNKED or "default loss" in extra:
        return "stock"
    return "trl_tiled" if trl >= _TRL_TILED else "trl_chunked"


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
