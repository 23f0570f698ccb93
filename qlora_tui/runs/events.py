"""What a run says of itself: one line of ``events.jsonl`` each.

Written by the trainer and the runner, read by everyone else. A field may be added with a default; one is
never renamed or given another meaning, so that old runs stay readable.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct

from qlora_tui.decoding import Count, UnixTime, decode_json
from qlora_tui.errors import UserError

Phase: TypeAlias = Literal[
    "loading", "converting", "tokenizing", "probing", "training", "evaluating", "saving"
]
STEP_PHASES: frozenset[Phase] = frozenset(("training", "evaluating", "saving"))
"""Phases that a run goes to and fro between, from its first step to its last."""


class Event(Struct, frozen=True, kw_only=True, tag_field="event", omit_defaults=True):
    """Common to all."""

    at: UnixTime
    """Unix time, seconds."""


class Queued(Event, tag="queued", frozen=True, kw_only=True):
    """The run exists and waits for its turn."""


class Started(Event, tag="started", frozen=True, kw_only=True):
    """A trainer took the run."""

    attempt: Count
    """1 for the first; one more for each resume or retry."""
    pid: Count
    resumed_from_step: Count = 0
    micro_batch_size: Count = msgspec.field(default=0, name="micro_batch")
    """As used in this attempt: a retry after running out of memory halves it."""
    gradient_accumulation: Count = 0
    gradient_checkpointing: bool = False


class PhaseChanged(Event, tag="phase", frozen=True, kw_only=True):
    """What the trainer does from here on."""

    phase: Phase
    detail: str = ""


class Progress(Event, tag="progress", frozen=True, kw_only=True):
    """How far a phase without steps has come (converting, tokenizing, evaluating)."""

    phase: Phase
    done: Count
    total: Count


class Environment(Event, tag="environment", frozen=True, kw_only=True):
    """What this attempt runs on: enough to explain a difference later."""

    device: str
    """``NVIDIA GeForce RTX 4090`` or the CPU's name."""
    device_kind: Literal["cuda", "cpu"]
    device_total_bytes: Count
    compute_dtype: str
    attention: str
    optimizer: str
    loss: str
    """``chunked``, ``liger`` or ``stock``, with the reason where it is not the usual one."""
    versions: dict[str, str]


class DataReady(Event, tag="data_ready", frozen=True, kw_only=True):
    """The data as it will be trained on."""

    samples: Count
    validation_samples: Count
    tokens: Count
    trained_tokens: Count
    rows: Count
    """Rows an epoch, after packing."""
    steps_per_epoch: Count
    total_steps: Count
    data_hash: str
    dropped: Count = 0
    cut: Count = 0
    thinking: Literal["auto", "on", "off"] = "auto"
    """How the model is to be asked, as it was trained; ``auto``: as its chat template does by itself."""


class AdapterReady(Event, tag="adapter_ready", frozen=True, kw_only=True):
    """What is trained."""

    trained_parameters: Count
    total_parameters: Annotated[int, Meta(ge=1, le=2**62)]


class StepVerified(Event, tag="step_verified", frozen=True, kw_only=True):
    """The first micro-batch, computed by transformers and peft alone and as this run computes it."""

    tokens: Count
    """Tokens that both ways were computed on; 0 where they could not be compared."""
    seconds: float
    loss: float | None = None
    reference_loss: float | None = None
    """The library's."""
    loss_noise: float | None = None
    """What rounding in this dtype moves the library's loss by."""
    gradient_difference: float | None = None
    """Share of its size by which one tensor's gradient differs: the tensor furthest beyond its noise."""
    gradient_noise: float | None = None
    """What rounding moves that gradient by, likewise."""
    tensor: str = ""
    replaced: tuple[str, ...] = ()
    """Fast paths that computed something else; this run uses the library's instead."""
    agrees: bool = True
    """Whether the step as this run computes it, after any replacement, is the library's."""
    reason: str = ""
    """Why the two could not be compared."""


