"""Events of a run: one line of ``events.jsonl`` each.

Written by the trainer and the runner, read by everything else. A field may be added with a default; none
is ever renamed or given another meaning, so that old runs stay readable.
"""

from __future__ import annotations

import time
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct

from qlora_tui.decoding import Count, UnixTime, try_json
from qlora_tui.errors import UserError
from qlora_tui.runs.holds import Hold

Phase: TypeAlias = Literal[
    "loading", "converting", "tokenizing", "probing", "training", "evaluating", "saving"
]
ALL_STEPS_DONE = "all steps done"
"""Reason of a run that ended as its recipe says."""
STEP_PHASES: frozenset[Phase] = frozenset(("training", "evaluating", "saving"))
"""Phases that a run alternates between, from its first step to its last."""
GPU_LOST = "gpu_lost"
"""Kind of :class:`Health` if the driver lost the GPU."""
PREPARING_PHASES: frozenset[Phase] = frozenset(("loading", "converting", "tokenizing"))
"""Phases before the first batch is computed: their memory does not depend on the batch."""


class Event(Struct, frozen=True, kw_only=True, tag_field="event", omit_defaults=True):
    """Base of all events."""

    at: UnixTime = msgspec.field(default_factory=lambda: time.time())
    """Unix time, seconds: when the event was made. Every line of a file has it."""


class Queued(Event, tag="queued", frozen=True, kw_only=True):
    """The run exists and waits in the queue."""


class Started(Event, tag="started", frozen=True, kw_only=True):
    """A trainer took the run."""

    attempt: Count
    """1 for the first attempt; one more for each resume or retry."""
    pid: Count
    resumed_from_step: Count = 0
    micro_batch_size: Count = msgspec.field(default=0, name="micro_batch")
    """Micro-batch size of this attempt: a retry after running out of memory halves it."""
    gradient_accumulation: Count = 0
    gradient_checkpointing: Literal["auto", "on", "off", "offload"] | bool = "off"
    """Version 0.2 wrote true and false."""


class PhaseChanged(Event, tag="phase", frozen=True, kw_only=True):
    """The trainer enters another phase."""

    phase: Phase
    detail: str = ""


class Progress(Event, tag="progress", frozen=True, kw_only=True):
    """Progress of a phase without steps (converting, tokenizing, evaluating)."""

    phase: Phase
    done: Count
    total: Count


class Environment(Event, tag="environment", frozen=True, kw_only=True):
    """Environment of this attempt: enough to explain a difference later."""

    device: str
    """``NVIDIA GeForce RTX 4090``, or the CPU's name."""
    device_kind: Literal["cuda", "cpu"]
    device_total_bytes: Count
    compute_dtype: str
    attention: str
    optimizer: str
    loss: str
    """``chunked``, ``liger`` or ``stock``, with the reason if it is not the usual one."""
    versions: dict[str, str]
    kernels: Literal["", "triton", "torch"] = ""
    """What computes norms, rotary positions and gated MLPs."""


class DataReady(Event, tag="data_ready", frozen=True, kw_only=True):
    """The prepared training data."""

    samples: Count
    validation_samples: Count
    tokens: Count
    trained_tokens: Count
    rows: Count
    """Rows per epoch, after packing."""
    steps_per_epoch: Count
    total_steps: Count
    data_hash: str
    dropped: Count = 0
    cut: Count = 0
    thinking: Literal["auto", "on", "off"] = "auto"
    """Thinking mode the model was trained in; ``auto``: the default of its chat template."""
    replayed: Count = 0
    """Answers of the base in each epoch, next to the samples."""


class AdapterReady(Event, tag="adapter_ready", frozen=True, kw_only=True):
    """The adapter is attached: what is trained."""

    trained_parameters: Count
    total_parameters: Annotated[int, Meta(ge=1, le=2**62)]


class StepVerified(Event, tag="step_verified", frozen=True, kw_only=True):
    """The first micro-batch, computed with transformers and peft alone and as this run computes it."""

    tokens: Count
    """Number of tokens that both computed; 0 if they could not be compared."""
    seconds: float
    loss: float | None = None
    reference_loss: float | None = None
    """Loss as the libraries alone compute it."""
    loss_noise: float | None = None
    """Change of the library's loss due to rounding in this dtype."""
    gradient_difference: float | None = None
    """Relative gradient difference of the tensor whose difference exceeds its noise the most."""
    gradient_noise: float | None = None
    """Relative change of that tensor's gradient due to rounding."""
    tensor: str = ""
    replaced: tuple[str, ...] = ()
    """Fast paths that computed another result; this run uses the library's instead."""
    agrees: bool = True
    """Whether the step as this run computes it, after any replacement, matches the library's."""
    reason: str = ""
    """Why the two could not be compared."""


