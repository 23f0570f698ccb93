"""The run card: one picture of a run for sharing, 1200 × 630, as SVG or PNG.

It shows the model, the data, the loss curve, the loss before and after training, one question with the
answers before and after training, and the time, memory and energy of the run. File names appear without their
folders. Nothing says who trained the model, or where.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qlora_tui.formatting import (
    format_bytes,
    format_count,
    format_duration,
    format_loss,
    format_percent,
    format_speed,
    pluralize,
    short_model_name,
)
from qlora_tui.recipe.targets import format_rank
from qlora_tui.runs.describe import energy_words
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import Finished
from qlora_tui.runs.metrics_table import save_run
from qlora_tui.runs.run_summary import data_words
from qlora_tui.runs.task_metrics.task_evaluation import read_task_evaluation
from qlora_tui.runs.telemetry import EnergyMeter
from qlora_tui.runs.view import RunView
from qlora_tui.tui.render.loss import Frame, loss_picture
from qlora_tui.tui.render.picture import (
    CARD,
    arrow,
    broken,
    cut,
    document,
    picture_file,
    rectangle,
    text,
    text_width,
)

_WIDTH, _HEIGHT = 1200, 630
_EDGE, _GAP, _INSIDE = 40, 16, 24
"""Margin to the left and right of the panels, gap between two panels, and padding inside a panel, in units of
the picture.
"""
_TOP, _SPLIT, _BOTTOM = 142, 424, 602
"""Top of the panels, top of the lower panel, and bottom of the panels, in units of the picture."""
_LEFT_WIDTH = 650
_MAX_CHARACTERS = 400
"""Maximum number of characters of a name or answer that are read. A malicious file can have millions."""
_ANSWER_LINES = 4


@dataclass(frozen=True, kw_only=True)
class RunCard:
    """Texts and figures on a run card. The card also shows the loss curve."""

    model: str
    data: str
    setup: str
    """Quantization, adapter and sequence length: ``QLoRA nf4 · r16 all-linear · 384 tokens``."""
    state: str
    """Number of steps: ``81 steps``, or ``81 of 200 steps`` for a run that has not trained all its steps."""
    loss: tuple[float | None, float | None]
    """Validation loss before and after training; None if not measured."""
    facts: tuple[tuple[str, str], ...]
    """(label, value) pairs for hardware, time, speed, memory, energy and trained weights, without unknown
    values.
    """
    question: str = ""
    answers: tuple[str, str] = ("", "")
    """The answers before and after training; empty if there are none."""


def read_card(view: RunView, *, with_answers: bool = True) -> RunCard:
    """Return the texts and figures of a run's card. Without ``with_answers``, the card contains nothing from
    the training data.
    """
    recipe = view.run.readable_recipe()
    change, best = view.validation_change, view.best
    after = change.after if change is not None else None if best is None else best.loss
    question, before_answer, after_answer = _answers(view) if with_answers else ("", "", "")
    model, data, setup = "unknown model", "", ""
    if recipe is not None:
        model = short_model_name(recipe.model.id)[:_MAX_CHARACTERS]
        data = data_words(recipe)[:_MAX_CHARACTERS]
        targets = ",".join(recipe.lora.target_modules)[:60]
        setup = (
            f"{recipe.quantization.method} · {format_rank(recipe.lora)} {targets} · "
            f"{recipe.data.max_length:,} tokens"
        )
    samples = "" if view.data is None else f" · {pluralize(view.data.samples, 'sample')}"
    total = f" of {view.total_steps:,}" if view.step < view.total_steps else ""
    return RunCard(
        model=model,
        data=f"{data}{samples}",
        setup=setup,
        state=f"{view.step:,}{total} steps",
        loss=(view.loss_before_training if change is None else change.before, after),
        facts=_facts(view),
        question=question,
        answers=(before_answer, after_answer),
    )


def _facts(view: RunView) -> tuple[tuple[str, str], ...]:
    seconds, kwh = view.series.seconds(), _energy_kwh(view)
    speed = view.series.tokens[-1] / seconds if seconds else None
    device = "" if view.environment is None else view.environment.device[:_MAX_CHARACTERS]
    facts = [
        ("hardware", device.removeprefix("NVIDIA GeForce ").removeprefix("NVIDIA ")),
        ("time in steps", format_duration(seconds) if seconds else ""),
        ("speed", "" if speed is None else f"{format_speed(speed)} tok/s"),
        ("peak memory", "" if view.memory is None else format_bytes(view.memory.measured_bytes)),
        ("energy", "" if kwh is None else energy_words(kwh)),
        (
            "trained",
            "" if view.adapter is None else f"{format_count(view.adapter.trained_parameters)} weights",
        ),
    ]
    return tuple((label, value) for label, value in facts if value)


def _energy_kwh(view: RunView) -> float | None:
    """Return the energy that a run used: from its final event, or from telemetry if the event has no energy;
    None if no power was measured.
    """
    if isinstance(view.ending, Finished) and view.ending.energy_kwh is not None:
        return view.ending.energy_kwh
    meter = EnergyMeter(view.run.telemetry_path)
    meter.read_all()
    return meter.kwh


def _answers(view: RunView) -> tuple[str, str, str]:
    """Return the first question that was answered both before and after training, and the two answers; three
    empty texts if there is no such question.
    """
    last = {each.prompt: each.answer for each in view.samples if each.step > 0}
    for before in view.samples:
        if before.step == 0 and before.prompt in last:
            return before.prompt, before.answer, last[before.prompt]
    evaluation = read_task_evaluation(view.run)
    row = next((row for row in evaluation.rows if row.base and row.adapter), None) if evaluation else None
    return ("", "", "") if row is None else (row.prompt, row.base, row.adapter)


def card_svg(view: RunView, card: RunCard) -> str:
    """Return the picture of the card as SVG."""
    lower = bool(card.question)
    height = (_SPLIT - _GAP if lower else _BOTTOM) - _TOP
    right = _EDGE + _LEFT_WIDTH + _GAP
    parts = [
        rectangle(0, 0, _WIDTH, _HEIGHT, CARD.background),
        *_head(card),
        rectangle(_EDGE, _TOP, _LEFT_WIDTH, height, CARD.panel, 12),
        text(_EDGE + _INSIDE, _TOP + 32, "loss", CARD.labels, size=16),
        *_legend(view),
        *loss_picture(view, Frame(_EDGE + 74, _TOP + 52, _LEFT_WIDTH - 104, height - 96), CARD, 14),
        rectangle(right, _TOP, _WIDTH - _EDGE - right, height, CARD.panel, 12),
        *_outcome(card, right + _INSIDE, _WIDTH - _EDGE - right - 2 * _INSIDE, height),
    ]
    if lower:
        parts += _conversation(card)
    return document(_WIDTH, _HEIGHT, parts)


def _head(card: RunCard) -> list[str]:
    room = _WIDTH - 2 * _EDGE
    model = cut(card.model, room - 260, 42)
    return [
        text(_EDGE, 80, model, CARD.title, size=42, bold=True),
        text(_WIDTH - _EDGE, 50, "trained with qlora-tui", CARD.labels, size=17, anchor="end"),
        text(_WIDTH - _EDGE, 80, card.state, CARD.text, size=20, anchor="end"),
        text(_EDGE, 116, cut(f"fine-tuned on {card.data}", 620, 20), CARD.text, size=20),
        text(_WIDTH - _EDGE, 116, cut(card.setup, 480, 18), CARD.labels, size=18, anchor="end"),
    ]


def _legend(view: RunView) -> list[str]:
    at: float = _EDGE + _LEFT_WIDTH - _INSIDE
    names = (("training, smoothed", CARD.mean), ("validation", CARD.validation))
    parts = []
    for name, color in names if view.best is not None else names[:1]:
        parts.append(text(at, _TOP + 32, name, color, size=15, anchor="end"))
        at -= text_width(name, 15) + _INSIDE
    return parts


def _outcome(card: RunCard, x: float, width: float, height: float) -> list[str]:
    """Return the shapes of the panel with the loss before and after training in large digits, and the card's
    facts below.
    """
    before, after = card.loss
    parts = [text(x, _TOP + 32, "validation loss", CARD.labels, size=16)]
    if after is None:
        parts.append(text(x, _TOP + 88, "not measured after training", CARD.text, size=22))
    else:
        color = CARD.validation if before is None or after < before else CARD.worse
        end = x
        if before is not None:
            start = format_loss(before)
            end += text_width(start, 44) + 18
            parts += [text(x, _TOP + 88, start, CARD.text, size=44), *arrow(end, _TOP + 72, 42, CARD.labels)]
            end += 58
        parts.append(text(end, _TOP + 88, format_loss(after), color, size=50, bold=True))
        if before:
            change = (
                f"{format_percent(abs(after - before) / before)} {'lower' if after < before else 'higher'}"
            )
            parts.append(text(x + width, _TOP + 32, change, color, size=17, anchor="end", bold=True))
    rows = (len(card.facts) + 1) // 2
    step = min(66.0, (height - 116) / max(1, rows))
    for number, (label, value) in enumerate(card.facts):
        left, top = x + number % 2 * width / 2, _TOP + 110 + number // 2 * step
        parts.append(text(left, top + 16, label, CARD.labels, size=14))
        parts.append(text(left, top + 37, cut(value, width / 2 - 12, 20), CARD.title, size=20))
    return parts


def _conversation(card: RunCard) -> list[str]:
    """Return the shapes for the question, with the answers before and after training side by side."""
    x, width = _EDGE + _INSIDE, _WIDTH - 2 * _EDGE - 2 * _INSIDE
    column = (width - 2 * _INSIDE) / 2
    parts = [
        rectangle(_EDGE, _SPLIT, _WIDTH - 2 * _EDGE, _BOTTOM - _SPLIT, CARD.panel, 12),
        text(
            x,
            _SPLIT + 34,
            cut(f"“{card.question[:_MAX_CHARACTERS]}”", width, 20),
            CARD.title,
            size=20,
            bold=True,
        ),
    ]
    looks = (("before", CARD.labels, CARD.text), ("after", CARD.validation, CARD.title))
    for number, ((name, color, plain), answer) in enumerate(zip(looks, card.answers, strict=True)):
        left = x + number * (column + 2 * _INSIDE)
        parts.append(text(left, _SPLIT + 64, name, color, size=15, bold=True))
        lines = broken(answer[:_MAX_CHARACTERS] or "(no answer)", column, 17, _ANSWER_LINES)
        for row, line in enumerate(lines):
            parts.append(text(left, _SPLIT + 88 + row * 23, line, plain, size=17))
    return parts


def save_card(run: RunDir, file: Path, *, with_answers: bool = True) -> None:
    """Write the card of a run to ``file``. Without ``with_answers``, the card contains nothing from the
    training data.

    Raises UserError if the run has no steps, if the file exists or has an unknown extension, or if Pillow is
    needed and not installed.
    """

    def content(view: RunView, kind: str) -> bytes:
        svg = card_svg(view, read_card(view, with_answers=with_answers))
        return picture_file(svg, kind, CARD.background)

    save_run(run, file, (".svg", ".png"), content, neither="in .svg nor in .png", example="card.svg")