class MemoryMeasured(Event, tag="memory", frozen=True, kw_only=True):
    """A peak beside what was predicted. Bytes."""

    when: Literal["probe", "end"]
    estimated_bytes: Count
    """Of the tier that ``measured_bytes`` is of."""
    measured_bytes: Count
    """The process's peak: on CUDA the reserved pool and the context, on a CPU the resident set."""
    allocated_bytes: Count = 0
    reserved_bytes: Count = 0


class Step(Event, tag="step", frozen=True, kw_only=True):
    """One optimizer step. ``loss`` and ``grad_norm`` may be NaN or infinite: they are told as they were."""

    step: Count
    epoch: float
    loss: float | None
    """None stands for NaN or infinity, which JSON cannot hold."""
    learning_rate: float
    grad_norm: float | None
    tokens: Count
    """Real tokens learnt from so far, padding not counted."""
    tokens_per_s: float
    """Real tokens a second over this step."""


class Evaluated(Event, tag="evaluated", frozen=True, kw_only=True):
    """Validation loss at a step; step 0 is before training."""

    step: Count
    loss: float | None
    best: bool = False
    accuracy: float | None = None
    """Share of greedy answers that match exactly, for short-answer data; at step 0 it is the base's."""


class CheckpointSaved(Event, tag="checkpoint_saved", frozen=True, kw_only=True):
    """Training can be resumed from here."""

    step: Count
    folder: str
    """Relative to the run's directory."""


class SampleGenerated(Event, tag="sampled", frozen=True, kw_only=True):
    """What the model in training answers to a fixed prompt."""

    step: Count
    prompt: str
    answer: str


class Health(Event, tag="health", frozen=True, kw_only=True):
    """Something is wrong or odd, with the evidence and the remedy."""

    kind: str
    """``nan_loss``, ``exploding_gradient``, ``plateau``, ``gpu_idle``, ``throttled``, ``disk_full``…"""
    severity: Literal["warning", "error"]
    evidence: str
    remedy: str
    step: Count = 0


class RequestReceived(Event, tag="asked", frozen=True, kw_only=True):
    """A request from ``control/`` was taken."""

    request: str
    value: float | None = None


class Finished(Event, tag="finished", frozen=True, kw_only=True):
    """Done; the adapter is complete."""

    step: Count
    seconds: float
    """Of training in this attempt, without loading."""
    tokens_per_s: float
    reason: str = "all steps done"
    energy_kwh: float | None = None
    """Of the card over the whole run, loading and evaluating included; None where it tells no power."""
    tokens_per_joule: float | None = None
    """Real tokens learnt from, by that energy."""
    checksums: str = ""
    """SHA-256 of the adapter's ``SHA256SUMS``; empty in events of older versions."""


class Failed(Event, tag="failed", frozen=True, kw_only=True):
    """Ended by an error: the same what, why and fix as everywhere."""

    title: str
    what: str
    why: str = ""
    fix: str = ""
    kind: Literal["problem", "out_of_memory", "killed", "lost", "bug"] = "problem"
    exit_code: int | None = None

    def problem(self) -> UserError:
        """As an exception, to show like any other."""
        return UserError(self.title, what=self.what, why=self.why, fix=self.fix)


class Stopped(Event, tag="stopped", frozen=True, kw_only=True):
    """Ended on request, with a checkpoint (and the adapter as it was) saved."""

    step: Count
    checksums: str = ""
    """SHA-256 of the adapter's ``SHA256SUMS``; empty where no adapter was written."""


class Paused(Event, tag="paused", frozen=True, kw_only=True):
    """The GPU was left on request; resume goes on from the checkpoint."""

    step: Count


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
    | MemoryMeasured
    | Step
    | Evaluated
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
    """One line, newline included."""
    return _encoder.encode(event) + b"\n"


def decode(line: bytes) -> AnyEvent | None:
    """The event of a whole line; None for one this version does not understand."""
    try:
        return decode_json(line, _decoder)
    except msgspec.MsgspecError:
        return None
