"""What the preview says of the run under the cursor: its result, its settings, and what was exported."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from textwrap import wrap

from textual.content import Content

from qlora_tui.formatting import (
    capitalize,
    format_bytes,
    format_duration,
    format_float,
    format_path,
    format_percent,
    pluralize,
    short_model_name,
    truncate_middle,
)
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.targets import format_rank
from qlora_tui.runs.describe import describe
from qlora_tui.runs.event_log import events_backwards
from qlora_tui.runs.events import ALL_STEPS_DONE, Step
from qlora_tui.runs.exports import Export, read_exports
from qlora_tui.runs.run_summary import WORSE, RunSummary
from qlora_tui.runs.status import ACTIVE, RESUMABLE
from qlora_tui.tui.key_names import highlight_keys, key_name, name_keys
from qlora_tui.tui.render.charts import labeled
from qlora_tui.tui.render.labels import (
    batch_words,
    data_words,
    format_ago,
    preference_words,
    result_label,
    targets_words,
)
from qlora_tui.tui.screens.runs.export_dialog import export_line

_LABEL = 10
"""Cells of a label."""
_MAX_EXPORTS = 8
_MAX_LOG_LINES = 24
_MAX_EVENTS = 2000
"""Events that are looked through for the lines of the log, most of them steps."""


@dataclass(frozen=True)
class RunFiles:
    """What is read from a run's folder for its preview."""

    recipe: Recipe | None
    """None if it cannot be read."""
    exports: tuple[Export, ...]
    checkpoints: tuple[int, ...]
    """Their steps, oldest first."""
    has_adapter: bool
    bytes: int
    """Size of everything in the folder."""
    log: tuple[tuple[float, str], ...]
    """Unix time and text of the last events but steps, the newest first."""

    @classmethod
    def read(cls, summary: RunSummary) -> RunFiles:
        """Read them. Used in a thread."""
        recipe = summary.run.readable_recipe()
        return cls(
            recipe,
            tuple(read_exports(summary.run)),
            tuple(step for step, _ in summary.run.checkpoints()),
            summary.run.adapter_dir.is_dir(),
            _size(summary.run.path),
            _log(summary),
        )


def run_keys(summary: RunSummary, files: RunFiles | None) -> tuple[tuple[str, str], ...]:
    """Keys of the panel, each with a verb. Of an active run, chat and export take the last checkpoint.

    A run that ended before it saved anything has nothing to chat with, nor to export.
    """
    if files is not None and not (files.checkpoints or files.has_adapter):
        return (("runs.open", "open"),)
    step = f" step {files.checkpoints[-1]:,}" if files is not None and files.checkpoints else ""
    if summary.status.state not in ACTIVE:
        step = ""
    chat = f"chat with{step}" if step else "chat"
    return (("runs.open", "open"), ("runs.chat", chat), ("runs.export", f"export{step}"))


def preview_title(summary: RunSummary) -> str:
    """The name, and the id where it is another."""
    return summary.name if summary.name == summary.id else f"{summary.name}  ({summary.id})"


def detail_lines(summary: RunSummary, exports: tuple[Export, ...]) -> list[Content]:
    """Two lines for a window without a preview: the facts, and how it ended."""
    facts = [part for part in (summary.model, summary.settings) if part]
    if summary.accuracy is not None:
        facts.append(f"{format_percent(summary.accuracy)} of short answers exactly right")
    if summary.energy:
        facts.append(summary.energy)
    second = ending(summary)
    if summary.verdict is not None and summary.defect is None and summary.status.state == "finished":
        second = Content(summary.verdict.sentence)
    if exports:
        second += Content.assemble(("  Export: " if second else "Export: ", "dim"), export_line(exports[0]))
    return [Content(" · ".join(facts)), second]


def ending(summary: RunSummary, *, beside_verdict: bool = False) -> Content:
    """Why it ended, and what is wrong with its result; empty where there is nothing to say.

    ``beside_verdict``: whether the verdict is shown too, which has the losses before and after training.
    """
    text = summary.status.detail.replace("\n", " ")
    if summary.defect is not None:
        text = "" if text == ALL_STEPS_DONE else capitalize(text)
    detail = Content.styled(text, "dim")
    is_said = beside_verdict and summary.verdict is not None
    wrong = (
        summary.defect.sentence if summary.defect and not (is_said and summary.defect.word == WORSE) else ""
    )
    fix = Content.assemble(("  ▸ ", "$accent"), summary.fix) if summary.fix else Content("")
    resume = ""
    if summary.status.state in RESUMABLE:
        resume = f"  {key_name('runs.resume')} resumes it."
    return Content.assemble((f"{wrong} " if wrong else "", "$error"), detail, fix, highlight_keys(resume))