class StepChosen(Event, tag="step_chosen", frozen=True, kw_only=True):
    """How a step is computed, if the recipe leaves it to the free memory."""

    micro_batch_size: Count
    gradient_accumulation: Count
    optimizer: str
    effective_batch: Count
    """Rows of a step, as in the recipe."""


class LayersKept(Event, tag="layers_kept", frozen=True, kw_only=True):
    """How many layers keep their activations, if the recipe leaves it to the free memory."""

    kept_layers: Count
    layers: Count
    available_bytes: Count
    """Free memory of the device that the run may take."""
    estimated_bytes: Count
    """Memory of the run with these layers."""


class LayersStreamed(Event, tag="layers_streamed", frozen=True, kw_only=True):
    """Layers whose frozen weights wait in host memory and pass through two buffers of the device."""

    streamed_layers: Count
    layers: Count
    """Layers of the model."""
    host_bytes: Count
    """Host memory that holds them."""
    slot_bytes: Count
    """Memory of the device through which they pass."""


class MemoryMeasured(Event, tag="memory", frozen=True, kw_only=True):
    """A measured memory peak and its prediction, in bytes."""

    when: Literal["probe", "end"]
    estimated_bytes: Count
    """Predicted peak, on the same memory level as ``measured_bytes``."""
    measured_bytes: Count
    """Peak of the process: on CUDA the reserved pool and the context, on a CPU the resident set."""
    allocated_bytes: Count = 0
    reserved_bytes: Count = 0


def phase_label(phase: str) -> str:
    """The name of a phase for people."""
    return "testing" if phase == "probing" else phase


class Step(Event, tag="step", frozen=True, kw_only=True):
    """One optimizer step. ``loss`` and ``grad_norm`` may be NaN or infinite: they are recorded unchanged."""

    step: Count
    epoch: float
    loss: float | None
    """None represents NaN or infinity, which JSON cannot hold."""
    learning_rate: float
    grad_norm: float | None
    tokens: Count
    """Number of real tokens trained on so far, without padding."""
    tokens_per_s: float
    """Real tokens per second over this step."""
    reward_accuracy: float | None = None
    """Share, for a preference method, of comparisons in which the better answer has the higher reward."""
    reward_margin: float | None = None
    """For a preference method: mean reward of the better answers less that of the worse ones."""


