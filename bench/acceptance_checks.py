"""The checks of :mod:`bench.gpu_acceptance`, and what they work with."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from bench.acceptance_model import make_rows
from qlora_tui.memory import Device
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Data, Lora, Model, Recipe, Source, Training
from qlora_tui.runs import actions, control
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import AnyEvent, Environment, Failed, Finished, MemoryMeasured, Started, Step
from qlora_tui.runs.follow import follow_events
from qlora_tui.runs.telemetry import TelemetryTail
from qlora_tui.runs.view import RunView


@dataclass
class Box:
    """What the checks work with."""

    model: Path
    rows: Path
    long_rows: Path
    """Every sample as long as the longest sequence of the grid."""
    scratch: Path
    size: str
    has_gpu: bool


@dataclass
class Outcome:
    """Of one check."""

    ok: bool
    says: str
    figures: dict[str, Any] = field(default_factory=dict)


class Skip(Exception):
    """A check that this box cannot make, and why."""


@dataclass
class Story:
    """A run that is over."""

    run: RunDir
    events: list[AnyEvent]

    def of(self, kind: type[Any]) -> list[Any]:
        """Its events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def losses(self) -> list[float]:
        """By step; a step done again counts as it was done last."""
        return list({step.step: step.loss for step in self.of(Step)}.values())

    def require_finished(self) -> Story:
        """AssertionError with its own words where it did not."""
        if not self.of(Finished):
            raise AssertionError(f"{self.run.path}: {self.events[-1]}")
        return self


def recipe_for(box: Box, **settings: Any) -> Recipe:
    """A short run of few steps; ``settings`` are dotted keys with ``__`` for the dot."""
    recipe = Recipe(
        model=Model(id=str(box.model)),
        lora=Lora(rank=16, dropout=0.05),
        data=Data(sources=(Source(path=str(box.rows)),), max_length=512, validation_fraction=0.1),
        training=Training(micro_batch_size=1, gradient_accumulation=2, max_steps=6, optimizer="adamw"),
    )
    for key, value in settings.items():
        recipe = replace_setting(recipe, key.replace("__", "."), value)
    return recipe


def trained(recipe: Recipe, on_event: Callable[[RunDir, AnyEvent], None] = lambda run, event: None) -> Story:
    """Queue it, as the app would, and wait."""
    return watched(actions.submit(recipe), on_event)


def watched(run: RunDir, on_event: Callable[[RunDir, AnyEvent], None] = lambda run, event: None) -> Story:
    """To its end."""
    story = Story(run, [])
    for event in follow_events(RunView(run)):
        story.events.append(event)
        on_event(run, event)
    return story


def loop(box: Box) -> Outcome:
    """From recipe to an adapter that plain peft loads and that speaks."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    story = trained(recipe_for(box)).require_finished()
    finished, environment = story.of(Finished)[0], story.of(Environment)[0]
    wants = "cuda" if box.has_gpu else "cpu"
    base = AutoModelForCausalLM.from_pretrained(box.model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(story.run.adapter_dir))
    tokenizer = AutoTokenizer.from_pretrained(story.run.adapter_dir)
    ids = tokenizer("hello", return_tensors="pt")
    said = tuned.generate(**ids, max_new_tokens=4, do_sample=False)
    return Outcome(
        environment.device_kind == wants and said.shape[1] > ids["input_ids"].shape[1],
        f"{finished.step} steps on {environment.device}, {environment.attention}, loss {environment.loss}, "
        f"{finished.tokens_per_s:,.0f} tokens/s; plain peft loads the adapter",
        {"tokens_per_s": finished.tokens_per_s, "environment": {"attention": environment.attention}},
    )


def resume(box: Box) -> Outcome:
    """A run paused at step 3 and resumed learns what one never paused does."""
    recipe = recipe_for(box, training__max_steps=8, training__checkpoint_every=1)
    whole = trained(recipe).require_finished().losses

    def pause(run: RunDir, event: AnyEvent) -> None:
        if isinstance(event, Step) and event.step == 3:
            # It may be too late: then there was nothing to resume, and the check says so.
            with suppress(Exception):
                control.send_request(run, "pause")

    paused = trained(recipe, pause)
    if paused.of(Finished):
        raise Skip("the run was over before it could be paused")
    actions.resume(paused.run)
    halves = watched(paused.run).require_finished().losses
    apart = max(abs(a - b) / abs(a) for a, b in zip(whole, halves, strict=True))
    # Sums on a GPU come in no fixed order.
    bound = 2e-2 if box.has_gpu else 1e-6
    return Outcome(
        len(whole) == len(halves) and apart <= bound,
        f"{len(halves)} losses, at most {apart:.1e} apart from those of a run never paused",
        {"apart": apart, "whole": whole, "resumed": halves},
    )


def where(box: Box) -> Device:
    """The box, as the estimate knows it; without what earlier runs on it taught."""
    import torch

    if not box.has_gpu:
        return Device(kind="cpu")
    return Device(kind="cuda", capability=torch.cuda.get_device_capability(0))


GRID = list(product((1, 4), (512, 2048), (True, False)))
"""Micro-batch, sequence length, checkpointing."""


def grid(box: Box) -> Outcome:
    """The estimate against torch's own count (on a CPU against the resident set)."""
    from qlora_tui.catalog.local_models import resolve_model
    from qlora_tui.memory import estimate

    rows, architecture = [], resolve_model(str(box.model)).architecture
    for micro_batch, length, checkpointing in GRID:
        recipe = recipe_for(
            box,
            data__sources=(Source(path=str(box.long_rows)),),
            data__validation_fraction=0.0,
            data__max_length=length,
            training__micro_batch_size=micro_batch,
            training__gradient_accumulation=1,
            training__gradient_checkpointing="on" if checkpointing else "off",
            training__max_steps=2,
        )
        story = trained(recipe)
        if not story.of(Finished) or any(e.micro_batch_size != micro_batch for e in story.of(Started)):
            rows.append({"micro_batch": micro_batch, "length": length, "checkpointing": checkpointing})
            continue
        measured = story.of(MemoryMeasured)[-1]
        estimated = estimate(recipe, architecture, device=where(box))
        foretold = estimated.allocated_bytes if box.has_gpu else measured.estimated_bytes
        counted = measured.allocated_bytes if box.has_gpu else measured.measured_bytes
        rows.append(
            {"micro_batch": micro_batch, "length": length, "checkpointing": checkpointing}
            | {"estimated_bytes": foretold, "measured_bytes": counted, "error": foretold / counted - 1}
            | {"process_estimated": measured.estimated_bytes, "process_measured": measured.measured_bytes}
        )
    errors = [abs(row["error"]) for row in rows if "error" in row]
    if not errors:
        raise AssertionError("no run of the grid fitted")
    mean, worst = sum(errors) / len(errors), max(errors)
    tier, note = ("allocated", "") if box.has_gpu else ("process", " (on a CPU nothing is asked of it)")
    return Outcome(
        not box.has_gpu or (mean <= 0.02 and worst <= 0.05),
        f"{len(errors)} of {len(rows)} fitted; {tier} foretold within {mean:.1%} on average, {worst:.1%} at "
        f"worst{note}",
        {"rows": rows, "mean": mean, "worst": worst},
    )