def result_lines(summary: RunSummary, now: float, width: int, answers: str = "") -> list[Content]:
    """What came of it; ``answers`` is how far the comparison of its answers is, if it is being measured."""
    status = summary.status
    sign, word, style = result_label(status.state, summary.defect)
    rows: list[tuple[str, Content | str]] = [("state", Content.styled(f"{sign} {word}", style))]
    # The status of an active run is as old as its last heartbeat.
    is_active = status.state in ACTIVE
    if at := summary.started_at if is_active else status.at:
        since = (
            "started" if is_active else {"queued": "queued", "paused": "paused"}.get(status.state, "ended")
        )
        rows.append((since, format_ago(at, now).removeprefix("at ")))
    if summary.total_steps:
        rows.append(("steps", f"{summary.step:,} of {summary.total_steps:,}"))
    if summary.best is not None:
        loss, step = summary.best
        rows.append(("best", f"validation {format_float(loss)} at step {step:,}"))
    elif summary.loss is not None:
        rows.append(("last", f"training {format_float(summary.loss)}"))
    # The verdict has the loss before training too.
    if summary.loss_to_beat is not None and summary.verdict is None:
        rows.append(("before", f"{format_float(summary.loss_to_beat)}, better than after"))
    if summary.accuracy is not None:
        rows.append(("exact", f"{format_percent(summary.accuracy)} of short answers"))
    if summary.seconds is not None:
        left = "" if summary.seconds_left is None else f", {format_duration(summary.seconds_left)} left"
        rows.append(("trained", f"{format_duration(summary.seconds)}{left}"))
    if summary.energy:
        rows.append(("energy", summary.energy))
    if answers:
        rows.append(("answers", answers))
    lines = _rows(rows, width)
    if summary.verdict is not None:
        lines += [Content(line) for line in wrap(summary.verdict.sentence, width)]
        if not summary.verdict.has_answers and not answers:
            lines.append(Content.styled(name_keys("{runs.evaluate} compares its answers."), "dim"))
    return lines


def settings_lines(recipe: Recipe | None, width: int) -> list[Content]:
    """The settings in which runs most often differ."""
    if recipe is None:
        return [Content.styled("The recipe cannot be read.", "$error")]
    lora, training = recipe.lora, recipe.training
    limit = f", at most {training.max_steps:,} steps" if training.max_steps else ""
    rows: list[tuple[str, Content | str]] = [
        ("model", short_model_name(recipe.model.id) or "none"),
        ("data", data_words(recipe)),
        ("precision", recipe.quantization.method),
        ("LoRA", f"{format_rank(lora)}  alpha {lora.alpha:g}  {targets_words(recipe, 24)}"),
        ("length", batch_words(recipe)),
        ("lr", f"{training.learning_rate:g}  {training.lr_scheduler}"),
        ("epochs", f"{training.epochs:g}{limit}"),
    ]
    if method := preference_words(recipe):
        rows.append(("method", method))
    if recipe.note:
        rows.append(("note", " ".join(recipe.note.split())))
    return _rows(rows, width)


def files_lines(summary: RunSummary, files: RunFiles, width: int) -> list[Content]:
    """Checkpoints, size and place of the run, and its exports."""
    size = f"{format_bytes(files.bytes)}, {pluralize(len(files.checkpoints), 'checkpoint')}"
    rows = _rows([("size", size), ("folder", format_path(summary.run.path))], width)
    if not files.exports and not files.checkpoints and summary.status.state != "finished":
        return rows
    if not files.exports:
        return [*rows, Content.styled(name_keys("Not exported yet: {runs.export} writes a GGUF."), "dim")]
    return rows + [export_line(export, width) for export in files.exports[:_MAX_EXPORTS]]


def log_lines(files: RunFiles) -> list[Content]:
    """The last events of the run, the newest first."""
    if not files.log:
        return [Content.styled("Nothing happened yet.", "dim")]
    return [
        Content.assemble((f"{time.strftime('%H:%M', time.localtime(at))}  ", "dim"), text)
        for at, text in files.log
    ]


def _rows(rows: list[tuple[str, Content | str]], width: int) -> list[Content]:
    """A label and a value a line; a long value is shortened in its middle."""
    lines = []
    for label, value in rows:
        text = Content(truncate_middle(value, width - _LABEL)) if isinstance(value, str) else value
        lines.append(labeled(label, text, _LABEL))
    return lines


def _size(folder: Path) -> int:
    """Bytes of all files below; those that vanish meanwhile count nothing."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(path) / name).lstat().st_size
            except OSError:
                continue
    return total


def _log(summary: RunSummary) -> tuple[tuple[float, str], ...]:
    try:
        events = islice(events_backwards(summary.run.events_path), _MAX_EVENTS)
        others = (event for event in events if not isinstance(event, Step))
        return tuple(
            (event.at, " ".join(describe(event, summary.total_steps).split()))
            for event in islice(others, _MAX_LOG_LINES)
        )
    except OSError:
        return ()
