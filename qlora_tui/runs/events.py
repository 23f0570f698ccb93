"""Events of a run: one line of ``events.jsonl`` each.

The trainer writes most events. Other processes write those about queueing, retries and endings. A field may
be added with a default; no field is ever renamed or given another meaning, so that old runs stay readable.
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
"""``reason`` of the :class:`Finished` event if the run trained all steps of its recipe."""
STEP_PHASES: frozenset[Phase] = frozenset(("training", "evaluating", "saving"))
"""Phases between which a run alternates, from its first step to its last."""
GPU_LOST = "gpu_lost"
"""Kind of a :class:`Health` event that reports that the driver lost the GPU."""
PREPARING_PHASES: frozenset[Phase] = frozenset(("loading", "converting", "tokenizing"))
"""Phases before the first batch is computed. Their memory does not depend on the batch."""


class Event(Struct, frozen=True, kw_only=True, tag_field="event", omit_defaults=True):
    """Base class of all events."""

    at: UnixTime = msgspec.field(default_factory=lambda: time.time())
    """Unix time in seconds at which the event was created. Every line of a file has it."""


class Queued(Event, tag="queued", frozen=True, kw_only=True):
    """The run was created or resumed, and waits in the queue."""


class Started(Event, tag="started", frozen=True, kw_only=True):
    """A trainer started to work on the run."""

    attempt: Count
    """Number of the attempt: 1 for the first, and one more for each resume or retry."""
    pid: Count
    resumed_from_step: Count = 0
    micro_batch_size: Count = msgspec.field(default=0, name="micro_batch")
    """Micro-batch size of this attempt. A retry after running out of memory may reduce it."""
    gradient_accumulation: Count = 0
    gradient_checkpointing: Literal["auto", "on", "off", "offload"] | bool = "off"
    """Gradient checkpointing of this attempt. Version 0.2 wrote true and false."""


class PhaseChanged(Event, tag="phase", frozen=True, kw_only=True):
    """The trainer entered another phase."""

    phase: Phase
    detail: str = ""


class Progress(Event, tag="progress", frozen=True, kw_only=True):
    """Progress of a phase without steps, such as loading, converting, tokenizing or evaluating."""

    phase: Phase
    done: Count
    total: Count


class Environment(Event, tag="environment", frozen=True, kw_only=True):
    """Software and hardware of this attempt, for explaining differences between attempts."""

    device: str
    """Name of the GPU, such as ``NVIDIA GeForce RTX 4090``, or of the CPU."""
    device_kind: Literal["cuda", "cpu"]
    device_total_bytes: Count
    compute_dtype: str
    attention: str
    optimizer: str
    loss: str
    """Implementation of the loss: ``chunked``, ``liger`` or ``stock``, with the reason if it is not the
    default.
    """
    versions: dict[str, str]
    kernels: Literal["", "triton", "torch"] = ""
    """Implementation that computes norms, rotary positions and gated MLPs."""


class DataReady(Event, tag="data_ready", frozen=True, kw_only=True):
    """The training data is prepared."""

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
    """Thinking mode that the model was trained in; ``auto`` is the default of its chat template."""
    replayed: Count = 0
    """Number of answers of the base that are replayed in each epoch, in addition to the samples."""


class AdapterReady(Event, tag="adapter_ready", frozen=True, kw_only=True):
    """The adapter is attached, and the trainable parameters are known."""

    trained_parameters: Count
    total_parameters: Annotated[int, Meta(ge=1, le=2**62)]


class StepVerified(Event, tag="step_verified", frozen=True, kw_only=True):
    """A micro-batch was computed in two ways, to compare the results: by transformers and peft alone, and as
    this run computes it.
    """

    tokens: Count
    """Number of tokens that were compared; 0 if the two computations could not be compared."""
    seconds: float
    loss: float | None = None
    reference_loss: float | None = None
    """Loss computed by transformers and peft alone."""
    loss_noise: float | None = None
    """How much rounding in this dtype changes ``reference_loss``."""
    gradient_difference: float | None = None
    """Relative difference between the gradients of ``tensor``, whose difference is the largest in relation to
    its rounding noise.
    """
    gradient_noise: float | None = None
    """Relative change of the gradient of ``tensor`` due to rounding."""
    tensor: str = ""
    replaced: tuple[str, ...] = ()
    """Fast code paths that computed a different result. This run uses the libraries' code instead."""
    agrees: bool = True
    """Whether the step as this run computes it, after replacements, matches the libraries' step."""
    reason: str = ""
    """Why the two computations could not be compared."""


