"""The trainer process: from a queued run to an adapter, and every way out before that."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qlora_tui import cli
from qlora_tui.catalog.local_models import load_architecture
from qlora_tui.memory import Device, estimate
from qlora_tui.memory.budget import this_processor
from qlora_tui.memory.calibration import load_runs
from qlora_tui.recipe.schema import Recipe, Source
from qlora_tui.runs import actions, control
from qlora_tui.runs.damage import checkpoint_damage
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.events import (
    AdapterReady,
    CheckpointSaved,
    DataReady,
    Environment,
    Evaluated,
    Failed,
    Finished,
    Health,
    MemoryMeasured,
    Paused,
    SampleGenerated,
    Started,
    Step,
    StepVerified,
    Stopped,
)
from qlora_tui.runs.status import read_status
from qlora_tui.runs.telemetry import TelemetryTail
from tests.support.polling import wait_for
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events, events_of, last_step, losses

pytestmark = pytest.mark.slow

LONG = {"training.epochs": 60.0, "training.checkpoint_every": 1000, "training.eval_every": 1000}
"""Settings of a run long enough to receive requests."""


@pytest.mark.usefixtures("quick_trainers")
def test_submitted_runs_are_trained_in_order_in_the_background(recipe: MakeRecipe) -> None:
    runs = [actions.submit(recipe({"name": name, "training.epochs": 1.0})) for name in ("first", "second")]
    wait_for(lambda: read_status(runs[1]).state == "finished", seconds=180, saying="both runs to finish")
    assert read_status(runs[0]).state == "finished"
    first, second = (events_of(run, Finished)[0].at for run in runs)
    assert events_of(runs[1], Started)[0].at > first < second


def test_a_run_tells_what_it_is_and_does(recipe: MakeRecipe, trainers: Trainers) -> None:
    run = create_run(recipe({"training.sample_prompts": ("what is 3",), "training.warmup_ratio": 0.5}))
    assert trainers.run(run) == 0
    (environment,) = events_of(run, Environment)
    assert (environment.device_kind, environment.compute_dtype) == ("cpu", "float32")
    assert environment.loss == "chunked" and environment.attention == "SDPA, one call per sample"
    (verified,) = events_of(run, StepVerified)
    assert verified.agrees and verified.replaced == () and verified.tokens > 16
    assert verified.loss == pytest.approx(verified.reference_loss, rel=1e-5)
    (data,) = events_of(run, DataReady)
    steps = events_of(run, Step)
    assert [step.step for step in steps] == list(range(1, data.total_steps + 1))
    assert steps[-1].tokens == 2 * data.tokens and steps[-1].epoch == 2.0
    warmup = data.total_steps // 2
    assert [step.learning_rate for step in steps[:warmup]] == pytest.approx(
        [2e-3 * n / warmup for n in range(1, warmup + 1)]
    )
    assert events_of(run, AdapterReady)[0].trained_parameters == 16384
    evaluated = events_of(run, Evaluated)
    assert [e.step for e in evaluated] == [0, data.steps_per_epoch, data.total_steps]
    assert evaluated[0].loss and evaluated[-1].loss and evaluated[-1].loss < evaluated[0].loss
    assert [(s.step, s.prompt) for s in events_of(run, SampleGenerated)] == [
        (e.step, "what is 3") for e in evaluated
    ]
    assert [memory.when for memory in events_of(run, MemoryMeasured)] == ["probe", "end"]
    assert all(memory.measured_bytes > 10**8 for memory in events_of(run, MemoryMeasured))
    assert isinstance(events(run)[-1], Finished)
    assert read_status(run).state == "finished"
    assert TelemetryTail(run.telemetry_path).poll()[0].rss_bytes > 10**8


def test_the_adapter_loads_with_plain_peft(recipe: MakeRecipe, trainers: Trainers) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    run = create_run(recipe({"training.epochs": 1.0}))
    assert trainers.run(run) == 0
    model: Any = AutoPeftModelForCausalLM.from_pretrained(run.adapter_dir)
    moved = [name for name, p in model.named_parameters() if "lora_B" in name and p.abs().max() > 0]
    assert len(moved) == 14
    assert {type(module).__module__.partition(".")[0] for module in model.modules()} == {
        "peft",
        "torch",
        "transformers",
    }
    tokenizer: Any = AutoTokenizer.from_pretrained(run.adapter_dir)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    assert list(run.path.rglob("README.md")) == []
    assert (run.adapter_dir / "recipe.toml").read_text() == run.recipe_path.read_text()
    sums = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=run.adapter_dir, check=False)
    assert sums.returncode == 0
    assert all(checkpoint_damage(folder) is None for _, folder in run.checkpoints())


@pytest.mark.parametrize(("micro_batch", "packing"), [(1, True), (3, False)])
def test_loss_weights_scale_what_each_answer_contributes(
    recipe: MakeRecipe, trainers: Trainers, tmp_path: Path, micro_batch: int, packing: bool
) -> None:
    """A step over all rows, and the validation: each is the weighted mean of the base model's losses."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = [0.25, 1.0, 3.0, 0.5, 0.0, 1.0]
    conversations = [
        [
            {"role": "user", "content": f"what is {n}"},
            {"role": "assistant", "content": "the fox " * (n + 1), "weight": weight},
        ]
        for n, weight in enumerate(weights)
    ]
    data = tmp_path / "weighted.jsonl"
    data.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations))
    settings = {
        "data.sources": (Source(path=str(data)),),
        "data.validation_path": str(data),
        "data.packing": packing,
        "data.max_length": 64,
        "quantization.method": "none",
        "training.micro_batch_size": micro_batch,
        "training.gradient_accumulation": 6,
        "training.epochs": 1.0,
    }
    weighted = recipe(settings)
    run = create_run(weighted)
    assert trainers.run(run) == 0
    model = AutoModelForCausalLM.from_pretrained(weighted.model.id)
    tokenizer: Any = AutoTokenizer.from_pretrained(weighted.model.id)
    total = count = 0.0
    for turns, weight in zip(conversations, weights, strict=True):
        whole = tokenizer.apply_chat_template(turns, return_dict=False)
        prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([whole])
        with torch.no_grad():
            odds = model(ids).logits[0, :-1].log_softmax(-1)
        each = -odds.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        total += weight * each.sum().item()
        count += weight * len(each)
    assert losses(run)[1] == pytest.approx(total / count, rel=1e-4)
    assert events_of(run, Evaluated)[0].loss == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("how", ["stop", "SIGTERM"])
