"""Checks of the loop from recipe to adapter: whether it runs on this GPU, and exactly."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from bench.acceptance.context import CheckContext, CheckSkipped, Outcome
from bench.acceptance.runs import EndedRun, follow, short_recipe, train
from bench.support.child_processes import python_module
from qlora_tui.errors import UserError
from qlora_tui.gpu.torch_env import faster_imports
from qlora_tui.paths import state_dir
from qlora_tui.runs import actions, control
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import (
    AnyEvent,
    CheckpointSaved,
    Environment,
    Finished,
    Health,
    LayersKept,
    Started,
    Step,
    StepVerified,
    Stopped,
)
from qlora_tui.runs.telemetry import TelemetryTail

_PAUSED_STEPS = 40
"""Steps of a run that is to be paused. On a fast GPU, eight are over before the pause arrives."""
_CPU_STEPS = 12
_CHAT_RATIO = 2.0
"""Multiple of plain ``generate``'s tokens per second that the chat must reach with a model of 8B."""
_PAUSED_STEP = 3
_DETERMINISTIC = str(Path(__file__).with_name("deterministic"))
"""Folder that makes a trainer deterministic if it is on its path; FlashAttention's backward is not."""


def doctor(context: CheckContext) -> Outcome:
    """Check that ``qlora-tui doctor`` finds nothing that prevents this machine from training."""
    command = python_module("qlora_tui", "doctor", "--json")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout or "{}")
    return Outcome.of(done.returncode == 0, f"exit code {done.returncode}", {"report": report})


def loop(context: CheckContext) -> Outcome:
    """Check that a recipe becomes an adapter that plain peft loads and generates with."""
    with faster_imports():
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

    ended = train(short_recipe(context, training__optimizer="auto")).require_finished()
    finished, environment = ended.events_of(Finished)[0], ended.events_of(Environment)[-1]
    if context.has_gpu:
        _require_fast_step(context, ended)
    expected_device = "cuda" if context.has_gpu else "cpu"
    base = AutoModelForCausalLM.from_pretrained(
        context.model, dtype=torch.bfloat16, device_map={"": expected_device}
    )
    tuned = PeftModel.from_pretrained(base, str(ended.run.adapter_dir))
    tokenizer = AutoTokenizer.from_pretrained(ended.run.adapter_dir)
    prompt = tokenizer("hello", return_tensors="pt").to(expected_device)
    generated = tuned.generate(**prompt, max_new_tokens=4, do_sample=False)
    return Outcome.of(
        environment.device_kind == expected_device and generated.shape[1] > prompt["input_ids"].shape[1],
        f"{finished.step} steps on {environment.device}, {environment.attention}, loss {environment.loss}, "
        f"{finished.tokens_per_s:,.0f} tokens/s; plain peft loads the adapter",
        {
            "tokens_per_s": finished.tokens_per_s,
            "attention": environment.attention,
            "loss": environment.loss,
            "compute_dtype": environment.compute_dtype,
            "kernels": environment.kernels,
            "optimizer": environment.optimizer,
        },
    )


def _require_fast_step(context: CheckContext, ended: EndedRun) -> None:
    """Raise AssertionError if a correct run is not as fast as it should be, or its speed was not recorded."""
    environment, verified = ended.events_of(Environment)[-1], ended.events_of(StepVerified)[-1]
    warnings = [f"{event.kind}: {event.evidence}" for event in ended.events_of(Health)]
    assert environment.kernels == "triton", f"the Triton kernels are not used: {warnings}"
    assert verified.agrees and not verified.replaced, f"the first step differs: {verified}"
    (layers,) = ended.events_of(LayersKept)
    # Of an 8B model, a small GPU keeps some layers.
    least = 1 if context.size == "8b" else layers.layers
    assert layers.kept_layers >= least, f"{layers.kept_layers} of {layers.layers} layers keep activations"
    assert (state_dir() / "memory.jsonl").exists(), f"the run's memory was not recorded: {warnings}"


def resume(context: CheckContext) -> Outcome:
    """Check that a paused and resumed run has bit-identical losses to a run that was never paused."""
    return _resume(context, "adamw")


def resume_8bit(context: CheckContext) -> Outcome:
    """Check that a resumed run has the same losses with the paged states of the 8-bit optimizer."""
    return _resume(context, "paged_adamw_8bit")


