"""The chat source of a run, and the memory that a chat or a run needs. Loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tui.chat.chat_types import ADAPTER, BASE, ChatSource
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.recipe.fields import replace_settings
from qlora_tui.recipe.schema import Recipe, Thinking
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import first_event
from qlora_tui.runs.events import DataReady
from qlora_tui.runs.exports import read_exports
from qlora_tui.runs.result_weights import better_checkpoint

if TYPE_CHECKING:
    from qlora_tui.memory import Device
    from qlora_tui.runs.run_summary import RunSummary

_CONFIG = "adapter_config.json"


def run_source(run: RunDir) -> ChatSource:
    """Return the chat source of a run: its final adapter, if any, and every checkpoint, newest first."""
    adapters = {}
    if (run.adapter_dir / _CONFIG).is_file():
        adapters[ADAPTER] = str(run.adapter_dir)
    for step, folder in reversed(run.checkpoints()):
        adapters[checkpoint_name(step)] = str(folder)
    recipe = run.recipe()
    thinking = recipe.data.thinking if recipe.data.thinking != "auto" else _trained_thinking(run)
    return ChatSource(recipe=recipe, adapters=adapters, gguf_files=_gguf_files(run), thinking=thinking)


def _gguf_files(run: RunDir) -> dict[str, str]:
    """Return the run's exported GGUF files that still exist, the newest of each type."""
    return {
        f"{export.name}.gguf": export.status.paths[0]
        for export in reversed(read_exports(run))
        if export.request.form == "gguf" and export.status.paths and Path(export.status.paths[0]).is_file()
    }


def _trained_thinking(run: RunDir) -> Thinking:
    """Return the thinking setting of a run's training, read from the event that describes its data."""
    data = first_event(run.events_path, DataReady)
    # A run without this event has not read its data.
    return "auto" if data is None else data.thinking


def checkpoint_name(step: int) -> str:
    """Return the adapter name of a checkpoint, such as ``step-120``."""
    return f"step-{step}"


def checkpoint_step(adapter_name: str) -> int | None:
    """Return the step of a checkpoint's adapter name; None for another adapter."""
    step = adapter_name.removeprefix(checkpoint_name(0)[:-1])
    return int(step) if step != adapter_name and step.isdecimal() else None


def _checkpoint_steps(source: ChatSource) -> list[int]:
    return [step for name in source.adapters if (step := checkpoint_step(name)) is not None]


def adapter_label(adapter_name: str) -> str:
    """Return the label of an adapter: ``step 1,200`` for a checkpoint, and the name for any other adapter."""
    step = checkpoint_step(adapter_name)
    return adapter_name if step is None else f"step {step:,}"


def proposed_adapter(source: ChatSource, summary: RunSummary) -> str:
    """Return the name of the adapter that the app proposes for a run: the first of the following that exists.

    1. the saved checkpoint that is notably better than the last weights (:func:`better_checkpoint`)
    2. the final adapter
    3. the newest checkpoint
    4. an exported GGUF file
    5. the base model
    """
    better = better_checkpoint(summary, _checkpoint_steps(source))
    if better is not None:
        return checkpoint_name(better)
    return next(iter((*source.adapters, *source.gguf_files)), BASE)


def choose_adapter(source: ChatSource, *, base: bool = False, checkpoint: int | None = None) -> str:
    """Return the name of the selected adapter.

    By default, this is the final adapter or, if there is none, the newest checkpoint.

    Raises UserError if there is no such adapter.
    """
    if base:
        return BASE
    if checkpoint is not None:
        adapter_name = checkpoint_name(checkpoint)
        if adapter_name in source.adapters:
            return adapter_name
        steps = [v.removeprefix("step-") for v in source.adapters if v != ADAPTER]
        raise UserError(
            "No such checkpoint",
            what=f"The run has no checkpoint at step {checkpoint}.",
            fix=f"Available: {', '.join(steps)}." if steps else "This run has no checkpoint.",
            exit_code=EXIT_USAGE,
        )
    for adapter_name in source.adapters:
        return adapter_name
    raise UserError(
        "No adapter",
        what="The run has neither an adapter nor a checkpoint.",
        why="The run has not saved a checkpoint, or its files were deleted.",
        fix="Wait for a checkpoint if the run is training; otherwise train its recipe again. The base model "
        "answers without an adapter (--base).",
    )


_ONE_CONVERSATION = {
    "data.max_length": 2048,
    "training.micro_batch_size": 1,
    "training.gradient_accumulation": 1,
    "training.gradient_checkpointing": "on",
}


def chat_bytes(recipe: Recipe, device: Device) -> int | None:
    """Return the bytes that a chat with the model of ``recipe`` needs, as an upper bound; None if unknown.

    The bound is the memory of one training step on one conversation. This is more than an answer needs: in
    addition to the model and the keys and values of each layer, a step holds gradients and optimizer states.
    """
    return run_bytes(replace_settings(recipe, _ONE_CONVERSATION), device)


def run_bytes(recipe: Recipe, device: Device) -> int | None:
    """Return the bytes that a run of ``recipe`` needs, as an upper bound; None if unknown."""
    # Imported here: most callers only list sources.
    from qlora_tui.catalog.local_models import resolve_model
    from qlora_tui.memory import estimate

    try:
        architecture = resolve_model(recipe.model.id).architecture
        return estimate(recipe, architecture, device=device).band.high_bytes
    except UserError:
        return None