def test_a_stopped_run_has_checkpoint_and_adapter(recipe: MakeRecipe, trainers: Trainers, how: str) -> None:
    run = create_run(recipe({**LONG, "training.log_every": 1000}))
    trainer = trainers.start(run)
    wait_for(lambda: read_status(run).step >= 3, seconds=60)
    if how == "stop":
        actions.stop(run)
    else:
        os.kill(trainer.pid, signal.SIGTERM)
    assert trainer.wait() == 0
    ending = events(run)[-1]
    assert isinstance(ending, Stopped) and ending.step == last_step(run)
    assert events_of(run, CheckpointSaved)[-1].step == ending.step
    assert (run.adapter_dir / "adapter_model.safetensors").exists()
    status = read_status(run)
    assert (status.state, status.step, status.loss) == ("stopped", ending.step, losses(run)[ending.step])


def test_a_paused_run_goes_on_where_it_was(recipe: MakeRecipe, trainers: Trainers) -> None:
    run = create_run(recipe({**LONG, "training.epochs": 10.0}))
    trainer = trainers.start(run)
    wait_for(lambda: last_step(run) >= 2, seconds=60)
    actions.pause(run)
    assert trainer.wait() == 0
    ending = events(run)[-1]
    assert isinstance(ending, Paused) and read_status(run).state == "paused"
    assert not run.adapter_dir.exists()
    assert trainers.run(run) == 0
    total = events_of(run, DataReady)[0].total_steps
    assert list(losses(run)) == list(range(1, total + 1))
    assert events_of(run, Started)[-1].resumed_from_step == ending.step
    assert read_status(run).state == "finished"
    # Once more, with nothing left to do: what it had come to stays.
    assert trainers.run(run) == 0
    status = read_status(run)
    assert (status.state, status.step, status.total_steps) == ("finished", total, total)
    assert status.loss == losses(run)[total]


def test_a_run_stopped_before_its_first_step_ends_early(recipe: MakeRecipe, trainers: Trainers) -> None:
    run = create_run(recipe(LONG))
    request = msgspec.json.encode(control.ControlRequest(kind="stop"))
    (run.control_dir / "0-early.json").write_bytes(request)
    assert trainers.run(run) == 0
    assert isinstance(events(run)[-1], Stopped) and last_step(run) == 0


def test_requests_are_done_at_the_next_step(recipe: MakeRecipe, trainers: Trainers) -> None:
    run = create_run(
        recipe(
            {
                **LONG,
                "training.sample_prompts": ("what is 3",),
                "training.lr_scheduler": "constant",
                "training.warmup_ratio": 0.0,
            }
        )
    )
    trainer = trainers.start(run)
    wait_for(lambda: last_step(run) >= 2, seconds=60)
    for kind in ("checkpoint", "evaluate", "sample"):
        control.send_request(run, kind)
    control.send_request(run, "set_learning_rate", 5e-4)
    wait_for(
        lambda: events_of(run, CheckpointSaved) and len(events_of(run, SampleGenerated)) >= 2, seconds=60
    )
    asked_at = events_of(run, CheckpointSaved)[0].step
    wait_for(lambda: last_step(run) > asked_at + 1, seconds=60)
    control.send_request(run, "finish_epoch")
    assert trainer.wait() == 0
    evaluated_at = [each.step for each in events_of(run, Evaluated)][:2]
    # A step may end between two requests.
    assert evaluated_at in ([0, asked_at], [0, asked_at + 1])
    rates = {step.step: step.learning_rate for step in events_of(run, Step)}
    assert (rates[asked_at], rates[asked_at + 2]) == (2e-3, 5e-4)
    ending = events(run)[-1]
    assert isinstance(ending, Finished) and "as requested" in ending.reason
    assert ending.step < events_of(run, DataReady)[0].total_steps
    assert ending.step % events_of(run, DataReady)[0].steps_per_epoch == 0