class StepChosen(Event, tag="step_chosen", frozen=True, kw_only=True):
    """Micro-batch size, accumulation and optimizer of a run whose recipe lets free memory determine any of
    them.
    """

    micro_batch_size: Count
    gradient_accumulation: Count
    optimizer: str
    effective_batch: Count
    """Rows per optimizer step, as in the recipe."""


class LayersKept(Event, tag="layers_kept", frozen=True, kw_only=True):
    """Number of layers that keep their activations, if the recipe lets free memory determine this number."""

    kept_layers: Count
    layers: Count
    available_bytes: Count
    """Free device memory that is available to the run."""
    estimated_bytes: Count
    """Estimated memory of the run with this number of layers."""


class LayersStreamed(Event, tag="layers_streamed", frozen=True, kw_only=True):
    """Weights of some layers stay in host memory and are streamed through two device buffers."""

    streamed_layers: Count
    layers: Count
    """Number of layers of the model."""
    host_bytes: Count
    """Host memory that holds the streamed layers."""
    slot_bytes: Count
    """Device memory of the two buffers."""


class MemoryMeasured(Event, tag="memory", frozen=True, kw_only=True):
    """A measured memory peak and its estimate, in bytes."""

    when: Literal["probe", "end"]
    estimated_bytes: Count
    """Estimated peak, on the same memory level as ``measured_bytes``."""
    measured_bytes: Count
    """Peak of the process: on CUDA the reserved pool and the context, on a CPU the resident set."""
    allocated_bytes: Count = 0
    reserved_bytes: Count = 0


def phase_label(phase: str) -> str:
    """Return the name of a phase to display."""
    return "testing" if phase == "probing" else phase


class Step(Event, tag="step", frozen=True, kw_only=True):
    """One optimizer step. A ``loss`` or ``grad_norm`` that is NaN or infinite is recorded as None."""

    step: Count
    epoch: float
    loss: float | None
    """Loss; None represents NaN or infinity, which JSON cannot represent."""
    learning_rate: float
    grad_norm: float | None
    tokens: Count
    """Number of tokens trained on so far, without padding."""
    tokens_per_s: float
    """Tokens per second since the previous recorded step, without padding."""
    reward_accuracy: float | None = None
    """For a preference method: share of comparisons in which the better answer has the higher reward."""
    reward_margin: float | None = None
    """For a preference method: mean reward of the better answers minus mean reward of the worse ones."""


