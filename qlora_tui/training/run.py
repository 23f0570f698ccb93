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
from qlora_tui.runs.events import AdapterReady, DataReady, Environment, Finished, Paused, Stopped, Terminal
from qlora_tui.training import load
from qlora_tui.training.adapter import add_lora, trained_parameters
from qlora_tui.training.asked import EndedEarly, Requests
from qlora_tui.training.base import Base, prepare_base
from qlora_tui.training.batches import Schedule, computed_tokens, lay_out
from qlora_tui.training.checkpoints import Checkpoint, check_same
from qlora_tui.training.conversion import ConversionStopped, converted, kept_conversion
from qlora_tui.training.device import Device, choose_attention, find_device
from qlora_tui.training.edge import Edge, Setting
from qlora_tui.training.failure import is_out_of_memory
from qlora_tui.training.finish import take_best, write_adapter
from qlora_tui.training.heap import release_free_memory
from qlora_tui.training.loop import RunTrainer, Steps, arguments
from qlora_tui.training.measure import MemoryMeter
from qlora_tui.training.priority import give_way
from qlora_tui.training.probe import longest_micro_batch, probe
from qlora_tui.training.processes import Processes
from qlora_tui.training.reporter import Reporter
from qlora_tui.training.telemetry import Telemetry
from qlora_tui.training.verify import verify_first_step
from qlora_tui.training.versions import versions


