"""The adapter merged into its base: an ordinary model folder that any program loads.

The base's weight files are copied, and the weights that the adapter changes are then modified in the copy,
one at a time. This takes the memory of one weight instead of the whole model. If ``base_choice`` finds that
the adapter is closer to the trained model on the dequantized weights, every weight that training quantizes is
first rounded to 4 bits and dequantized. The merged model is stored in 16 bits in both cases.

The merged model is then compared with its 16-bit base plus adapter, as peft computes it. Both read the same
prompt, one after the other, so that one model is in memory at a time. Merging rounds each changed weight once
more, so next-token logits may differ by as much as rounding changes peft's own.
"""

from __future__ import annotations

import gc
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct, structs
from torch import Tensor

from qlora_tui.adapters.base_weights import model_folder
from qlora_tui.adapters.merged_weights import merged_weights
from qlora_tui.adapters.weight_files import write_unpacked_config
from qlora_tui.catalog.config_parser import load_config
from qlora_tui.catalog.local_models import find_files
from qlora_tui.catalog.model_validation import (
    CONFIG,
    copy_files,
    is_mxfp4,
    is_template_file,
    tokenizer_files,
    weight_files,
)
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.data.conversation import Message
from qlora_tui.data.render import prompt_ids
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.data.tokenizer_files import own_templates, read_json_object
from qlora_tui.errors import UserError
from qlora_tui.export.base_choice import (
    BaseChoice,
    BaseName,
    base_requantizer,
    choice_named,
    lacking_memory,
)
from qlora_tui.export.model_card import render_model_card
from qlora_tui.export.unfinished_files import draft_folder, publish_new, refuse_existing, require_space
from qlora_tui.files import size_of
from qlora_tui.formatting import capitalize, format_float
from qlora_tui.runs.exports import COMPARED_TOKENS
from qlora_tui.training.adapter import exact_target_names
from qlora_tui.training.checks.rounding import NOISE_FACTOR, rounding_error_of, rounding_errors
from qlora_tui.training.clean_files import adapter_view
from qlora_tui.training.compute_device import ComputeDevice
from qlora_tui.training.model import load_base

_PROMPT = "Name three colors of autumn leaves, and explain in one sentence why they change."
_DRAWS = 3


class MergeCheck(Struct, frozen=True, kw_only=True):
    """Comparison of the merged model's next-token logits with those of base and adapter."""

    tokens: int
    """Number of positions compared."""
    difference: float
    """Root mean square difference over positions and vocabulary, relative to the logits' spread."""
    noise: float
    """Relative change of the logits of base and adapter that rounding in the stored dtype causes."""
    same_choices: int
    """Number of positions at which both rank the same token first."""
    agrees: bool
    """Whether rounding explains the difference."""

    @property
    def sentence(self) -> str:
        """The result as a sentence for users."""
        difference, noise = format_float(self.difference, 2), format_float(self.noise, 2)
        return (
            f"its logits differ from those of base and adapter by {difference} of their "
            f"standard deviation, where rounding accounts for about {noise}; the most "
            f"likely token is the same at {self.same_choices} of {self.tokens} positions"
        )


class MergeResult(Struct, frozen=True, kw_only=True):
    """Result of a merge."""

    folder: str
    bytes: int
    changed_weights: int
    """Number of weight matrices that the adapter changed."""
    base: BaseChoice
    """Base weights that the adapter was merged into."""
    check: MergeCheck | None = None
    """Comparison with the logits of base and adapter; None if they were not compared."""
    unchecked_because: str = ""
    """Why the logits were not compared."""

    @property
    def command(self) -> str:
        """Command that serves the merged model."""
        return f"vllm serve {shlex.quote(self.folder)}"

    @property
    def check_sentence(self) -> str:
        """How the merged model compares with base and adapter, or why they were not compared."""
        return f"Checked: {self.check.sentence}." if self.check else f"Not checked: {self.unchecked_because}."