class GeneralAnswers(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Counts over short greedy answers to general prompts, for the model and its base."""

    answers: Count
    ended: Count
    """Number of answers that end their turn within the token limit."""
    base_ended: Count
    looping: Count
    """Number of answers that end in a repetition."""
    base_looping: Count
    refused: Count
    """Number of answers that begin with a refusal."""
    base_refused: Count
    json_prompts: Count = 0
    """Number of prompts that ask for JSON."""
    json_valid: Count = 0
    """Number of answers to these prompts that contain valid JSON."""
    base_json_valid: Count = 0


class Evaluated(Event, tag="evaluated", frozen=True, kw_only=True):
    """Validation loss at a step. Step 0 is before training."""

    step: Count
    loss: float | None
    best: bool = False
    """Whether this evaluation has the lowest ``score`` since training began or, without one, the lowest loss.
    False at step 0.
    """
    before_training: float | None = None
    """Validation loss at step 0, if it was measured."""
    accuracy: float | None = None
    """Share of greedy predictions that match the short answer of the sample exactly; None for data without
    short answers. At step 0, the share before training.
    """
    forgetting: float | None = None
    """Mean KL(base ‖ model) in nats on the base's answers to general prompts; None if not measured."""
    score: float | None = None
    """Loss plus weighted forgetting, if ``training.forgetting_weight`` is set. The lowest score is best."""
    general_turn_ends: float | None = None
    """Share of turn ends that the model still predicts, in the base's answers to general prompts."""
    reward_accuracy: float | None = None
    """For a preference method: share of comparisons in which the better answer has the higher reward."""
    reward_margin: float | None = None
    """For a preference method: mean reward of the better answers minus mean reward of the worse ones."""
    general_answers: GeneralAnswers | None = None
    """Counts over answers to general prompts, at the end of a run that measures forgetting."""


class ValidationCompared(Event, tag="validation_compared", frozen=True, kw_only=True):
    """Validation loss on the same rows, before and after training, in nats per trained token."""

    rows: Count
    before: float
    """Loss before training: of the base, or of the adapter that the run started from."""
    after: float
    low: float | None
    """Lower end of the 95 % interval of ``after - before`` (bootstrap over rows); None for one row."""
    high: float | None


class AnswersCompared(Event, tag="answers_compared", frozen=True, kw_only=True):
    """Quality of the answers of base and adapter to validation prompts at the end of the run, as measured by
    ``metric``.
    """

    metric: str
    prompts: Count
    base: float
    """Mean of the metric for the base, 0 to 1."""
    adapter: float
    low: float
    """Lower end of the 95 % interval of the adapter's mean minus the base's mean."""
    high: float
    comparison: str
    """Result of the comparison: ``better``, ``worse`` or ``unclear``."""
    seconds: float


class CheckpointSaved(Event, tag="checkpoint_saved", frozen=True, kw_only=True):
    """A checkpoint is complete. Training can be resumed from it."""

    step: Count
    folder: str
    """Path of the checkpoint relative to the run's directory."""


class SampleGenerated(Event, tag="sampled", frozen=True, kw_only=True):
    """The current model's answer to a fixed prompt."""

    step: Count
    prompt: str
    answer: str


class Health(Event, tag="health", frozen=True, kw_only=True):
    """A warning about the run, with evidence and remedy."""

    kind: str
    """Kind of the warning: ``nan_loss`` (of loss or gradient norm), ``exploding_gradient``,
    ``gradients_overflow``, ``plateau``, ``gpu_idle``, ``gpu_lost``, ``throttled``, ``disk_full``…"""
    severity: Literal["warning", "error"]
    evidence: str
    remedy: str
    step: Count = 0


class RequestReceived(Event, tag="asked", frozen=True, kw_only=True):
    """The trainer accepted a request from ``control/``."""

    request: str
    value: float | None = None


class Finished(Event, tag="finished", frozen=True, kw_only=True):
    """The run is finished and its adapter complete."""

    step: Count
    seconds: float
    """Training time of this attempt in seconds, without loading."""
    tokens_per_s: float
    reason: str = ALL_STEPS_DONE
    energy_kwh: float | None = None
    """Energy of the GPU over the whole run, with loading and evaluation; None if it reports no power."""
    tokens_per_joule: float | None = None
    """Number of trained tokens per joule of ``energy_kwh``."""
    checksums: str = ""
    """SHA-256 of the adapter's ``SHA256SUMS``; empty in events of older versions."""


class Failed(Event, tag="failed", frozen=True, kw_only=True):
    """The run ended with an error. The fields are those of a UserError."""

    title: str
    what: str
    why: str = ""
    fix: str = ""
    code: str = ""
    kind: Literal["problem", "out_of_memory", "killed", "lost", "bug"] = "problem"
    exit_code: int | None = None
    phase: Phase | None = None
    """Phase in which memory ran out; None for other failures, and if the phase is unknown."""
    missing_bytes: Count = 0
    """GPU memory that was requested beyond what was free when memory ran out; 0 if unknown."""
    others_bytes: Count = 0
    """GPU memory that other programs held at that moment; 0 if unknown."""

    @property
    def others_held_enough(self) -> bool:
        """Whether other programs held at least what was missing, so that closing them is enough."""
        return 0 < self.missing_bytes <= self.others_bytes

    @classmethod
    def from_problem(cls, problem: UserError, *, at: float, exit_code: int | None) -> Failed:
        """Convert an exception to the event that records it."""
        return cls(at=at, **problem.fields() | {"exit_code": exit_code})

    def problem(self) -> UserError:
        """Convert the event back to the exception that it records."""
        return UserError(self.title, what=self.what, why=self.why, fix=self.fix, code=self.code)


class Stopped(Event, tag="stopped", frozen=True, kw_only=True):
    """The run ended on request. If it had started, its checkpoint and its current adapter were saved."""

    step: Count
    checksums: str = ""
    """SHA-256 of the adapter's ``SHA256SUMS``; empty if no adapter was written."""


class Paused(Event, tag="paused", frozen=True, kw_only=True):
    """The run was paused, and uses no GPU. Resuming continues from its last checkpoint, if it has one."""

    step: Count
    hold: Hold | None = None
    """Why the runner paused the run and will continue it by itself; None if the user paused the run."""


SERIES: tuple[type[Event], ...] = (Step,)
"""Frequent kinds of events, which readers of a long run sample. All other events are facts."""
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
    """Encode an event as one line, including the newline."""
    return _encoder.encode(event) + b"\n"


def decode(line: bytes) -> AnyEvent | None:
    """Decode a complete line; return None for an event that this version does not understand."""
    return try_json(line, _decoder)