def memory(box: Box) -> Outcome:
    """A micro-batch that cannot fit: the run halves it and still trains on as many rows per step."""
    from qlora_tui.catalog.local_models import resolve_model
    from qlora_tui.memory import estimate

    if not box.has_gpu:
        raise Skip("memory runs out for real on a GPU only")
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    recipe = recipe_for(
        box,
        data__sources=(Source(path=str(box.long_rows)),),
        data__validation_fraction=0.0,
        data__max_length=2048,
        data__packing=False,
        training__gradient_checkpointing="off",
        training__gradient_accumulation=1,
        training__max_steps=2,
    )
    architecture, micro_batch = resolve_model(str(box.model)).architecture, 1
    while True:
        recipe = replace_setting(recipe, "training.micro_batch_size", micro_batch)
        if estimate(recipe, architecture, device=where(box)).allocated_bytes > 1.3 * total:
            break
        micro_batch *= 2
        if micro_batch > 4096:
            raise Skip("no micro-batch is too large for this GPU")
    more = make_rows(box.scratch / "many.json", 2 * micro_batch, long_words=2048)
    recipe = replace_setting(recipe, "data.sources", (Source(path=str(more)),))
    story = trained(recipe).require_finished()
    started = story.of(Started)
    batches = {event.micro_batch_size * event.gradient_accumulation for event in started}
    return Outcome(
        len(started) > 1 and batches == {micro_batch},
        f"micro-batch {' → '.join(f'{e.micro_batch_size}' for e in started)}, {micro_batch} rows per step",
        {"attempts": [event.micro_batch_size for event in started], "failures": len(story.of(Failed))},
    )


def nvml(box: Box) -> Outcome:
    """Telemetry of the GPU while it trains."""
    if not box.has_gpu:
        raise Skip("there is no GPU")
    story = trained(recipe_for(box, training__max_steps=40)).require_finished()
    samples = [s for s in TelemetryTail(story.run.path / "telemetry.jsonl").poll() if s.gpu is not None]
    readings = [sample.gpu for sample in samples if sample.gpu is not None]
    busiest = max((r.utilization_percent or 0 for r in readings), default=0)
    fullest = max((r.memory_used_bytes or 0 for r in readings), default=0)
    return Outcome(
        bool(readings) and busiest > 0 and fullest > 0,
        f"{len(readings)} readings, utilization up to {busiest} %, memory up to {fullest / 2**30:.1f} GiB, "
        f"{story.of(Finished)[0].energy_kwh or 0:.4f} kWh",
        {"readings": len(readings), "energy_kwh": story.of(Finished)[0].energy_kwh},
    )


def ways(box: Box) -> Outcome:
    """The usual script, TRL's packing and ours."""
    from bench.training import TRL_PYTHON, one_setting, shared_job

    if not box.has_gpu:
        raise Skip("bench/training.py measures it on a CPU")
    if not TRL_PYTHON.exists():
        raise Skip("`make bench-deps` makes the environment that TRL runs in")
    scratch = box.scratch / "ways"
    scratch.mkdir()
    args = argparse.Namespace(
        model=str(box.model), data=str(box.long_rows), samples=12, validation=4, dtype="bfloat16"
    )
    work = shared_job(args, scratch)
    results = {
        name: one_setting(replace(work, **changes), 3, scratch)
        for name, changes in {
            "dropout 0": {"checkpointing": True},
            "dropout 0.05": {"dropout": 0.05, "checkpointing": True},
        }.items()
    }
    times = {
        name: {key: each["c"]["tokens_per_s"] / each[key]["tokens_per_s"] for key in "ab"}
        for name, each in results.items()
    }
    return Outcome(
        all(ratio > 1 for each in times.values() for ratio in each.values()),
        "; ".join(f"{name}: {each['a']:.2f}× (a), {each['b']:.2f}× (b)" for name, each in times.items()),
        results,
    )


CHECKS: dict[str, Callable[[Box], Outcome]] = {
    "loop": loop,
    "resume": resume,
    "grid": grid,
    "memory": memory,
    "nvml": nvml,
    "ways": ways,
}
