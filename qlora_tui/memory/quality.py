"""Measures, in a child process, how quantizing a base changes its predictions for the user's own rows.

The measurement is ``training/quantization_quality.py``. ``estimate --quality`` and the Memory screen use this
module.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from qlora_tui.formatting import format_bytes, format_nats, format_small_percent, join_words
from qlora_tui.recipe.schema import ALL_LINEAR, Recipe
from qlora_tui.remote.calls import changes_box
from qlora_tui.worker import Progress, run_job

NOTABLE_GAIN = 0.1
"""Share by which keeping layers in 16 bits must lower the divergence to be mentioned."""


class LayerError(Struct, frozen=True):
    """How quantizing one decoder layer changes the layer's output."""

    layer: int
    error: float
    """Mean, over tokens, of the norm of the change divided by the norm of the 16-bit hidden state."""
    kept_bytes: int
    """Additional bytes that the layer takes in 16 bits."""


class Difference(Struct, frozen=True):
    """The difference between the predictions of two forms of a model."""

    divergence: float
    """Mean Kullback-Leibler divergence from the 16-bit model's next-token distribution, in nats per token."""
    changed: float
    """Share of tokens after which the most likely next token differs."""


class Quality(Struct, frozen=True):
    """How a quantization changes the predictions of a base."""

    method: str
    """``nf4``, ``fp4`` or ``int8``."""
    rows: int
    tokens: int
    """Number of tokens in the loss of these rows, for which predictions were compared."""
    all_layers: Difference
    """The difference with every layer quantized."""
    layers: tuple[LayerError, ...]
    """Errors of the layers, in the order of the model."""
    kept_layers: tuple[int, ...]
    """The layers with the largest errors, in the order of the model."""
    with_kept: Difference
    """The difference with all layers quantized except ``kept_layers``."""

    @property
    def kept_bytes(self) -> int:
        """Additional bytes that the model takes with ``kept_layers`` in 16 bits."""
        return sum(each.kept_bytes for each in self.layers if each.layer in self.kept_layers)

    @property
    def skip(self) -> str:
        """Return the target pattern of ``kept_layers``, for ``quantization.skip``."""
        return f"{','.join(map(str, self.kept_layers))}.{ALL_LINEAR}"

    @property
    def gain(self) -> float:
        """Return the share by which keeping ``kept_layers`` in 16 bits lowers the divergence."""
        whole = self.all_layers.divergence
        return 1 - self.with_kept.divergence / whole if whole > 0 else 0.0


@changes_box
def measure_in_child(
    recipe: Recipe,
    *,
    on_progress: Callable[[Progress], object] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Quality:
    """Measure how the recipe's quantization changes predictions for rows of its data.

    Raises:
        JobStopped: ``should_stop`` returned true.
        UserError: the recipe has no data or no quantization, or the model cannot be measured.
    """
    return run_job(
        "qlora_tui.training.quantization_quality:measure_quality",
        recipe,
        result=Quality,
        title="The quality could not be measured",
        subject="The process that compares the quantized model with the 16-bit one",
        on_progress=on_progress,
        should_stop=should_stop,
    )


def describe_quality(quality: Quality) -> list[str]:
    """Describe the result in sentences."""
    bits = {"int8": "8 bits"}.get(quality.method, "4 bits")
    whole, kept = quality.all_layers, quality.with_kept
    lines = [
        f"Quantizing to {bits} ({quality.method}) changes {format_small_percent(whole.changed)} of "
        f"next-token predictions, KL {format_nats(whole.divergence)} nats per token, compared with 16 bits "
        f"on {quality.tokens:,} tokens in {quality.rows:,} of your rows."
    ]
    errors = sorted(quality.layers, key=lambda each: -each.error)
    worst = ", ".join(f"{each.layer} ({format_small_percent(each.error)})" for each in errors[:4])
    lines.append(
        f"Layers whose output changes most when quantized: {worst}; median "
        f"{format_small_percent(_median(errors))}."
    )
    names = join_words([str(layer) for layer in quality.kept_layers])
    if quality.gain >= NOTABLE_GAIN:
        lines.append(
            f"Keeping {'layers' if len(quality.kept_layers) > 1 else 'layer'} {names} in 16 bits (+"
            f"{format_bytes(quality.kept_bytes)}) brings this to {format_small_percent(kept.changed)} of "
            f"next-token predictions, KL {format_nats(kept.divergence)}. To keep them, set "
            f'quantization.skip = ["{quality.skip}"].'
        )
    else:
        lines.append(
            f"No layer stands out: keeping {names} in 16 bits gives a KL of {format_nats(kept.divergence)}."
        )
    return lines


def _median(errors: list[LayerError]) -> float:
    return sorted(each.error for each in errors)[len(errors) // 2]
