"""Events of which a test names what it is about."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from qlora_tui.runs.events import DataReady, Environment, Step


def a_step(number: int = 1, **facts: Any) -> Step:
    """Step ``number``, that many seconds after the epoch; ``facts`` are fields with other values."""
    step = Step(
        at=float(number),
        step=number,
        epoch=0.1,
        loss=2.0,
        learning_rate=1e-4,
        grad_norm=0.5,
        tokens=number * 100,
        tokens_per_s=50.0,
    )
    return structs.replace(step, **facts)


def a_data_set(**facts: Any) -> DataReady:
    """100 samples in 10 steps for each epoch; ``facts`` are fields with other values."""
    data = DataReady(
        at=0.0,
        samples=100,
        validation_samples=10,
        tokens=1000,
        trained_tokens=500,
        rows=100,
        steps_per_epoch=10,
        total_steps=10,
        data_hash="x",
    )
    return structs.replace(data, **facts)


def an_environment(device: str, at: float = 0.0) -> Environment:
    """A run on a processor that is called ``device``."""
    return Environment(
        at=at,
        device=device,
        device_kind="cpu",
        device_total_bytes=1,
        compute_dtype="float32",
        attention="sdpa",
        optimizer="adamw",
        loss="chunked",
        versions={},
    )
