"""What Home says, as lines: the card, the last run, the queue, the recipe in the making."""

from __future__ import annotations

from textual.content import Content

from qlora_tui.errors import Problem
from qlora_tui.format import duration, figure, gib
from qlora_tui.memory import judge
from qlora_tui.memory.room import Room
from qlora_tui.runs.status import ACTIVE
from qlora_tui.tui.screens.home_next import NextStep
from qlora_tui.tui.screens.runs_summary import RunSummary, thinned
from qlora_tui.tui.screens.train_head import SIGNS, ago
from qlora_tui.tui.watch import Pulse
from qlora_tui.tui.widgets.axis import rounded
from qlora_tui.tui.widgets.memory_bar import bar
from qlora_tui.tui.widgets.recipe_strip import VERDICT_STYLE, recipe_line
from qlora_tui.tui.widgets.strip_chart import blocks
from qlora_tui.tui.workbench import Workbench

_CURVE = 24


def card_lines(pulse: Pulse, room: Room) -> list[Content]:
    """The card and how busy it is, or what there is instead."""
    if pulse.card is None:
        memory = f"{gib(room.bytes)} GiB"
        where = (
            "runs train on the CPU, slowly" if room.device.kind == "cpu" else f"estimates are for {room.name}"
        )
        first = Content.assemble(("No GPU", "bold"), f"   {where}   {memory} of memory")
        return [first, *([Content.styled(pulse.no_card, "dim")] if pulse.no_card else [])]
    card, reading = pulse.card, pulse.reading
    if reading is None:
        return [
            Content.assemble((card.short_name, "bold"), "   does not answer"),
            Content.styled(pulse.no_card, "dim"),
        ]
    use = "NA" if reading.utilization_percent is None else f"{reading.utilization_percent}%"
    heat = "NA" if reading.temperature_c is None else f"{reading.temperature_c} °C"
    used, total = reading.memory_used_bytes, reading.memory_total_bytes
    drawn = f"{bar(used / total, 16)} " if used is not None and total else ""
    return [
        Content.assemble(
            (card.short_name, "bold"), f"   util {use}   {drawn}{gib(used)} of {gib(total)} GiB   {heat}"
        )
    ]


def run_lines(summary: RunSummary | None, news: bool, now: float) -> list[Content]:
    """The run at work or the last one: what it is, and how it stands or ended."""
    if summary is None:
        return [Content.styled("No run yet.", "dim")]
    status = summary.status
    sign, style = SIGNS[status.state]
    word = (status.phase or status.state) if status.state in ACTIVE else status.state
    first = Content.assemble((f"{sign} ", style), (summary.id, "bold"), "  ", (word, style))
    if status.state in ACTIVE:
        share = status.step / status.total_steps if status.total_steps else 0.0
        loss = "" if status.loss is None else f"   loss {figure(status.loss, 3)}"
        steps = f"step {status.step:,} of {status.total_steps:,}" if status.total_steps else "preparing"
        return [first, Content(f"{bar(share, _CURVE)} {steps}{loss}")]
    first += f"  {ago(status.at, now)}" if status.at else ""
    if news and status.at:
        first += Content.styled("  while you were away", "$accent")
    lines = [first]
    facts = _outcome(summary)
    if summary.losses:
        lines.append(Content.assemble((curve(summary.losses, _CURVE), "$primary"), "  ", facts))
    elif facts:
        lines.append(Content(facts))
    if status.state in ("failed", "lost", "unreadable") and status.detail:
        lines.append(Content.styled(status.detail, "$error"))
    return lines


def _outcome(summary: RunSummary) -> str:
    facts = []
    if summary.best is not None:
        facts.append(f"best loss {figure(summary.best[0], 3)} at step {summary.best[1]:,}")
    elif summary.loss is not None:
        facts.append(f"loss {figure(summary.loss, 3)}")
    if summary.status.total_steps:
        facts.append(f"step {summary.status.step:,} of {summary.status.total_steps:,}")
    if summary.seconds is not None:
        facts.append(duration(summary.seconds))
    return "   ".join(facts)


def curve(losses: tuple[float, ...], width: int) -> str:
    """A run's losses in one line, from its own lowest to its own highest."""
    means = thinned(losses, width)
    finite = [mean for mean in means if mean is not None and mean == mean]
    if not finite:
        return blocks(means, 0.0, 1.0, 1)[0]
    axis = rounded(min(finite), max(finite))
    return blocks(means, axis.low, axis.high, 1)[0]


def queue_lines(waiting: tuple[str, ...]) -> list[Content]:
    """What waits, the next one first."""
    if not waiting:
        return [Content.styled("Nothing waits.", "dim")]
    shown = [Content(f"{number}. {name}") for number, name in enumerate(waiting[:3], 1)]
    if len(waiting) > len(shown):
        shown.append(Content.styled(f"and {len(waiting) - len(shown)} more", "dim"))
    return shown


def recipe_lines(workbench: Workbench, room: Room) -> list[Content]:
    """What is being prepared, and whether it fits."""
    first = Content(recipe_line(workbench))
    compared = workbench.comparison(room.device)
    if isinstance(compared, Problem):
        text = f"{compared.what} {compared.fix}" if workbench.recipe.model.id else ""
        return [first, Content.styled(text, "dim")] if text else [first]
    method = workbench.recipe.quantization.method
    made = compared.get("int8" if method == "int8" else "fp16" if method == "none" else "nf4")
    if made is None:
        return [first]
    verdict = judge(made, room.bytes)
    share = made.total_bytes / room.bytes
    figures = f"{bar(share, _CURVE)} {gib(made.total_bytes)} of {gib(room.bytes)} GiB  "
    return [first, Content.assemble(figures, (verdict.word, VERDICT_STYLE[verdict.word]))]


def next_lines(step: NextStep, others: tuple[NextStep, ...]) -> list[Content]:
    """The step with its key, and what could be done instead."""
    lines = [
        Content.assemble(
            ("▸ enter ", "bold $accent"),
            (step.text, "bold"),
            (f"  ({step.why}; also {step.key})", "dim"),
        )
    ]
    for other in others:
        lines.append(
            Content.assemble((f"  {other.key:<6}", "$accent"), other.text, (f"  ({other.why})", "dim"))
        )
    return lines