def _failure(run: RunDir, trainers: Trainers, code: int = 1) -> Failed:
    assert trainers.run(run) == code
    ending = events(run)[-1]
    assert isinstance(ending, Failed)
    assert ending.what
    status = read_status(run)
    assert status.state == "failed" and ending.title in status.detail
    assert "Traceback" not in ending.what
    return ending


def test_a_model_that_has_gone_is_named(recipe: MakeRecipe, trainers: Trainers, tmp_path: Path) -> None:
    run = create_run(recipe({"model.id": str(tmp_path / "gone")}))
    ending = _failure(run, trainers, code=2)
    assert str(tmp_path / "gone") in ending.what and ending.kind == "problem"


def test_a_broken_data_file_is_named_with_its_line(
    recipe: MakeRecipe, trainers: Trainers, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"messages": []}\nnot json\n')
    base: Recipe = recipe()
    source = msgspec.structs.replace(base.data.sources[0], path=str(broken))
    run = create_run(recipe({"data.sources": (source,)}))
    assert str(broken) in _failure(run, trainers).what


def test_a_recipe_edited_into_nonsense_fails_with_the_key(recipe: MakeRecipe, trainers: Trainers) -> None:
    run = create_run(recipe())
    run.recipe_path.write_text(run.recipe_path.read_text().replace("rank = 8", 'rank = "many"'))
    assert "lora.rank" in _failure(run, trainers, code=2).what


def test_a_nan_loss_ends_the_run_and_keeps_the_checkpoint(recipe: MakeRecipe, trainers: Trainers) -> None:
    # Half precision, a huge scale and a rate that rises: it overflows after some good steps.
    run = create_run(
        recipe(
            {
                "quantization.compute_dtype": "float16",
                "lora.alpha": 8192.0,
                "training.learning_rate": 1.0,
                "training.warmup_ratio": 0.9,
                "training.max_grad_norm": 0.0,
                "training.epochs": 20.0,
                "training.checkpoint_every": 1,
            }
        )
    )
    ending = _failure(run, trainers)
    assert ending.title == "Training diverged"
    (warning,) = (event for event in events_of(run, Health) if event.kind == "nan_loss")
    assert (ending.what, ending.fix) == (warning.evidence, warning.remedy)
    assert events_of(run, Step)[-1].loss is None or events_of(run, Step)[-1].grad_norm is None
    saved = [step for step, _ in run.checkpoints()]
    assert saved and saved[-1] < events_of(run, Step)[-1].step
    assert f"the checkpoint at step {saved[-1]} was saved before it" in ending.why


def test_a_second_trainer_of_a_run_is_refused(recipe: MakeRecipe, trainers: Trainers) -> None:
    run = create_run(recipe(LONG))
    trainer = trainers.start(run)
    wait_for(lambda: last_step(run) >= 1, seconds=60)
    second = subprocess.run(
        [sys.executable, "-m", "qlora_tui.training", str(run.path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert second.returncode == 2 and "Another trainer" in second.stderr
    assert len(events_of(run, Started)) == 1
    actions.stop(run)
    assert trainer.wait() == 0


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    called = subprocess.run(
        [sys.executable, "-m", "qlora_tui.training", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert called.returncode == 2 and "No such run" in called.stderr


def test_a_trainer_shows_itself_before_torch_is_loaded() -> None:
    code = "import sys, qlora_tui.training.__main__; print('torch' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(loaded.stdout.lower()) is False


def test_the_next_estimate_on_this_machine_counts_what_runs_measured(
    recipe: MakeRecipe, trainers: Trainers, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = recipe({"training.epochs": 1.0, "data.max_length": 2048})
    argv = ["estimate", "--model", trained.model.id, "--json"]
    for count in (1, 2):
        assert trainers.run(create_run(trained)) == 0
        assert cli.main(argv) == 0
        estimated = json.loads(capsys.readouterr().out)["precisions"]["nf4"]
        assert estimated["correction"]["runs"] == count
    assert estimated["correction"]["applied"]
    assert estimated["total_bytes"] != estimated["correction"]["uncorrected_bytes"]
    record = load_runs()[-1]
    assert record.machine == this_processor().name and record.versions["torch"]
    # Held to the rows that the data has, not to those the recipe allows.
    allowed = estimate(trained, load_architecture(trained.model.id), device=Device(kind="cpu"))
    assert record.predicted_allocated_bytes < allowed.allocated_bytes
    assert record.measured_process_bytes > 10**8 and record.measured_reserved_bytes == 0