def _resume(context: CheckContext, optimizer: str) -> Outcome:
    recipe = short_recipe(
        context,
        training__max_steps=_PAUSED_STEPS if context.has_gpu else _CPU_STEPS,
        training__checkpoint_every=10,
        training__optimizer=optimizer,
    )
    paths = filter(None, (_DETERMINISTIC, os.environ.get("PYTHONPATH")))
    # cuBLAS has a fixed order of summation only with this workspace.
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    whole = train(recipe).require_finished().losses

    def pause(run: RunDir, event: AnyEvent) -> None:
        if isinstance(event, Step) and event.step == _PAUSED_STEP:
            # The run may be over already. Then there is nothing to resume, and the check reports it.
            with suppress(UserError):
                control.send_request(run, "pause")

    paused = train(recipe, pause)
    if paused.events_of(Finished):
        raise CheckSkipped("the run was over before it could be paused")
    actions.resume(paused.run)
    resumed = follow(paused.run).require_finished().losses
    difference = max(abs(a - b) / abs(a) for a, b in zip(whole, resumed, strict=True))
    return Outcome.of(
        whole == resumed,
        f"{optimizer}: {len(resumed)} losses, at most {difference:.1e} from those of a run never paused",
        {"difference": difference, "whole": whole, "resumed": resumed},
    )


def sigterm(context: CheckContext) -> Outcome:
    """Check that after SIGTERM between two steps, a trainer saves a checkpoint and the adapter, and ends."""
    pids: list[int] = []

    def terminate(run: RunDir, event: AnyEvent) -> None:
        if isinstance(event, Started):
            pids.append(event.pid)
        elif isinstance(event, Step) and event.step == _PAUSED_STEP:
            with suppress(ProcessLookupError):
                os.kill(pids[-1], signal.SIGTERM)

    ended = train(short_recipe(context, training__max_steps=_PAUSED_STEPS), terminate)
    if ended.events_of(Finished):
        raise CheckSkipped("the run was over before the signal arrived")
    stopped, saved = ended.events_of(Stopped), ended.events_of(CheckpointSaved)
    return Outcome.of(
        bool(stopped and saved) and ended.run.adapter_dir.is_dir(),
        f"ended as {type(ended.events[-1]).__name__.lower()} with {len(saved)} checkpoints",
        {"checkpoints": [event.step for event in saved]},
    )


def float16(context: CheckContext) -> Outcome:
    """Check that in float16, as on GPUs before Ampere, losses are finite and fall."""
    if not context.has_gpu:
        raise CheckSkipped("float16 is for GPUs")
    ended = train(
        short_recipe(context, quantization__compute_dtype="float16", training__max_steps=20)
    ).require_finished()
    losses, speed = ended.losses, ended.events_of(Finished)[0].tokens_per_s
    return Outcome.of(
        all(map(math.isfinite, losses)) and losses[-1] < losses[0],
        f"losses {losses[0]:.3f} to {losses[-1]:.3f}, {speed:,.0f} tokens/s",
        {"losses": losses, "tokens_per_s": speed},
    )


def nvml(context: CheckContext) -> Outcome:
    """Check that the telemetry of a run has utilization and memory of the GPU."""
    if not context.has_gpu:
        raise CheckSkipped("there is no GPU")
    ended = train(short_recipe(context, training__max_steps=_PAUSED_STEPS)).require_finished()
    samples = TelemetryTail(ended.run.telemetry_path).poll()
    readings = [sample.gpu for sample in samples if sample.gpu is not None]
    busiest = max((reading.utilization_percent or 0 for reading in readings), default=0)
    fullest = max((reading.memory_used_bytes or 0 for reading in readings), default=0)
    energy_kwh = ended.events_of(Finished)[0].energy_kwh
    return Outcome.of(
        bool(readings) and busiest > 0 and fullest > 0,
        f"{len(readings)} readings, utilization up to {busiest} %, memory up to {fullest / 2**30:.1f} GiB, "
        f"{energy_kwh or 0:.4f} kWh",
        {"readings": len(readings), "energy_kwh": energy_kwh},
    )


def chat(context: CheckContext) -> Outcome:
    """Check that the chat answers by a CUDA graph, and at 8B in half the time of plain ``generate``."""
    rounds = 3 if context.has_gpu else 1
    command = python_module("bench.chat", context.model, "--rounds", rounds, "--json")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(done.stderr.strip().splitlines()[-1])
    report = json.loads(done.stdout)
    short = report["short"]
    speeds = [f"{short[way]['tokens_per_s']:.1f} ({way})" for way in ("ours", "plain")]
    recorded = short["ours"]["recorded_tokens"]
    least = _CHAT_RATIO if context.has_gpu and context.size == "8b" else 0.0
    return Outcome.of(
        short["ratio"] >= least and (recorded > 0 or not context.has_gpu),
        f"{' and '.join(speeds)} tokens/s, {short['ratio']:.2f}×, {recorded:.0f} tokens by a CUDA graph"
        f"{'. ' + report['note'] if report['note'] else ''}",
        report,
    )