def merge(
    source: ChatSource,
    adapter_name: str,
    out: Path,
    on_status: Callable[[str], None] = lambda words: None,
    *,
    base_name: BaseName = "best",
    compared_tokens: int = COMPARED_TOKENS,
) -> MergeResult:
    """Merge an adapter into its base, compare the merged model with base and adapter, and write the merged
    model to ``out``.

    Args:
        source: The base and its adapters, from :mod:`qlora_tui.chat.chat_sources`.
        adapter_name: The adapter to merge.
        out: Output folder, which must not exist yet.
        on_status: Called with the current activity.
        base_name: Base weights to merge into; ``best`` measures which ones are closer to the trained model.
        compared_tokens: For ``best``, maximum number of positions to compare. Only tokens in the loss count.

    Raises:
        UserError: The model cannot be merged, or does not answer like the adapter. Nothing is left behind.
    """
    out = out.expanduser().absolute()
    refuse_existing(out)
    adapter = Path(source.adapters[adapter_name])
    weights = merged_weights(source.recipe, adapter, on_status)
    base, files = weights.folder, list(weights.updates)
    needed = weights.bytes + _SPARE_BYTES
    require_space(out.parent, needed, "The merged model")
    with draft_folder(out) as draft:
        folder = draft / "model"
        folder.mkdir(mode=0o755)
        choice = choice_named(base_name, source, adapter_name, on_status, compared_tokens)
        weights = replace(weights, requantize=base_requantizer(source, choice))
        for number, file in enumerate(files, 1):
            on_status(f"Merging {file.name} ({number} of {len(files)})")
            weights.write(file, folder / file.name)
        copy_files(base, folder, [name for name in _MODEL_FILES if (base / name).is_file()])
        if is_mxfp4(load_config(base / CONFIG)):
            write_unpacked_config(base, folder, files)
        _copy_tokenizer(base, adapter, folder)
        (folder / "README.md").write_text(
            render_model_card(
                source.recipe,
                from_hub=find_files(source.recipe.model.id).source == "hub cache",
                is_dequantized=choice.chosen == "dequantized",
            ),
            encoding="utf-8",
        )
        check = verify_merge(source, adapter_name, folder, on_status, weights.requantize)
        if not isinstance(check, str) and not check.agrees:
            raise UserError(
                "The merged model does not answer like the adapter",
                what=f"{capitalize(check.sentence)}. The merged model was not kept.",
                why="The base stores its weights in an unknown layout, or its files are damaged.",
                fix="Use the adapter instead, and report the problem.",
            )
        size = size_of(folder)
        publish_new(folder, out)
    return MergeResult(
        folder=str(out),
        bytes=size,
        changed_weights=weights.changed,
        base=choice,
        check=None if isinstance(check, str) else check,
        unchecked_because=check if isinstance(check, str) else "",
    )


def _copy_tokenizer(base: Path, adapter: Path, folder: Path) -> None:
    """Copy the base's tokenizer to ``folder``, and the adapter's over it. If the adapter has chat templates
    of its own, none of the base's are copied.
    """
    names = tokenizer_files(base)
    if any(own_templates(adapter, read_json_object(adapter / "tokenizer_config.json"))):
        names = [name for name in names if not is_template_file(name)]
    copy_files(base, folder, names)
    copy_files(adapter, folder, tokenizer_files(adapter))


def verify_merge(
    source: ChatSource,
    adapter_name: str,
    merged: Path,
    on_status: Callable[[str], None] = lambda words: None,
    requantize: Callable[[str, Tensor], Tensor] | None = None,
) -> MergeCheck | str:
    """Compare a merged model with its base and the adapter ``adapter_name``, on the CPU.

    Args:
        source: The base and its adapters.
        adapter_name: The adapter that was merged.
        merged: Folder that :func:`qlora_tui.export.merge.merge` wrote.
        on_status: Called with the current activity.
        requantize: Rounds the base's weights, given name and values, if they were rounded before merging.

    Returns:
        The comparison, or why nothing was compared.
    """
    base = model_folder(source.recipe)
    if lacking := lacking_memory(base):
        return lacking
    tokenizer = ChatTokenizer.from_folder(merged)
    prompt = source.recipe.training.sample_prompts[:1] or (_PROMPT,)
    ids = torch.tensor([prompt_ids([Message("user", prompt[0])], tokenizer)])
    on_status("Comparing the merged model with base and adapter")
    model = _load(source, base)
    if requantize is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(requantize(name, parameter.data))
    adapted = _with_adapter(model, Path(source.adapters[adapter_name]))
    expected = _logits(adapted, ids)
    spread = float((expected - expected.mean(-1, keepdim=True)).norm())
    noise = 0.0
    dtype = next(adapted.parameters()).dtype
    for draw in range(_DRAWS):
        with rounding_errors(adapted, rounding_error_of(dtype), seed=draw):
            noise = max(noise, float((_logits(adapted, ids) - expected).norm()) / spread)
    del adapted, model
    gc.collect()
    logits = _logits(_load(source, merged), ids)
    difference = float((logits - expected).norm()) / spread
    return MergeCheck(
        tokens=len(logits),
        difference=difference,
        noise=noise,
        same_choices=int((logits.argmax(-1) == expected.argmax(-1)).sum()),
        agrees=difference <= NOISE_FACTOR * noise,
    )


def _load(source: ChatSource, folder: Path) -> Any:
    """Load the model in a folder in the dtype in which it is stored."""
    quantization = structs.replace(source.recipe.quantization, method="none")
    recipe = structs.replace(source.recipe, quantization=quantization)
    device = ComputeDevice(torch.device("cpu"), "CPU", 0, _stored_dtype(folder))
    return load_base(folder, recipe, device, "segments").eval()


def _stored_dtype(folder: Path) -> torch.dtype:
    from safetensors import safe_open

    with safe_open(folder / weight_files(folder)[0], framework="pt") as weights:
        dtype: torch.dtype = weights.get_tensor(next(iter(weights.keys()))).dtype
    return dtype


def _with_adapter(model: Any, folder: Path) -> Any:
    from peft import PeftConfig, PeftModel

    with adapter_view(folder) as view:
        targets = PeftConfig.from_pretrained(str(view)).target_modules or ""
        with exact_target_names(model, targets):
            return PeftModel.from_pretrained(model, str(view)).eval()


@torch.inference_mode()
def _logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits, (tokens, vocabulary), in fp32."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
    return logits


_SPARE_BYTES = 64 << 20
_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
