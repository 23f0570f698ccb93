"""Loads what a run trains with: tokenized data, the base model, its adapter and the plan of all steps."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import set_seed

from qlora_tui.catalog.local_models import ModelFiles
from qlora_tui.data.dataset import PreparedDataset, prepare_dataset
from qlora_tui.data.thinking_facts import prompt_thinking, thinking_sentences
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.data.untrained_tokens import token_ids
from qlora_tui.memory.step_choice import with_micro_batch, with_optimizer
from qlora_tui.runs.events import AdapterReady, DataReady, Environment, LayersStreamed, StepChosen
from qlora_tui.runs.initial_adapter import initial_adapter
from qlora_tui.runs.machine_checks import several_gpus_problem
from qlora_tui.training import model_loading, quantized_cache
from qlora_tui.training.adapter import add_lora, trained_parameters
from qlora_tui.training.base_model import PreparedBase, prepare_base
from qlora_tui.training.batches import plan_steps
from qlora_tui.training.checkpoints import require_same_base, require_unchanged, weights_identity
from qlora_tui.training.chunked_loss import find_head
from qlora_tui.training.compute_device import ComputeDevice, choose_attention
from qlora_tui.training.forgetting import replay_samples
from qlora_tui.training.fused.kernel_choice import find_kernels, kernel_remedy, refusal_of_kernels
from qlora_tui.training.gguf_conversion import cached_conversion, convert_cached
from qlora_tui.training.heap import release_free_memory
from qlora_tui.training.initial_adapter_weights import load_initial_adapter
from qlora_tui.training.library_versions import versions
from qlora_tui.training.memory_meter import MemoryMeter
from qlora_tui.training.preference.starting_adapter import StartingAdapter
from qlora_tui.training.prepared_run import AttemptContext, PreparedRun
from qlora_tui.training.step_verification import verify_first_step
from qlora_tui.training.streaming.copy_devices import copies_for
from qlora_tui.training.streaming.host_memory import HostMemory, require_host_memory
from qlora_tui.training.streaming.input_offload import InputOffload, offload_inputs
from qlora_tui.training.streaming.placement import decoder_layers
from qlora_tui.training.token_losses import use_token_losses
from qlora_tui.training.tokenized_dataset import TokenizedDataset
from qlora_tui.worker import JobStopped


def prepare_run(
    context: AttemptContext, files: ModelFiles, device: ComputeDevice, meter: MemoryMeter
) -> PreparedRun:
    """Load data and model, and verify the first step.

    Raises:
        StopRequested: a stop or pause was requested meanwhile.
        UserError: the recipe, the data or the model cannot be trained.
    """
    recipe, reporter = context.recipe, context.reporter
    if recipe.lora.init_from and context.checkpoint is None:
        # Before anything is loaded: it may have been deleted while this run waited.
        initial_adapter(recipe.lora.init_from)
    base_hash = weights_identity(files)
    if context.checkpoint is not None:
        require_same_base(context.checkpoint.state, files, base_hash)
    attention_path = choose_attention(recipe, device)
    folder = _model_folder(context, files)
    tokenizer = ChatTokenizer.from_folder(folder, recipe.model.chat_template)
    context = _with_settled_step(context)
    data = _tokenize(context, tokenizer)
    context = _choose_step(context, data, meter)
    recipe = context.recipe
    context.requests.raise_if_stop_requested()
    # Free memory before the model is loaded.
    tokenizer.release_caches()
    release_free_memory()
    _check_streaming(context, meter)
    is_stored = quantized_cache.is_stored(quantized_cache.cache_path(folder, recipe, device))
    reporter.phase(
        "loading", f"{recipe.model.id} on {device.name}{', quantized earlier' if is_stored else ''}"
    )
    base = prepare_base(
        folder,
        recipe,
        device,
        attention_path,
        meter.execution.loss,
        weighted=data.train.weighted,
        on_progress=lambda done, total: reporter.progress("loading", done, total),
    )
    kernels = find_kernels(device.torch_device, device.dtype)
    meter.use(base, triton=kernels is not None)
    if refusal := refusal_of_kernels(device.torch_device, device.dtype):
        reporter.health(
            "kernels_refused",
            f"The Triton kernels are not used on this GPU: {refusal}.",
            "Steps are correct, but norms, rotary positions and gated MLPs are slower. " + kernel_remedy(),
        )
    if base.router_loss_off:
        reporter.health(
            "router_loss_off",
            "The model's config asks for a loss that balances its experts (output_router_logits), which is "
            "switched off.",
            "Routers are frozen, so nothing is lost. Leave them out of lora.target_modules.",
        )
    if recipe.preference_method is not None:
        use_token_losses(base.model, base.loss_reason if base.loss == "stock" else find_head(base.model))
    _emit_environment(context, device, base)
    _emit_streamed(context, base, files)
    samples = _with_replay(context, data, base, tokenizer, device)
    step_plan = plan_steps(samples, recipe, padding_free=base.padding_free)
    model = _add_adapter(context, device, base, files, tokenizer)
    prepared = PreparedRun(
        **vars(context),
        device=device,
        files=files,
        base_hash=base_hash,
        tokenizer=tokenizer,
        data=data,
        samples=samples,
        base=base,
        step_plan=step_plan,
        model=model,
        meter=meter,
        starting_adapter=_starting_adapter(context, model),
    )
    release_free_memory()
    prepared = _verify(prepared)
    _emit_data(prepared)
    context.requests.raise_if_stop_requested()
    release_free_memory()
    return prepared


def _with_settled_step(context: AttemptContext) -> AttemptContext:
    """Continue with the optimizer and the rows at a time that were chosen before the checkpoint."""
    if context.checkpoint is None:
        return context
    recipe, training = context.recipe, context.recipe.training
    before = context.checkpoint.state.trained_recipe()
    recipe = with_optimizer(recipe, before.training.optimizer)
    if training.auto_micro_batch and before.effective_batch == recipe.effective_batch:
        recipe = with_micro_batch(recipe, before.training.micro_batch_size)
    return replace(context, recipe=recipe)


def _choose_step(context: AttemptContext, data: PreparedDataset, meter: MemoryMeter) -> AttemptContext:
    """Settle what the recipe still leaves to the free memory: the optimizer, and the rows at a time."""
    recipe, lengths = context.recipe, data.train.lengths()
    if not (recipe.training.optimizer == "auto" or recipe.training.auto_micro_batch):
        meter.set_recipe(recipe)
        return context
    longest = recipe.data.max_length if recipe.data.packing else min(max(lengths), recipe.data.max_length)
    free_bytes = min(context.dist.all_gather(meter.free_bytes()))
    # Unlike GPUs would choose differently, and processes with unlike optimizers drift apart.
    recipe = context.dist.broadcast(
        meter.choose_step(
            recipe,
            longest,
            free_bytes,
            after_running_out=context.has_run_out,
            processes=context.dist.world_size,
        )
    )
    training = recipe.training
    meter.set_recipe(recipe)
    context.reporter.emit(
        StepChosen(
            at=time.time(),
            micro_batch_size=training.micro_batch_size,
            gradient_accumulation=training.gradient_accumulation,
            optimizer=training.optimizer,
            effective_batch=recipe.effective_batch,
        )
    )
    return replace(context, recipe=recipe)


def _check_streaming(context: AttemptContext, meter: MemoryMeter) -> None:
    """Raise UserError where layers cannot be streamed, or inputs offloaded, on this machine."""
    if problem := several_gpus_problem(context.recipe, context.dist.world_size):
        raise problem
    if meter.estimate is not None and meter.estimate.host_bytes:
        require_host_memory(meter.estimate.host_bytes)


def _model_folder(context: AttemptContext, files: ModelFiles) -> Path:
    """The folder to load; the main process first converts a GGUF file for all."""
    if files.gguf_file is None:
        return files.folder
    file = files.folder / files.gguf_file
    if context.dist.is_main_process and cached_conversion(file) is None:
        _convert(context, file)
    context.dist.barrier()
    return convert_cached(file)


def _convert(context: AttemptContext, file: Path) -> None:
    """Convert a GGUF file. Raises StopRequested where a stop or pause was requested meanwhile."""
    reporter, requests = context.reporter, context.requests
    reporter.phase("converting", f"{file.name} to 16-bit safetensors")

    def should_stop() -> bool:
        # All processes of a run poll together, and the others are waiting at the barrier.
        if context.dist.world_size == 1:
            requests.poll()
        return requests.stop_kind() is not None

    try:
        convert_cached(
            file,
            lambda done, total: reporter.progress("converting", done * 100 // total, 100),
            should_stop,
        )
    except JobStopped:
        requests.raise_if_stop_requested()
        raise
    reporter.phase("loading", context.recipe.model.id)


def _tokenize(context: AttemptContext, tokenizer: ChatTokenizer) -> PreparedDataset:
    reporter = context.reporter
    reporter.phase("tokenizing")
    data = prepare_dataset(
        context.recipe,
        tokenizer,
        lambda progress: reporter.progress("tokenizing", round(progress.share * 100), 100),
    )
    for note in data.source_notes:
        reporter.log(note)
    for sentence in thinking_sentences(
        data.notes, data.counts.conversations, tokenizer.traits, context.recipe.data
    ):
        reporter.log(sentence)
    if context.checkpoint is not None:
        require_unchanged(context.checkpoint.state, context.recipe, data.data_hash)
    return data


def _with_replay(
    context: AttemptContext,
    data: PreparedDataset,
    base: PreparedBase,
    tokenizer: ChatTokenizer,
    device: ComputeDevice,
) -> TokenizedDataset:
    """The training samples, with the base's answers among them if the recipe replays some.

    The first attempt of a run computes and writes them. Raises StopRequested where a stop or pause was
    requested meanwhile, and OSError where they cannot be written.
    """
    recipe, reporter, path = context.recipe, context.reporter, context.run.replay_path
    count = replay_samples.replayed(len(data.train), recipe.training.replay_share)
    if not count:
        return data.train

    def report_progress(done: int, total: int) -> None:
        reporter.progress("loading", done, total)
        if context.dist.world_size == 1:
            context.requests.raise_if_stop_requested()

    if context.dist.is_main_process and context.checkpoint is None:
        reporter.phase("loading", "the base's answers to replay")
        thinking = prompt_thinking(recipe.data.thinking, data.notes)
        length, where = recipe.data.max_length, device.torch_device
        rows = replay_samples.compute_rows(
            base.model, count, tokenizer, thinking, length, where, report_progress
        )
        replay_samples.write_rows(path, rows)
    context.dist.barrier()
    return replay_samples.ReplaySamples(
        data.train, replay_samples.read_rows(path), recipe.training.replay_share
    )


def _add_adapter(
    context: AttemptContext,
    device: ComputeDevice,
    base: PreparedBase,
    files: ModelFiles,
    tokenizer: ChatTokenizer,
) -> Any:
    training, lora = context.recipe.training, context.recipe.lora
    # Seeded here, so that the initial adapter depends on the seed alone, not on random numbers that
    # earlier checks drew.
    set_seed(training.seed)
    model = add_lora(base.model, lora, files.architecture, token_ids(lora.trainable_tokens, tokenizer))
    if lora.init_from and context.checkpoint is None:
        load_initial_adapter(model, lora, files.architecture)
        context.reporter.log(f"The adapter starts from {lora.init_from}.")
    if training.gradient_checkpointing != "off":
        model_loading.checkpoint_activations(base.model)
    if training.gradient_checkpointing == "offload" and device.kind == "cuda":
        where = device.torch_device
        memory = HostMemory(where, lambda why: _warn_not_pinned(context, "offloaded inputs", why))
        offload = InputOffload(copies_for(where), memory.allocate)
        offload_inputs(decoder_layers(base.model, "training.gradient_checkpointing"), offload)
    if base.streamed is not None:
        base.streamed.use_checkpoints()
    context.reporter.emit(
        AdapterReady(
            at=time.time(),
            trained_parameters=trained_parameters(model),
            total_parameters=files.architecture.total_params,
        )
    )
    return model


def _starting_adapter(context: AttemptContext, model: Any) -> StartingAdapter | None:
    """The reference of a run that trains an adapter further; None where that is the base, or there is none.

    Raises:
        UserError: the file that the first attempt wrote cannot be read.
        OSError: it cannot be written.
    """
    if not context.recipe.keeps_starting_adapter:
        return None
    path = context.run.starting_adapter_path
    if context.checkpoint is not None:
        return StartingAdapter.read(path, model)
    starting = StartingAdapter.of(model)
    if context.dist.is_main_process:
        starting.write(path)
    return starting


def _verify(prepared: PreparedRun) -> PreparedRun:
    """Compare the first step with transformers and peft; the run without fast paths that failed."""
    prepared.requests.raise_if_stop_requested()
    prepared.reporter.phase("probing", "the first step, against transformers and peft")
    base = _keep_padding(prepared, verify_first_step(prepared))
    if "loss" in base.replaced and prepared.recipe.preference_method is not None:
        # The forward that verification restored knows no losses of single tokens.
        use_token_losses(base.model, base.loss_reason)
    if base.replaced:
        prepared.meter.use(base, triton=prepared.meter.execution.triton)
    if (base.attention, base.loss) != (prepared.base.attention, prepared.base.loss):
        _emit_environment(prepared, prepared.device, base)
    step_plan = prepared.step_plan
    if base.padding_free != prepared.base.padding_free:
        step_plan = plan_steps(prepared.samples, prepared.recipe, padding_free=base.padding_free)
    return replace(prepared, base=base, step_plan=step_plan)


def _keep_padding(context: AttemptContext, base: PreparedBase) -> PreparedBase:
    """Keep padding in a resumed run: packed sequences would hold other samples than its first steps did."""
    checkpoint = context.checkpoint
    if checkpoint is None or checkpoint.state.padding_free == base.padding_free:
        return base
    if base.padding_free:
        attention = f"{base.reference_attention}, padded sequences: as before the resume"
        return replace(base, packed=None, attention=attention)
    context.reporter.health(
        "rows_differ",
        "Before the resume, samples were packed. Now packed attention does not pass its check, "
        "and sequences are padded.",
        "Some samples of this epoch may be repeated and others skipped. Start a new run to avoid it.",
    )
    return base


def _emit_environment(context: AttemptContext, device: ComputeDevice, base: PreparedBase) -> None:
    context.reporter.emit(
        Environment(
            at=time.time(),
            device=device.name,
            device_kind=device.kind,
            device_total_bytes=device.total_bytes,
            compute_dtype=device.dtype_name,
            attention=base.attention,
            optimizer=context.recipe.training.optimizer,
            loss=base.loss_description,
            versions=versions(),
            kernels="torch" if find_kernels(device.torch_device, device.dtype) is None else "triton",
        )
    )


def _emit_streamed(context: AttemptContext, base: PreparedBase, files: ModelFiles) -> None:
    """Report which layers wait in host memory, and a warning where it could not be pinned."""
    streamed = base.streamed
    if streamed is None:
        return
    context.reporter.emit(
        LayersStreamed(
            at=time.time(),
            streamed_layers=len(streamed),
            layers=files.architecture.layers,
            host_bytes=streamed.host_bytes,
            slot_bytes=streamed.slot_bytes,
        )
    )
    if streamed.not_pinned:
        _warn_not_pinned(context, "streamed layers", streamed.not_pinned)


def _warn_not_pinned(context: AttemptContext, what: str, why: str) -> None:
    setting = "quantization.streamed_layers" if what == "streamed layers" else "data.max_length"
    context.reporter.health(
        "not_pinned",
        f"The host memory of {what} could not be pinned: {why}. Copies to the GPU do not overlap with its "
        "computation, so steps take longer.",
        f"Close other programs that hold pinned memory, or lower {setting}.",
    )


def _emit_data(prepared: PreparedRun) -> None:
    data, step_plan = prepared.data, prepared.step_plan
    train, total_steps = data.train, len(step_plan.steps)
    sides = 2 if prepared.recipe.trains_pairs else 1
    prepared.reporter.emit(
        DataReady(
            at=time.time(),
            samples=len(train) // sides,
            validation_samples=len(data.validation) // sides,
            tokens=sum(train.lengths()),
            trained_tokens=sum(train.trained_count(i) for i in range(len(train))),
            rows=step_plan.sequences_per_epoch,
            steps_per_epoch=step_plan.steps_per_epoch,
            total_steps=total_steps,
            data_hash=data.data_hash,
            dropped=data.counts.dropped,
            cut=data.counts.cut,
            thinking=prepared.thinking,
            replayed=replay_samples.replayed(len(train), prepared.recipe.training.replay_share),
        )
    )
    prepared.reporter.update(total_steps=total_steps)
