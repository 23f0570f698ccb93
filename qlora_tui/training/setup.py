"""Loads everything that a run trains with: tokenized data, base model, adapter and the plan of all steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import set_seed

from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.data import step_plan
from qlora_tui.data.dataset import PreparedDataset, prepare_dataset
from qlora_tui.data.dataset_report import prompt_thinking, thinking_sentences
from qlora_tui.data.step_plan import TokenizedDataset, plan_steps
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.data.trainable_tokens import token_ids
from qlora_tui.formatting import pluralize
from qlora_tui.memory.execution import AttentionPath
from qlora_tui.memory.step_choice import with_micro_batch, with_optimizer
from qlora_tui.runs.actions import initial_adapter
from qlora_tui.runs.events import AdapterReady, DataReady, Environment, LayersStreamed, StepChosen
from qlora_tui.training import quantized_cache, replay
from qlora_tui.training.adapter import (
    MISREAD_REMEDY,
    StartingAdapter,
    add_lora,
    load_initial_adapter,
    misread_by_peft,
    trained_parameters,
)
from qlora_tui.training.checkpoints import (
    require_same_base,
    require_same_processes,
    require_unchanged,
    weights_identity,
)
from qlora_tui.training.checks.first_step import require_text_model, verify_first_step
from qlora_tui.training.compute_device import choose_attention, versions
from qlora_tui.training.fused.kernel_choice import find_kernels, kernel_remedy, refusal_of_kernels
from qlora_tui.training.gguf_conversion import cached_conversion, convert_cached
from qlora_tui.training.host import release_free_memory
from qlora_tui.training.library_names import require_names
from qlora_tui.training.memory_meter import MemoryMeter
from qlora_tui.training.model import PreparedBase, checkpoint_activations, prepare_base
from qlora_tui.training.run import Run
from qlora_tui.training.streaming.host_memory import HostMemory, require_host_memory
from qlora_tui.training.streaming.input_offload import InputOffload, offload_inputs
from qlora_tui.training.streaming.placement import movable_layers
from qlora_tui.training.streaming.slots import Copies
from qlora_tui.worker import JobStopped


def setup(run: Run) -> None:
    """Load the data, load the model onto ``run.device``, and verify the first step.

    Raises:
        StopRequested: a stop or pause was requested during setup.
        UserError: the recipe, the data or the model cannot be trained.
    """
    require_names()
    run.reporter.phase("loading", f"tokenizer of {run.recipe.model.id}")
    run.files = resolve_model(run.recipe.model.id)
    run.meter = MemoryMeter(run.recipe, run.files.architecture, run.device)
    _check_inputs(run)
    attention_path = choose_attention(run.recipe, run.device)
    folder = _model_folder(run)

    run.tokenizer = ChatTokenizer.from_folder(folder, run.recipe.model.chat_template)
    _keep_earlier_choices(run)
    run.data = _tokenize(run)
    _choose_step(run)
    run.requests.raise_if_stop_requested()
    # Free memory before the model is loaded.
    run.tokenizer.release_caches()
    release_free_memory()

    _check_streaming(run)
    run.base = _load_base(run, folder, attention_path)
    run.samples = _with_replay(run)
    run.step_plan = plan_steps(run.samples, run.recipe, padding_free=run.base.padding_free)
    run.model = _add_adapter(run)
    run.starting_adapter = _starting_adapter(run)
    release_free_memory()

    _verify(run)
    _report_data(run)
    run.requests.raise_if_stop_requested()
    release_free_memory()


def _check_inputs(run: Run) -> None:
    """Raise UserError if the initial adapter is missing, or if the base or the number of processes has
    changed since the checkpoint.
    """
    if run.recipe.lora.init_from and run.checkpoint is None:
        # Check before anything is loaded: the adapter may have been deleted while this run was queued.
        initial_adapter(run.recipe.lora.init_from)
    run.base_hash = weights_identity(run.files)
    if run.checkpoint is not None:
        require_same_base(run.checkpoint.state, run.files, run.base_hash)
        require_same_processes(run.checkpoint, run.dist.world_size)


def _model_folder(run: Run) -> Path:
    """Return the folder to load. A GGUF file is first converted by the main process, for all processes.

    Raises:
        StopRequested: a stop or pause was requested during the conversion.
    """
    if run.files.gguf_file is None:
        return run.files.folder
    file = run.files.folder / run.files.gguf_file
    if run.dist.is_main_process and cached_conversion(file) is None:
        run.reporter.phase("converting", f"{file.name} to 16-bit safetensors")

        def should_stop() -> bool:
            # All processes of a run must poll together, but the others are waiting at the barrier.
            if run.dist.world_size == 1:
                run.requests.poll()
            return run.requests.stop_kind() is not None

        try:
            convert_cached(
                file,
                lambda done, total: run.reporter.progress("converting", done * 100 // total, 100),
                should_stop,
            )
        except JobStopped:
            run.requests.raise_if_stop_requested()
            raise
        run.reporter.phase("loading", f"tokenizer of {run.recipe.model.id}")
    run.dist.barrier()
    return convert_cached(file)


def _keep_earlier_choices(run: Run) -> None:
    """Use the optimizer that was chosen before the checkpoint, and the micro-batch size too if it is
    automatic and the effective batch is unchanged.
    """
    if run.checkpoint is None:
        return
    recipe, before = run.recipe, run.checkpoint.state.trained_recipe()
    is_same_step = before.effective_batch == recipe.effective_batch
    run.recipe = with_optimizer(recipe, before.training.optimizer)
    if recipe.training.auto_micro_batch and is_same_step:
        run.recipe = with_micro_batch(run.recipe, before.training.micro_batch_size)


def _tokenize(run: Run) -> PreparedDataset:
    reporter = run.reporter
    reporter.phase("tokenizing")
    data = prepare_dataset(
        run.recipe,
        run.tokenizer,
        lambda progress: reporter.progress("tokenizing", round(progress.share * 100), 100),
    )
    for note in data.source_notes:
        reporter.log(note)
    for sentence in thinking_sentences(
        data.notes, data.counts.conversations, run.tokenizer.traits, run.recipe.data
    ):
        reporter.log(sentence)
    if run.checkpoint is not None:
        require_unchanged(run.checkpoint.state, run.recipe, data.data_hash)
    return data


def _choose_step(run: Run) -> None:
    """Choose the automatic settings that depend on free memory: the optimizer and the micro-batch size."""
    recipe, lengths = run.recipe, run.data.train.lengths()
    if not (recipe.training.optimizer == "auto" or recipe.training.auto_micro_batch):
        run.meter.set_recipe(recipe)
        return
    longest = recipe.data.max_length if recipe.data.packing else min(max(lengths), recipe.data.max_length)
    free_bytes = min(run.dist.all_gather(run.meter.free_bytes()))
    # Different GPUs would choose differently, and processes with different optimizers diverge.
    run.recipe = run.dist.broadcast(
        run.meter.choose_step(recipe, longest, free_bytes, after_running_out=run.has_run_out)
    )
    training = run.recipe.training
    run.meter.set_recipe(run.recipe)
    run.reporter.emit(
        StepChosen(
            micro_batch_size=training.micro_batch_size,
            gradient_accumulation=training.gradient_accumulation,
            optimizer=training.optimizer,
            effective_batch=run.recipe.effective_batch,
        )
    )


def _check_streaming(run: Run) -> None:
    """Raise UserError if the machine lacks the memory for streamed layers or offloaded inputs."""
    if run.meter.estimate is not None and run.meter.estimate.host_bytes:
        require_host_memory(run.meter.estimate.host_bytes)


def _load_base(run: Run, folder: Path, attention_path: AttentionPath) -> PreparedBase:
    """Load the frozen base, and report its dtype, attention and loss."""
    recipe, device, reporter = run.recipe, run.device, run.reporter
    is_stored = quantized_cache.is_stored(quantized_cache.cache_path(folder, recipe, device))
    how = "quantized earlier" if is_stored else f"to {recipe.quantization.method}"
    reporter.phase("loading", f"weights of {recipe.model.id}, {how}, on {device.name}")
    base = prepare_base(
        folder,
        recipe,
        device,
        attention_path,
        run.meter.execution.loss,
        weighted=run.data.train.weighted,
        on_progress=lambda done, total: reporter.progress("loading", done, total),
    )
    run.meter.use(base, triton=find_kernels(device.torch_device, device.dtype) is not None)
    if refusal := refusal_of_kernels(device.torch_device, device.dtype):
        reporter.health(
            "kernels_refused",
            f"The Triton kernels are not used on this GPU: {refusal}.",
            "Steps are correct, but norms, rotary positions and gated MLPs are slower. " + kernel_remedy(),
        )
    if base.router_loss_off:
        reporter.health(
            "router_loss_off",
            "The model's config asks for a loss that balances its experts (output_router_logits). This run "
            "switches that loss off.",
            "Routers are frozen, so training does not need that loss. Leave routers out of "
            "lora.target_modules.",
        )
    _report_environment(run, base)
    if base.streamed is not None:
        reporter.emit(
            LayersStreamed(
                streamed_layers=len(base.streamed),
                layers=run.files.architecture.layers,
                host_bytes=base.streamed.host_bytes,
                slot_bytes=base.streamed.slot_bytes,
            )
        )
        if base.streamed.not_pinned:
            _warn_not_pinned(run, "streamed layers", base.streamed.not_pinned)
    return base


def _with_replay(run: Run) -> TokenizedDataset:
    """Return the training samples, mixed with the base's answers if the recipe replays some.

    An attempt without a checkpoint computes the answers and writes them; a resume reads them.

    Raises:
        StopRequested: a stop or pause was requested while the answers were computed.
        UserError: the answers cannot be read.
        OSError: the answers cannot be written.
    """
    recipe, path, train = run.recipe, run.directory.replay_path, run.data.train
    count = step_plan.replayed(len(train), recipe.training.replay_share)
    if not count:
        return train

    def report_progress(done: int, total: int) -> None:
        run.reporter.progress("loading", done, total)
        if run.dist.world_size == 1:
            run.requests.raise_if_stop_requested()

    if run.dist.is_main_process and run.checkpoint is None:
        run.reporter.phase("loading", "the base's answers to replay")
        rows = replay.compute_rows(
            run.base.model,
            count,
            run.tokenizer,
            prompt_thinking(recipe.data.thinking, run.data.notes),
            recipe.data.max_length,
            run.device.torch_device,
            report_progress,
        )
        replay.write_rows(path, rows)
    run.dist.barrier()
    return replay.ReplaySamples(train, replay.read_rows(path), recipe.training.replay_share)


def _add_adapter(run: Run) -> Any:
    training, lora, base = run.recipe.training, run.recipe.lora, run.base
    architecture = run.files.architecture
    # Seed here, so that the initial adapter depends only on the seed and not on random numbers drawn by
    # earlier checks.
    set_seed(training.seed)
    model = add_lora(base.model, lora, architecture, token_ids(lora.trainable_tokens, run.tokenizer))
    if lora.init_from and run.checkpoint is None:
        load_initial_adapter(model, lora, architecture)
        run.reporter.log(f"The adapter starts from {lora.init_from}.")
    if misread := misread_by_peft(base.model.config.model_type, model.peft_config["default"].target_modules):
        run.reporter.health(
            "peft_misreads",
            f"Plain peft mistakes {pluralize(len(misread), 'target')} of this adapter, such as {misread[0]}, "
            "for routed experts.",
            MISREAD_REMEDY,
        )
    if training.gradient_checkpointing != "off" and not checkpoint_activations(base.model):
        run.reporter.health(
            "not_checkpointed",
            f"{type(base.model).__name__} does not support gradient checkpointing, so it is off in this run.",
            "The activations of every layer are kept: lower Sequence length or Micro-batch size if "
            "memory runs out.",
        )
    if training.gradient_checkpointing == "offload" and run.device.kind == "cuda":
        where = run.device.torch_device
        memory = HostMemory(where, lambda why: _warn_not_pinned(run, "offloaded inputs", why))
        offload = InputOffload(Copies(where), memory.allocate)
        offload_inputs(movable_layers(base.model, "training.gradient_checkpointing"), offload)
    if base.streamed is not None:
        base.streamed.use_checkpoints()
    run.reporter.emit(
        AdapterReady(
            trained_parameters=trained_parameters(model),
            total_parameters=architecture.total_params,
        )
    )
    return model


def _starting_adapter(run: Run) -> StartingAdapter | None:
    """Return the adapter that is the run's reference; None if the reference is the base, or there is none.

    Raises:
        UserError: the file that the first attempt wrote cannot be read.
        OSError: the file cannot be written.
    """
    if not run.recipe.keeps_starting_adapter:
        return None
    path = run.directory.starting_adapter_path
    if run.checkpoint is not None:
        return StartingAdapter.read(path, run.model)
    starting = StartingAdapter.of(run.model)
    if run.dist.is_main_process and run.keeps_files:
        starting.write(path)
    return starting


def _verify(run: Run) -> None:
    """Compare the first step with transformers and peft, and switch off the fast paths that failed."""
    run.requests.raise_if_stop_requested()
    run.reporter.phase("probing", "the first step, against transformers and peft")
    require_text_model(run)
    before, base = run.base, _keep_padding(run, verify_first_step(run))
    if base.replaced:
        run.meter.use(base, triton=run.meter.execution.triton)
    if (base.attention, base.loss) != (before.attention, before.loss):
        _report_environment(run, base)
    if base.padding_free != before.padding_free:
        run.step_plan = plan_steps(run.samples, run.recipe, padding_free=base.padding_free)
    run.base = base


def _keep_padding(run: Run, base: PreparedBase) -> PreparedBase:
    """If a resumed run began with padded sequences, return the base with padded sequences again, because
    packed sequences would change which samples each step contains. If the run began with packed sequences
    that are no longer possible, warn.
    """
    checkpoint = run.checkpoint
    if checkpoint is None or checkpoint.state.padding_free == base.padding_free:
        return base
    if base.padding_free:
        attention = f"{base.reference_attention}, padded sequences: as before the resume"
        return replace(base, packed=None, attention=attention)
    run.reporter.health(
        "rows_differ",
        "Before the resume, samples were packed. Now packed attention does not pass its check, "
        "and sequences are padded.",
        "Some samples of this epoch may be repeated and others skipped. To avoid this, start a new run.",
    )
    return base


def _report_environment(run: Run, base: PreparedBase) -> None:
    device = run.device
    run.reporter.emit(
        Environment(
            device=device.name,
            device_kind=device.kind,
            device_total_bytes=device.total_bytes,
            compute_dtype=device.dtype_name,
            attention=base.attention,
            optimizer=run.recipe.training.optimizer,
            loss=base.loss_description,
            versions=versions(),
            kernels="torch" if find_kernels(device.torch_device, device.dtype) is None else "triton",
        )
    )


def _warn_not_pinned(run: Run, what: str, why: str) -> None:
    setting = "quantization.streamed_layers" if what == "streamed layers" else "data.max_length"
    run.reporter.health(
        "not_pinned",
        f"The host memory of {what} could not be pinned: {why}. Copies to the GPU do not overlap with its "
        "computation, so steps take longer.",
        f"Close other programs that hold pinned memory, or lower {setting}.",
    )


def _report_data(run: Run) -> None:
    data, train, total_steps = run.data, run.data.train, len(run.step_plan.steps)
    sides = 2 if run.recipe.trains_pairs else 1
    run.reporter.emit(
        DataReady(
            samples=len(train) // sides,
            validation_samples=len(data.validation) // sides,
            tokens=sum(train.lengths()),
            trained_tokens=sum(train.trained_count(i) for i in range(len(train))),
            rows=run.step_plan.sequences_per_epoch,
            steps_per_epoch=run.step_plan.steps_per_epoch,
            total_steps=total_steps,
            data_hash=data.data_hash,
            dropped=data.counts.dropped,
            cut=data.counts.cut,
            thinking=run.thinking,
            replayed=step_plan.replayed(len(train), run.recipe.training.replay_share),
        )
    )
    run.reporter.update(total_steps=total_steps)
