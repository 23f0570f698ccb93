"""The stations of a run, in order: data, model, adapter, training, result."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import set_seed

from qlora_tui.catalog.local_models import ModelFiles, resolve_model
from qlora_tui.data.dataset import Prepared, prepare
from qlora_tui.data.thinking_facts import facts, for_prompts
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.data.untrained_tokens import token_ids
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.energy import JOULES_A_KWH, EnergyMeter
from qlora_tui.runs.events import AdapterReady, DataReady, Environment, Finished, Paused, RunEnded, Stopped
from qlora_tui.training import model_loading
from qlora_tui.training.adapter import add_lora, trained_parameters
from qlora_tui.training.base_model import PreparedBase, prepare_base
from qlora_tui.training.batches import StepPlan, computed_tokens, plan_steps
from qlora_tui.training.callbacks import RunCallback, RunContext
from qlora_tui.training.checkpoints import Checkpoint, check_same
from qlora_tui.training.compute_device import ComputeDevice, choose_attention, find_device
from qlora_tui.training.control_requests import ControlRequests, StopRequested
from qlora_tui.training.distributed import DistributedContext
from qlora_tui.training.failure import is_out_of_memory
from qlora_tui.training.final_adapter import load_best_weights, write_adapter
from qlora_tui.training.gguf_conversion import ConversionStopped, cached_conversion, convert_cached
from qlora_tui.training.heap import release_free_memory
from qlora_tui.training.library_versions import versions
from qlora_tui.training.memory_meter import MemoryMeter
from qlora_tui.training.memory_probe import longest_micro_batch, probe_memory
from qlora_tui.training.priority import lower_priority
from qlora_tui.training.reporter import Reporter
from qlora_tui.training.step_verification import verify_first_step
from qlora_tui.training.telemetry_recorder import TelemetryRecorder
from qlora_tui.training.trainer import RunTrainer, StepDataset, training_arguments


class TrainingAttempt:
    """One attempt at a run, from recipe to adapter."""

    def __init__(
        self,
        run: RunDir,
        recipe: Recipe,
        checkpoint: Checkpoint | None,
        reporter: Reporter,
        requests: ControlRequests,
        dist: DistributedContext,
    ) -> None:
        self.meter: MemoryMeter | None = None
        """There once the device is known: for explaining a lack of memory."""
        self._run = run
        self._recipe = recipe
        self._checkpoint = checkpoint
        self._reporter = reporter
        self._requests = requests
        self._dist = dist
        self._telemetry = TelemetryRecorder(run, reporter)

    def train(self) -> RunEnded:
        """All of it; the event that ends the attempt. Raises whatever goes wrong."""
        try:
            return self._train()
        except StopRequested as ended:
            step = self._checkpoint.step if self._checkpoint else 0
            if ended.kind == "pause":
                return Paused(at=time.time(), step=step)
            return Stopped(at=time.time(), step=step)
        except Exception as error:
            if self.meter is not None and self._dist.world_size == 1 and is_out_of_memory(error):
                self.meter.record(ran_out=True)
            raise
        finally:
            self._telemetry.stop()

    def _train(self) -> RunEnded:
        recipe, reporter = self._recipe, self._reporter
        device = find_device(recipe, self._dist.local_rank)
        if device.kind == "cpu":
            lower_priority()
        self._dist.initialize(on_cpu=device.kind == "cpu")
        self._raise_if_stop_requested()
        reporter.phase("loading", recipe.model.id)
        files = resolve_model(recipe.model.id)
        attention_path = choose_attention(recipe, device)
        self.meter = MemoryMeter(recipe, files.architecture, device)
        if self._dist.is_main_process:
            self._telemetry.start(on_gpu=device.kind == "cuda")
        folder = self._model_folder(files)
        tokenizer = ChatTokenizer.from_folder(folder, recipe.model.chat_template)
        data = self._prepare(tokenizer)
        self._raise_if_stop_requested()
        tokenizer.release_caches()
        release_free_memory()
        reporter.phase("loading", f"{recipe.model.id} on {device.name}")
        base = prepare_base(
            folder, recipe, device, attention_path, self.meter.expected_loss, weighted=data.train.weighted
        )
        self.meter.set_loss(base.loss)
        self._emit_environment(device, base)
        step_plan = plan_steps(data.train, recipe, packing_isolated=base.packing_isolated)
        model = self._add_adapter(base, files, tokenizer)
        release_free_memory()
        base, step_plan = self._verify(model, base, data, step_plan, device, tokenizer)
        self._emit_data(data, step_plan)
        self._raise_if_stop_requested()
        release_free_memory()
        return self._train_steps(files, base, model, device, tokenizer, data, step_plan)

    def _train_steps(
        self,
        files: ModelFiles,
        base: PreparedBase,
        model: Any,
        device: ComputeDevice,
        tokenizer: ChatTokenizer,
        data: Prepared,
        step_plan: StepPlan,
    ) -> RunEnded:
        run, recipe, reporter, checkpoint = self._run, self._recipe, self._reporter, self._checkpoint
        training = recipe.training
        pad_id = tokenizer.pad_id or 0
        steps = StepDataset(
            step_plan,
            data.train,
            micro_batch=training.micro_batch_size,
            packing_isolated=base.packing_isolated,
            pad_id=pad_id,
            multiple=device.row_multiple,
            rank=self._dist.rank,
            processes=self._dist.world_size,
        )
        trainer = RunTrainer(
            model, training_arguments(recipe, device, len(step_plan.steps), run.checkpoints_dir), steps
        )
        callback = RunCallback(
            RunContext(
                run=run,
                recipe=recipe,
                device=device,
                tokenizer=tokenizer,
                validation=data.validation,
                data_hash=data.data_hash,
                packing_isolated=base.packing_isolated,
                pad_id=pad_id,
                thinking=for_prompts(recipe.data.thinking, data.notes),
                dist=self._dist,
            ),
            trainer,
            reporter,
            self._requests,
        )
        if checkpoint is not None:
            callback.restore(checkpoint.state)
        trainer.on_step = callback.on_step_end
        trainer.on_begin = partial(self._on_train_begin, callback, trainer, step_plan, data, base)
        tokens_before = trainer.tokens
        trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
        seconds = time.perf_counter() - self._train_started_at - callback.overhead_s
        return self._finish(
            files, base, callback, trainer, tokenizer, seconds, trainer.tokens - tokens_before
        )

    def _verify(
        self,
        model: Any,
        base: PreparedBase,
        data: Prepared,
        step_plan: StepPlan,
        device: ComputeDevice,
        tokenizer: ChatTokenizer,
    ) -> tuple[PreparedBase, StepPlan]:
        """Compare the first step with the library's; what the run computes with from here on."""
        self._raise_if_stop_requested()
        self._reporter.phase("probing", "comparing the first step with transformers and peft")
        verified = verify_first_step(
            model,
            base,
            data.train,
            step_plan,
            self._recipe.training.micro_batch_size,
            device,
            tokenizer.pad_id or 0,
            self._dist,
            self._reporter,
        )
        verified = self._keep_row_layout(verified)
        if verified.replaced:
            assert self.meter is not None
            self.meter.stop_recording()
        if (verified.attention, verified.loss) != (base.attention, base.loss):
            self._emit_environment(device, verified)
        if verified.packing_isolated == base.packing_isolated:
            return verified, step_plan
        return verified, plan_steps(data.train, self._recipe, packing_isolated=verified.packing_isolated)

    def _keep_row_layout(self, base: PreparedBase) -> PreparedBase:
        """A resumed run keeps padded rows: packed ones would be others than those of its first steps."""
        if self._checkpoint is None or self._checkpoint.state.packing_isolated == base.packing_isolated:
            return base
        if base.packing_isolated:
            attention = f"{base.library_attention}, padded rows: as before the resume"
            return replace(base, packing_isolated=False, attention=attention)
        self._reporter.health(
            "rows_differ",
            "Before the resume, samples were packed into rows. Now packed attention does not pass its check, "
            "and rows are padded.",
            "Some samples of this epoch may come twice and others not at all. Start a new run to avoid it.",
        )
        return base

    def _on_train_begin(
        self,
        callback: RunCallback,
        trainer: RunTrainer,
        step_plan: StepPlan,
        data: Prepared,
        base: PreparedBase,
    ) -> None:
        self._raise_if_stop_requested()
        self._reporter.phase("probing", "one step on the longest batch")
        rows = longest_micro_batch(
            step_plan,
            data.train,
            self._recipe.training.micro_batch_size,
            packing_isolated=base.packing_isolated,
        )
        assert self.meter is not None
        self.meter.set_longest_batch(
            len(rows), computed_tokens(rows, data.train, packing_isolated=base.packing_isolated)
        )
        probe_memory(trainer, rows, fresh=self._checkpoint is None)
        self._reporter.emit(self.meter.measure("probe"))
        self._raise_if_stop_requested()
        callback.on_train_begin()
        self._train_started_at = time.perf_counter()
        callback.overhead_s = 0.0

    def _finish(
        self,
        files: ModelFiles,
        base: PreparedBase,
        callback: RunCallback,
        trainer: RunTrainer,
        tokenizer: ChatTokenizer,
        seconds: float,
        tokens: int,
    ) -> RunEnded:
        run, recipe, reporter = self._run, self._recipe, self._reporter
        assert self.meter is not None
        step = trainer.state.global_step
        reporter.emit(self.meter.measure("end"))
        if self._dist.world_size == 1:
            self.meter.record()
        if callback.outcome == "paused":
            return Paused(at=time.time(), step=step)
        reporter.phase("saving", "adapter")
        reason, best = callback.reason, callback.progress.best_step
        if (
            recipe.training.early_stopping
            and best is not None
            and best != step
            and callback.outcome == "finished"
        ):
            reason = f"{reason}; {load_best_weights(run, trainer.model, best)}"
        checksums = ""
        if self._dist.is_main_process:
            checksums = write_adapter(
                run, trainer.model, recipe, base.folder, tokenizer, from_hub=files.source == "hub cache"
            )
        if callback.outcome == "stopped":
            return Stopped(at=time.time(), step=step, checksums=checksums)
        self._telemetry.stop()
        energy = EnergyMeter(run.telemetry_path)
        energy.read_all()
        return Finished(
            at=time.time(),
            step=step,
            seconds=seconds,
            tokens_per_s=tokens / max(seconds, 1e-9),
            reason=reason,
            energy_kwh=energy.kwh,
            tokens_per_joule=self._tokens_per_joule(trainer.tokens, energy.kwh),
            checksums=checksums,
        )

    def _tokens_per_joule(self, tokens: int, kwh: float | None) -> float | None:
        """Real tokens learnt from; None where the energy is not known, or is one card's of several."""
        return tokens / (kwh * JOULES_A_KWH) if kwh and self._dist.world_size == 1 else None

    def _prepare(self, tokenizer: ChatTokenizer) -> Prepared:
        reporter = self._reporter
        reporter.phase("tokenizing")
        data = prepare(
            self._recipe,
            tokenizer,
            lambda progress: reporter.progress("tokenizing", round(progress.share * 100), 100),
        )
        for sentence in facts(data.notes, data.counts.conversations, tokenizer.traits, self._recipe.data):
            reporter.log(sentence)
        if self._checkpoint is not None:
            check_same(self._checkpoint.state, self._recipe, data.data_hash)
        return data

    def _add_adapter(self, base: PreparedBase, files: ModelFiles, tokenizer: ChatTokenizer) -> Any:
        training, lora = self._recipe.training, self._recipe.lora
        # Here, so that the initial adapter depends on the seed alone, not on what earlier checks have drawn.
        set_seed(training.seed)
        model = add_lora(base.model, lora, files.architecture, token_ids(lora.trainable_tokens, tokenizer))
        if training.gradient_checkpointing:
            model_loading.checkpoint_activations(base.model)
        self._reporter.emit(
            AdapterReady(
                at=time.time(),
                trained_parameters=trained_parameters(model),
                total_parameters=files.architecture.total_params,
            )
        )
        return model

    def _emit_environment(self, device: ComputeDevice, base: PreparedBase) -> None:
        self._reporter.emit(
            Environment(
                at=time.time(),
                device=device.name,
                device_kind=device.kind,
                device_total_bytes=device.total_bytes,
                compute_dtype=device.dtype_name,
                attention=base.attention,
                optimizer=self._recipe.training.optimizer,
                loss=base.loss,
                versions=versions(),
            )
        )

    def _emit_data(self, data: Prepared, step_plan: StepPlan) -> None:
        train, counts = data.train, data.counts
        self._reporter.emit(
            DataReady(
                at=time.time(),
                samples=len(train),
                validation_samples=len(data.validation),
                tokens=sum(train.lengths()),
                trained_tokens=sum(train.trained_count(i) for i in range(len(train))),
                rows=step_plan.rows_per_epoch,
                steps_per_epoch=step_plan.steps_per_epoch,
                total_steps=len(step_plan.steps),
                data_hash=data.data_hash,
                dropped=counts.dropped,
                cut=counts.cut,
                thinking=for_prompts(self._recipe.data.thinking, data.notes),
            )
        )
        self._reporter.update(total_steps=len(step_plan.steps))

    def _model_folder(self, files: ModelFiles) -> Path:
        """What is loaded: a GGUF file is converted first, by one process for all."""
        if files.gguf_file is None:
            return files.folder
        file = files.folder / files.gguf_file
        if self._dist.is_main_process and cached_conversion(file) is None:
            self._convert(file)
        self._dist.barrier()
        return convert_cached(file)

    def _convert(self, file: Path) -> None:
        """Convert a GGUF file; a request to stop or pause ends the conversion."""
        reporter, requests = self._reporter, self._requests
        reporter.phase("converting", f"{file.name} to 16-bit safetensors")

        def should_stop() -> bool:
            # The processes of a run look for requests together, and the others wait for this one.
            if self._dist.world_size == 1:
                requests.poll()
            return requests.stop_kind() is not None

        try:
            convert_cached(
                file,
                lambda done, total: reporter.progress("converting", done * 100 // total, 100),
                should_stop,
            )
        except ConversionStopped:
            self._raise_if_stop_requested()
            raise
        reporter.phase("loading", self._recipe.model.id)

    def _raise_if_stop_requested(self) -> None:
        """At the edge of a phase: leave where that was asked."""
        self._requests.poll()
        kind = self._requests.stop_kind()
        if kind is not None:
            raise StopRequested(kind)