class GeneralAnswers(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Counts over short greedy answers to general prompts: the model's, and its base's."""

    answers: Count
    ended: Count
    """Answers that end their turn within the tokens they are given."""
    base_ended: Count
    looping: Count
    """Answers whose end repeats itself."""
    base_looping: Count
    refused: Count
    """Answers that begin with a refusal."""
    base_refused: Count
    json_prompts: Count = 0
    """Prompts that ask for JSON."""
    json_valid: Count = 0
    """Answers to these that hold valid JSON."""
    base_json_valid: Count = 0


class Evaluated(Event, tag="evaluated", frozen=True, kw_only=True):
    """Validation loss at a step; step 0 is before training."""

    step: Count
    loss: float | None
    best: bool = False
    """Whether it is the lowest after training began."""
    before_training: float | None = None
    """The validation loss at step 0, if it was measured."""
    accuracy: float | None = None
    """Share of greedy answers that match exactly, for short-answer data; at step 0, the base's share."""
    forgetting: float | None = None
    """Mean KL(base ‖ model) in nats on the base's answers to general prompts; None if not measured."""
    score: float | None = None
    """The loss with weighted forgetting, if ``training.forgetting_weight`` is set: the lowest is best."""
    general_turn_ends: float | None = None
    """Share of the turn ends in these answers that the model keeps."""
    reward_accuracy: float | None = None
    """Share, for a preference method, of comparisons in which the better answer has the higher reward."""
    reward_margin: float | None = None
    """For a preference method: mean reward of the better answers less that of the worse ones."""
    general_answers: GeneralAnswers | None = None
    """What the model answers to general prompts; at the end of a run that measures forgetting."""


class ValidationCompared(Event, tag="validation_compared", frozen=True, kw_only=True):
    """Validation loss before and after training on the same rows, in nats per trained token."""

    rows: Count
    before: float
    """Value of the base, or of the adapter that the run started from."""
    after: float
    low: float | None
    """95 % interval of after minus before, by the bootstrap over rows; None for fewer than two."""
    high: float | None


class AnswersCompared(Event, tag="answers_compared", frozen=True, kw_only=True):
    """How base and adapter answered validation prompts at the end of the run, by the first metric."""

    metric: str
    prompts: Count
    base: float
    """Mean over the prompts, 0 to 1."""
    adapter: float
    low: float
    """95 % interval of the adapter's mean minus the base's."""
    high: float
    comparison: str
    """``better``, ``worse`` or ``unclear``."""
    seconds: float


class CheckpointSaved(Event, tag="checkpoint_saved", frozen=True, kw_only=True):
    """A checkpoint is complete: training can be resumed from here."""

    step: Count
    folder: str
    """Path relative to the run's directory."""


class SampleGenerated(Event, tag="sampled", frozen=True, kw_only=True):
    """The current model's answer to a fixed prompt."""

    step: Count
    prompt: str
    answer: str


class Health(Event, tag="health", frozen=True, kw_only=True):
    """A warning about the run, with evidence and remedy."""

    kind: str
    """``nan_loss`` (of loss or gradient norm), ``exploding_gradient``, ``gradients_overflow``, ``plateau``,
    ``gpu_idle``, ``gpu_lost``, ``throttled``, ``disk_full``…"""
    severity: Literal["warning", "error"]
    evidence: str
    remedy: str
    step: Count = 0


class RequestReceived(Event, tag="asked", frozen=True, kw_only=True):
    """A request from ``control/`` was accepted."""

    request: str
    value: float | None = None


class Finished(Event, tag="finished", frozen=True, kw_only=True):
    """The run is done and the adapter complete."""

    step: Count
    seconds: float
    """Training time of this attempt, without loading."""
    tokens_per_s: float
    reason: str = ALL_STEPS_DONE
    energy_kwh: float | None = None
    """Energy of the GPU over the whole run, with loading and evaluation; None if it reports no power."""
    tokens_per_joule: float | None = None
    """Real tokens trained on, divided by that energy."""
    checksums: str = ""
    """SHA-256 of the adapter's ``SHA256SUMS``; empty in events of older versions."""


class Failed(Event, tag="failed", frozen=True, kw_only=True):
    """The run ended with an error: the fields of a UserError."""

    title: str
    what: str
    why: str = ""
    fix: str = ""
    code: str = ""
    kind: Literal["problem", "out_of_memory", "killed", "lost", "bug"] = "problem"
    exit_code: int | None = None
    phase: Phase | None = None
    """Phase in which memory ran out; None for other failures, and where it is unknown."""

    @classmethod
    def from_problem(cls, problem: UserError, *, at: float, exit_code: int | None) -> Failed:
        """Record an exception as the event."""
        return cls(at=at, **problem.fields() | {"exit_code": exit_code})

    def problem(self) -> UserError:
        """Convert the event to the exception it records."""
        return UserError(self.title, what=self.what, why=self.why, fix=self.fix, code=self.code)


class Stopped(Event, tag="stopped", frozen=True, kw_only=True):
    """Ended on request, with a checkpoint (and the adapter as it was) saved."""

    step: Count
    checksums: str = ""
    """SHA-256 of the adapter's ``SHA256SUMS``; empty if no adapter was written."""


class Paused(Event, tag="paused", frozen=True, kw_only=True):
    """The GPU was freed on request; resume continues from the checkpoint."""

    step: Count
    hold: Hold | None = None
    """Why the runner paused it, which then continues it by itself; None if the user did."""


SERIES: tuple[type[Event], ...] = (Step,)
"""Events of which a run has any number: of a long run a sample is read. All others are facts of the run."""
RunEnded: TypeAlias = Finished | Failed | Stopped | Paused
AnyEvent: TypeAlias = (
    Queued
    | Started
    | PhaseChanged
    | Progress
    | Environment
    | DataReady
    | AdapterReady
    | StepVerified
    | StepChosen
    | LayersKept
    | LayersStreamed
    | MemoryMeasured
    | Step
    | Evaluated
    | ValidationCompared
    | AnswersCompared
    | CheckpointSaved
    | SampleGenerated
    | Health
    | RequestReceived
    | Finished
    | Failed
    | Stopped
    | Paused
)

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)


def encode(event: AnyEvent) -> bytes:
    """Encode an event as one line, newline included."""
    return _encoder.encode(event) + b"\n"


def decode(line: bytes) -> AnyEvent | None:
    """Decode a complete line; None for an event this version does not understand."""
    return try_json(line, _decoder)