class Attempt:
    """One attempt at a run, from recipe to adapter."""

    def __init__(
        self,
        run: RunDir,
        recipe: Recipe,
        checkpoint: Checkpoint | None,
        reporter: Reporter,
        requests: Requests,
        among: Processes,
    ) -> None:
        self.meter: MemoryMeter | None = None
        """There once the device is known: for explaining a lack of memory."""
        self._run = run
        self._recipe = recipe
        self._checkpoint = checkpoint
        self._reporter = reporter
        self._requests = requests
        self._among = among
        self._telemetry = Telemetry(run, reporter)

    def train(self) -> Terminal:
        """All of it; the event that ends the attempt. Raises whatever goes wrong."""
        try:
            return self._train()
        except EndedEarly as ended:
            step = self._checkpoint.step if self._checkpoint else 0
            if ended.kind == "pause":
                return Paused(at=time.time(), step=step)
            return Stopped(at=time.time(), step=step)
        except Exception as error:
            if self.meter is not None and self._among.count == 1 and is_out_of_memory(error):
                self.meter.remember(ran_out=True)
            raise
        finally:
            self._telemetry.stop()

    def _train(self) -> Terminal:
        recipe, reporter = self._recipe, self._reporter
        device = find_device(recipe, self._among.local_rank)
        if device.kind == "cpu":
            give_way()
        self._among.meet(on_cpu=device.kind == "cpu")
        self._may_end()
        reporter.phase("loading", recipe.model.id)
        files = resolve_model(recipe.model.id)
        attends = choose_attention(recipe, device)
        self.meter = MemoryMeter(recipe, files.architecture, device)
        if self._among.is_first:
            self._telemetry.start(on_card=device.kind == "cuda")
        folder = self._folder(files)
        tokenizer = ChatTokenizer.from_folder(folder, recipe.model.chat_template)
        data = self._prepare(tokenizer)
        self._may_end()
        tokenizer.release_caches()
        release_free_memory()
        reporter.phase("loading", f"{recipe.model.id} on {device.name}")
        base = prepare_base(
            folder, recipe, device, attends, self.meter.expected_loss, weighted=data.train.weighted
        )
        self.meter.trains_with(base.loss)
        self._tell_environment(device, base)
        schedule = lay_out(data.train, recipe, kept_apart=base.kept_apart)
        model = self._adapted(base, files, tokenizer)
        release_free_memory()
        base, schedule = self._verified(model, base, data, schedule, device, tokenizer)
        self._tell_data(data, schedule)
        self._may_end()
        release_free_memory()
        return self._steps(files, base, model, device, tokenizer, data, schedule)

    def _steps(
        self,
        files: ModelFiles,
        base: Base,
        model: Any,
        device: Device,
        tokenizer: ChatTokenizer,
        data: Prepared,
        schedule: Schedule,
    ) -> Terminal:
        run, recipe, reporter, checkpoint = self._run, self._recipe, self._reporter, self._checkpoint
        training = recipe.training
        pad_id = tokenizer.pad_id or 0
        steps = Steps(
            schedule,
            data.train,
            micro_batch=training.micro_batch,
            kept_apart=base.kept_apart,
            pad_id=pad_id,
            multiple=device.row_multiple,
            rank=self._among.rank,
            processes=self._among.count,
        )
        trainer = RunTrainer(
            model, arguments(recipe, device, len(schedule.steps), run.checkpoints_dir), steps
        )
        edge = Edge(
            Setting(
                run=run,
                recipe=recipe,
                device=device,
                tokenizer=tokenizer,
                validation=data.validation,
                data_hash=data.data_hash,
                kept_apart=base.kept_apart,
                pad_id=pad_id,
                thinking=for_prompts(recipe.data.thinking, data.notes),
                among=self._among,
            ),
            trainer,
            reporter,
            self._requests,
        )
        if checkpoint is not None:
            edge.restore(checkpoint.state)
        trainer.on_step = edge.step_done
        trainer.on_begin = partial(self._begin, edge, trainer, schedule, data, base)
        tokens_before = trainer.tokens
        trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
        seconds = time.perf_counter() - self._began - edge.evaluating_s
        return self._end(files, base, edge, trainer, tokenizer, seconds, trainer.tokens - tokens_before)

    def _verified(
        self,
        model: Any,
        base: Base,
        data: Prepared,
        schedule: Schedule,
        device: Device,
        tokenizer: ChatTokenizer,
    ) -> tuple[Base, Schedule]:
        """Compare the first step with the library's; what the run computes with from here on."""
        self._may_end()
        self._reporter.phase("probing", "comparing the first step with transformers and peft")
        verified = verify_first_step(
            model,
            base,
            data.train,
            schedule,
            self._recipe.training.micro_batch,
            device,
            tokenizer.pad_id or 0,
            self._among,
            self._reporter,
        )
        verified = self._laid_out_as_before(verified)
        if verified.replaced:
            assert self.meter is not None
            self.meter.learn_nothing()
        if (verified.attention, verified.loss) != (base.attention, base.loss):
            self._tell_environment(device, verified)
        if verified.kept_apart == base.kept_apart:
            return verified, schedule
        return verified, lay_out(data.train, self._recipe, kept_apart=verified.kept_apart)

    def _laid_out_as_before(self, base: Base) -> Base:
        """A resumed run keeps padded rows: packed ones would be others than those of its first steps."""
        if self._checkpoint is None or self._checkpoint.state.kept_apart == base.kept_apart:
            return base
        if base.kept_apart:
            attention = f"{base.library_attention}, padded rows: as before the resume"
            return replace(base, kept_apart=False, attention=attention)
        self._reporter.health(
            "rows_differ",
            "Before the resume, samples were packed into rows. Now packed attention does not pass its check, "
            "and rows are padded.",
            "Some samples of this epoch may come twice and others not at all. Start a new run to avoid it.",
        )
        return base

    def _begin(self, edge: Edge, trainer: RunTrainer, schedule: Schedule, data: Prepared, base: Base) -> None:
        self._may_end()
        self._reporter.phase("probing", "one step on the longest batch")
        rows = longest_micro_batch(
            schedule, data.train, self._recipe.training.micro_batch, kept_apart=base.kept_apart
        )
        assert self.meter is not None
        self.meter.expect(len(rows), computed_tokens(rows, data.train, kept_apart=base.kept_apart))
        probe(trainer, rows, fresh=self._checkpoint is None)
        self._reporter.tell(self.meter.measured("probe"))
        self._may_end()
        edge.begin()
        self._began = time.perf_counter()
        edge.evaluating_s = 0.0

    def _end(
        self,
        files: ModelFiles,
        base: Base,
        edge: Edge,
        trainer: RunTrainer,
        tokenizer: ChatTokenizer,
        seconds: float,
        tokens: int,
    ) -> Terminal:
        run, recipe, reporter = self._run, self._recipe, self._reporter
        assert self.meter is not None
        step = trainer.state.global_step
        reporter.tell(self.meter.measured("end"))
        if self._among.count == 1:
            self.meter.remember()
        if edge.ending == "paused":
            return Paused(at=time.time(), step=step)
        reporter.phase("saving", "adapter")
        reason, best = edge.reason, edge.progress.best_step
        if recipe.training.early_stopping and best is not None and best != step and edge.ending == "finished":
            reason = f"{reason}; {take_best(run, trainer.model, best)}"
        if self._among.is_first:
            write_adapter(
                run, trainer.model, recipe, base.folder, tokenizer, from_hub=files.source == "hub cache"
            )
        if edge.ending == "stopped":
            return Stopped(at=time.time(), step=step)
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
        )

    def _tokens_per_joule(self, tokens: int, kwh: float | None) -> float | None:
        """Real tokens learnt from; None where the energy is not known, or is one card's of several."""
        return tokens / (kwh * JOULES_A_KWH) if kwh and self._among.count == 1 else None

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

    def _adapted(self, base: Base, files: ModelFiles, tokenizer: ChatTokenizer) -> Any:
        training, lora = self._recipe.training, self._recipe.lora
        # Here, so that the initial adapter depends on the seed alone, not on what earlier checks have drawn.
        set_seed(training.seed)
        model = add_lora(base.model, lora, files.architecture, token_ids(lora.token_rows, tokenizer))
        if training.gradient_checkpointing:
            load.checkpoint_activations(base.model)
        self._reporter.tell(
            AdapterReady(
                at=time.time(),
                trained_parameters=trained_parameters(model),
                total_parameters=files.architecture.total_params,
            )
        )
        return model

    def _tell_environment(self, device: Device, base: Base) -> None:
        self._reporter.tell(
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

    def _tell_data(self, data: Prepared, schedule: Schedule) -> None:
        train, counts = data.train, data.counts
        self._reporter.tell(
            DataReady(
                at=time.time(),
                samples=len(train),
                validation_samples=len(data.validation),
                tokens=sum(train.lengths()),
                trained_tokens=sum(train.trained_count(i) for i in range(len(train))),
                rows=schedule.rows_per_epoch,
                steps_per_epoch=schedule.steps_per_epoch,
                total_steps=len(schedule.steps),
                data_hash=data.data_hash,
                dropped=counts.dropped,
                cut=counts.cut,
                thinking=for_prompts(self._recipe.data.thinking, data.notes),
            )
        )
        self._reporter.update(total_steps=len(schedule.steps))

    def _folder(self, files: ModelFiles) -> Path:
        """What is loaded: a GGUF file is converted first, by one process for all."""
        if files.gguf_file is None:
            return files.folder
        file = files.folder / files.gguf_file
        if self._among.is_first and kept_conversion(file) is None:
            self._convert(file)
        self._among.wait()
        return converted(file)

    def _convert(self, file: Path) -> None:
        """Convert a GGUF file; a request to stop or pause ends the conversion."""
        reporter, requests = self._reporter, self._requests
        reporter.phase("converting", f"{file.name} to 16-bit safetensors")

        def should_stop() -> bool:
            # The processes of a run look for requests together, and the others wait for this one.
            if self._among.count == 1:
                requests.look()
            return requests.ending() is not None

        try:
            converted(
                file,
                lambda done, total: reporter.progress("converting", done * 100 // total, 100),
                should_stop,
            )
        except ConversionStopped:
            self._may_end()
            raise
        reporter.phase("loading", self._recipe.model.id)

    def _may_end(self) -> None:
        """At the edge of a phase: leave where that was asked."""
        self._requests.look()
        kind = self._requests.ending()
        if kind is not None:
            raise EndedEarly(kind)
