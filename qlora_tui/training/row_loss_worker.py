"""The job that measures the loss of each training row before and after a run.

It loads the run's base with its final adapter, passes over the training samples three times without
gradients, and writes the files of :mod:`qlora_tui.runs.row_losses`, which starts it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tui.gpu.library_imports import faster_imports
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.measuring import measuring, no_adapter
from qlora_tui.worker import Report

if TYPE_CHECKING:
    from qlora_tui.data.tokenizer import ChatTokenizer
    from qlora_tui.training.batches import TokenizedDataset


def measure(folder: Path, report: Report) -> None:
    """Measure all training rows of the run in a folder, and write the result.

    Raises:
        UserError: the run has no adapter, is in use, or its data or model cannot be read.
        OSError: the result cannot be written.
    """
    with measuring(folder) as run:
        _measure(run, report)


def _measure(run: RunDir, report: Report) -> None:
    with faster_imports():
        from qlora_tui.catalog.local_models import resolve_model
        from qlora_tui.data.dataset import prepare_dataset
        from qlora_tui.data.repetition import find_contradictions
        from qlora_tui.data.store import GOOD
        from qlora_tui.data.tokenizer import ChatTokenizer
        from qlora_tui.data.trainable_tokens import token_ids
        from qlora_tui.runs.row_losses import MeasuredRow, classify, write_row_losses
        from qlora_tui.training.adapter import add_lora, load_adapter
        from qlora_tui.training.base_model import prepare_base
        from qlora_tui.training.batches import RowShape
        from qlora_tui.training.compute_device import choose_attention, find_device
        from qlora_tui.training.gguf_conversion import convert_cached
        from qlora_tui.training.priority import lower_priority
        from qlora_tui.training.row_loss import OtherPrompts
        from qlora_tui.training.scoring import token_losses

    started = time.monotonic()
    recipe = run.recipe()
    if not (run.adapter_dir / "adapter_model.safetensors").is_file():
        raise no_adapter(run)
    device = find_device(recipe)
    if device.kind == "cpu":
        lower_priority()
    files = resolve_model(recipe.model.id)
    folder = files.folder if files.gguf_file is None else convert_cached(files.folder / files.gguf_file)
    tokenizer = ChatTokenizer.from_folder(folder, recipe.model.chat_template)
    # Of a preference run the good answers: those are what it should learn.
    samples = prepare_dataset(recipe, tokenizer).train.of_side(GOOD)
    base = prepare_base(folder, recipe, device, choose_attention(recipe, device), "chunked", weighted=False)
    ids = token_ids(recipe.lora.trainable_tokens, tokenizer)
    model = add_lora(base.model, recipe.lora, files.architecture, ids)
    load_adapter(model, run.adapter_dir)
    shape = RowShape(
        packed=base.padding_free,
        max_length=recipe.data.max_length,
        multiple=device.row_multiple,
        pad_id=tokenizer.pad_id or 0,
    )
    where = device.torch_device

    def losses(dataset: Any, passes_done: int) -> list[tuple[float, ...]]:
        return token_losses(
            model,
            dataset,
            shape,
            where,
            lambda done, total: report(passes_done * total + done, 3 * total),
        )

    with model.disable_adapter():
        before = losses(samples, 0)
    after = losses(samples, 1)
    others = losses(OtherPrompts(samples, recipe.data.max_length), 2)
    contradicts = find_contradictions([_texts(samples, i, tokenizer) for i in range(len(samples))])
    measured = [
        MeasuredRow(
            source=samples.origin(i)[0],
            row=samples.origin(i)[1],
            file=samples.file_name(i),
            before=before[i],
            after=after[i],
            other_prompt=sum(others[i]) / max(1, len(others[i])),
            contradicts=samples.origin(contradicts[i])[1] if i in contradicts else None,
            contradicts_file=samples.file_name(contradicts[i]) if i in contradicts else "",
        )
        for i in range(len(samples))
        if after[i]
    ]
    write_row_losses(run, *classify(run.id, measured, time.monotonic() - started))


def _texts(samples: TokenizedDataset, i: int, tokenizer: ChatTokenizer) -> tuple[str, str]:
    """What sample ``i`` reads, and what it is trained on."""
    ids = list(zip(samples.token_ids(i), samples.loss_mask(i), strict=True))
    read, trained = (
        tokenizer.decode([t for t, in_loss in ids if in_loss == side and t not in tokenizer.special_ids])
        for side in (0, 1)
    )
    return read, trained
