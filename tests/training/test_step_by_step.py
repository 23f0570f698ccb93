"""A run is, step for step, what a plain script of transformers and peft computes on the same tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.baselines import step_by_step
from bench.baselines.batches import write_batches
from bench.baselines.job import TrainingJob, steps_of
from bench.baselines.qlora_tui_run import recipe as recipe_of
from bench.baselines.runner import Measurement
from bench.real_models import Agreement, Pair, agreements
from qlora_tui.runs.directory import all_runs, create_run
from qlora_tui.runs.events import Finished, Health, Step, StepVerified
from tests.support.trainer_processes import Trainers
from tests.training.event_helpers import events, events_of
from tests.training.tiny_model import make_tiny_gemma

pytestmark = pytest.mark.slow

STEPS = 4
ROUNDING = {"llama": 2e-3, "gemma3": 1e-2}
"""Largest difference in fp32, of a loss or, as a share, of a gradient norm. Norm weights as large as those of
real models make the tiny Gemma ill-conditioned: if half a rounding error is added to the output of each of
its modules, a gradient moves by up to 1.2 %."""
WRONG = 2e-2
"""Smallest difference of a wrong step."""


@pytest.fixture(scope="module")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gemma(tmp_path_factory.mktemp("models") / "tiny-gemma")


@pytest.fixture
def job(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> TrainingJob:
    """Four steps of packed sequences, in fp32, at a rate that warms up and falls."""
    return TrainingJob(
        model=str(tiny_model),
        rows=str(tiny_data),
        out=str(tmp_path / "adapter"),
        batches=str(tmp_path / "batches.jsonl"),
        dtype="float32",
        row_tokens=128,
        rank=8,
        alpha=16,
        learning_rate=2e-3,
        lr_scheduler="cosine",
        warmup_ratio=0.5,
        max_steps=STEPS,
    )


def by_us(job: TrainingJob, trainers: Trainers) -> Measurement:
    """Losses and gradient norms of a run, from its events."""
    run = create_run(recipe_of(job))
    assert trainers.run(run) == 0, run.log_path.read_text()
    steps = events_of(run, Step)
    losses, norms = [s.loss for s in steps], [s.grad_norm for s in steps]
    return Measurement(losses=[x or 0.0 for x in losses], grad_norms=[x or 0.0 for x in norms])


def plainly(job: TrainingJob) -> Measurement:
    """Losses and gradient norms of the plain script."""
    pairs = list(step_by_step.train(step_by_step.adapted(job), steps_of(job), job))
    return Measurement(losses=[loss for loss, _ in pairs], grad_norms=[norm for _, norm in pairs])


@pytest.fixture(scope="module")
def references() -> dict[str, Measurement]:
    """What the plain script computes, by model."""
    return {}


def differences(job: TrainingJob, trainers: Trainers, references: dict[str, Measurement]) -> list[Agreement]:
    """Of losses and gradient norms, in fp32."""
    if job.model not in references:
        write_batches(job)
        references[job.model] = plainly(job)
    reference = references[job.model]
    exact = Pair(reference, reference)
    both = agreements({"float32": Pair(by_us(job, trainers), reference), "bfloat16": exact})
    return [each for each in both if each.quantity.endswith("float32")]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_run_is_the_plain_script(
    family: str, job: TrainingJob, tiny_gemma: Path, trainers: Trainers, references: dict[str, Measurement]
) -> None:
    if family == "gemma3":
        job = replace(job, model=str(tiny_gemma))
    for each in differences(job, trainers, references):
        assert each.difference <= ROUNDING[family], str(each)


UNVERIFIED = "from qlora_tui.training import setup\nsetup.verify_first_step = lambda run: run.base\n"
"""Without the check before the first step, which would replace a wrong part."""
MUTANTS = {
    "a norm without its offset": (
        "from qlora_tui.training.fused import norm_rotary\n"
        "stock = norm_rotary._rms_norm\n"
        "def forward(ctx, x, weight, eps, variant):\n"
        "    out, spread = stock(x, weight - 1, eps, variant)\n"
        "    ctx.save_for_backward(x, spread)\n"
        "    ctx.weight, ctx.variant = weight, variant\n"
        "    return out\n"
        "norm_rotary._FusedRmsNorm.forward = staticmethod(forward)"
    ),
    "samples that see each other": (
        "from qlora_tui.training import loss, model, packed_attention\n"
        "model.packing_is_isolated = lambda *args: True\n"
        "whole = packed_attention.segment_mask\n"
        "loss.segment_mask = lambda lengths: whole([sum(lengths)])"
    ),
    "a first step without a rate": (
        "from qlora_tui.training import optimizers\n"
        "optimizers._shifted_warmup = lambda share_at, warmup, step: share_at(step)"
    ),
    "gradients of half the size": (
        "from qlora_tui.training.loss import _ChunkedLoss\n"
        "stock = _ChunkedLoss.backward\n"
        "_ChunkedLoss.backward = staticmethod(lambda ctx, grad: stock(ctx, grad / 2))"
    ),
    "another initial adapter": ("from qlora_tui.training import setup\nsetup.set_seed = lambda seed: None"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_step_differs_by_more_than_rounding(
    mutant: str,
    job: TrainingJob,
    tiny_gemma: Path,
    trainers: Trainers,
    references: dict[str, Measurement],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BEFORE_TRAINER", UNVERIFIED + MUTANTS[mutant])
    differing = differences(replace(job, model=str(tiny_gemma)), trainers, references)
    assert max(each.difference for each in differing) > WRONG, [str(each) for each in differing]


def test_a_wrong_norm_warns_and_trains_like_the_plain_script(
    job: TrainingJob,
    tiny_gemma: Path,
    trainers: Trainers,
    references: dict[str, Measurement],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = replace(job, model=str(tiny_gemma))
    monkeypatch.setenv(
        "BEFORE_TRAINER", "from tests.training.fault_injection import norm_without_offset as inject\ninject()"
    )
    assert max(each.difference for each in differences(job, trainers, references)) <= ROUNDING["gemma3"]
    (run,) = all_runs()
    (verified,) = events_of(run, StepVerified)
    assert verified.replaced == ("the fused RMSNorm",) and verified.agrees
    (warning,) = [health for health in events_of(run, Health) if health.kind == "step_differs"]
    assert warning.severity == "warning" and warning.evidence.startswith(
        "The first step differs from transformers and peft, because of the fused RMSNorm: loss "
    )
    assert warning.remedy.startswith("This run uses the code of transformers and peft instead")
    assert len(events_of(run, Step)) == STEPS and isinstance(events(run)[-1], Finished)
