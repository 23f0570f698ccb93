"""Panels of the live pane: warnings, setup, evaluations and answers, and the header with the state and the
progress. The outcome, the graph, the stages, the log and the machine have their own modules.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import partial

from textual.content import Content

from qlora_tui.formatting import (
    capitalize,
    format_count,
    format_duration,
    format_float,
    format_loss,
    format_path,
    format_percent,
    format_progress,
    format_small_percent,
    format_speed,
    truncate_middle,
)
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.describe import (
    describe,
    done_at_words,
    energy_words,
    exceeds_estimate,
    format_energy,
)
from qlora_tui.runs.events import Evaluated, Failed, Finished, phase_label
from qlora_tui.runs.run_summary import find_defect, last_evaluation, next_evaluation
from qlora_tui.runs.status import ACTIVE, BROKEN, held_words
from qlora_tui.runs.view import RunView
from qlora_tui.tui.key_names import highlight_keys, key_name
from qlora_tui.tui.render.figures import Figure, fact, figure_line, large_figures
from qlora_tui.tui.render.labels import (
    BEST,
    batch_words,
    best_figure,
    best_word,
    format_ago,
    progress_figures,
    recipe_facts,
    result_label,
    state_bar,
)
from qlora_tui.tui.render.loss import validation_lines
from qlora_tui.tui.render.meters import bar, labeled
from qlora_tui.tui.screens.train.outcome import fix_text, outcome_has_fix
from qlora_tui.tui.screens.train.run_follower import RunSnapshot
from qlora_tui.tui.widgets.controls import wrapped

_MIN_BAR = 8
_STEP_BAR = 8
"""Width of the bar that shows the progress within a step, in cells."""
_LONG_STEP_S = 5.0
"""Minimum duration of a step, in seconds, for showing its micro-batches. In shorter steps, they would
flicker.
"""
_MAX_DETAIL = 48
"""Maximum width of a phase's detail, such as a model's path, in cells."""
_ENDINGS = {
    "stop": ("Stopping", " after this step"),
    "stop_now": ("Stopping now", ""),
    "pause": ("Pausing", " after this step"),
    "pause_now": ("Pausing", ""),
    "finish_epoch": ("Stopping at the end of this epoch", ""),
}
"""(action, when it happens) for each request to end a run. The second text is shown only during training."""
_LARGE_ROWS = 3
"""Minimum height of the header, in lines, at which its figures are drawn large."""
_INDENT = 2
"""Indent, in cells, of answers and of the continuation lines that :func:`.wrapped` makes."""
_LEAST_FOR_ANSWERS = 3
"""Minimum height of the answers panel, in lines, at which answers are shown in full."""
_ROWS_OF_FIRST = 2
"""Number of lines that a prompt's first answer may take in a small panel. A larger panel allows more."""
_GAP = "     "
"""Gap between the large figures and the other facts."""
_LABEL = 8
"""Width of the label before a value, in cells."""
_MUCH_OF_CPU = 0.4
"""Minimum fraction of the CPU that other programs must use to be reported as a cause of slow training."""
_row = partial(labeled, cells=_LABEL)


def header_lines(
    snapshot: RunSnapshot, now: float, width: int, height: int, *, has_bar: bool = True
) -> list[Content]:
    """Return the header: two lines, or three with large figures. ``now``: Unix time. ``has_bar``: whether the
    header has the bar :func:`.state_bar` at its left edge.

    The first line has the state and the progress; the second has the key figures and other facts. If
    ``height`` is at least three and key figures are known, the figures are large, with the state, the
    progress and the facts to their right; if ``height`` is at least four, an empty line precedes them.
    """
    edge = state_bar(snapshot.status, find_defect(snapshot.view)) + " " if has_bar else Content()
    lines = [edge + line for line in _header_lines(snapshot, now, width - edge.cell_length, height)]
    return [Content(""), *lines] if height > len(lines) == _LARGE_ROWS else lines


def _header_lines(snapshot: RunSnapshot, now: float, width: int, height: int) -> list[Content]:
    figures = key_figures(snapshot)
    if height < _LARGE_ROWS or not figures:
        known = figure_line(figures)
        room = width - known.cell_length - 2
        rest = fitted(facts(snapshot, now), room if known else width, 1)[0]
        return [_progress_line(snapshot, width), Content("  ").join(filter(None, (known, rest)))]
    large = large_figures(figures)
    room = width - large[0].cell_length - len(_GAP)
    first, second = fitted(facts(snapshot, now), room, 2)
    # If the facts fill only one line, put them into the last line, next to the labels of the figures.
    lines = [_progress_line(snapshot, room), *((first, second) if second else (second, first))]
    return [Content.assemble(left, _GAP, right) for left, right in zip(large, lines, strict=True)]


def _progress_line(snapshot: RunSnapshot, width: int) -> Content:
    """Return a line with the run's state and progress, such as ``● training  ▄▄▄▄▄▄▁▁▁  86%  step 70/81``.
    Without a step, or with little room, the line has no bar.
    """
    first, share = state_line(snapshot), progress_share(snapshot)
    progress = "  ".join(progress_facts(snapshot))
    cells = width - first.cell_length - len(progress) - 4
    drawn = f"{bar(share, cells)}  " if share is not None and cells >= _MIN_BAR else ""
    style = result_label(snapshot.status, None)[2] if snapshot.status.state in BROKEN else "$training"
    return Content.assemble(first, "  ", (drawn, style), progress)


def fitted(texts: Sequence[Content], width: int, rows: int) -> list[Content]:
    """Return ``rows`` lines of at most ``width`` cells, filled with the texts in order. Texts that do not fit
    are left out.
    """
    lines = [Content()]
    for text in texts:
        piece = "  " + text if lines[-1] else text
        if lines[-1].cell_length + piece.cell_length > width and len(lines) < rows:
            lines.append(Content())
            piece = text
        if lines[-1].cell_length + piece.cell_length <= width:
            lines[-1] += piece
    return [*lines, *[Content()] * (rows - len(lines))]


def key_figures(snapshot: RunSnapshot) -> list[Figure]:
    """Return the key figures that are known. For an active run, these are the mean loss and the time left;
    for a run that ended well, the best validation loss. A failed run has none, because the cause of the
    failure is shown instead.
    """
    if snapshot.status.state in ACTIVE:
        return progress_figures(snapshot.mean_loss, snapshot.seconds_left)
    if snapshot.best is None or snapshot.best.loss is None or snapshot.status.state in BROKEN:
        return []
    return [best_figure(snapshot.best.loss, snapshot.view.loss_to_beat)]


def state_line(snapshot: RunSnapshot) -> Content:
    """Return the run's state, warnings, attempt and pending request, such as ``● training  ! 2 warnings
    attempt 2``.
    """
    status, view = snapshot.status, snapshot.view
    defect = find_defect(view)
    sign, word, style = result_label(status, defect)
    if status.state == "running":
        word = phase_label(view.phase or status.state)
    elif status.hold is not None:
        word = held_words(status)
    elif defect is not None:
        word = f"{status.state}, {word}"
    parts: list[Content | str | tuple[str, str]] = [(f"{sign} ", style), (word, f"bold {style}")]
    if count := count_warnings(snapshot):
        parts.append((f"  ! {count} warning{'s' if count > 1 else ''}", "$warning"))
    if view.attempt > 1:
        parts += ["  ", fact("attempt", str(view.attempt))]
    if status.state in ACTIVE and (ending := _ENDINGS.get(snapshot.ending_request)):
        when = ending[1] if view.phase == "training" else ""
        parts.append((f"  {ending[0]}{when}", "bold $warning"))
        if snapshot.is_stopping and snapshot.ending_request == "stop":
            parts.append(highlight_keys(f"  {key_name('train.stop')} now", "dim"))
    if status.state in ACTIVE and status.hold is not None:
        parts.append((f"  {held_words(status)}", "$warning"))
    elif status.hold is None and status.state in ("queued", *ACTIVE) and status.detail:
        # If there is a note, such as ``suspended`` or ``not responding``, show it instead of the phase's
        # detail.
        parts.append((f"  {status.detail}", "$warning"))
    elif status.state == "running" and view.phase_detail and not snapshot.ending_request:
        parts.append((f"  {truncate_middle(view.phase_detail, _MAX_DETAIL)}", "dim"))
    return Content.assemble(*parts)


def progress_share(snapshot: RunSnapshot) -> float | None:
    """Return the fraction of steps done, from 0 to 1. Return None if the run is queued or finished, and
    before the first step, because the stages then show their own progress.
    """
    if snapshot.status.state in ("finished", "queued") or not snapshot.step:
        return None
    view = snapshot.view
    return snapshot.step / view.total_steps if view.total_steps else None


def progress_facts(snapshot: RunSnapshot) -> list[str]:
    """Return texts to show after the progress bar, such as the step."""
    view, state = snapshot.view, snapshot.status.state
    facts = []
    if state in ACTIVE and view.progress is not None and view.phase != "training" and snapshot.step:
        facts.append(format_progress(view.progress.done, view.progress.total))
    if view.total_steps and (state != "queued" or (snapshot.status.hold and snapshot.step)):
        if state in ACTIVE and snapshot.step:
            facts.append(format_percent(snapshot.step / view.total_steps))
        facts.append(f"step {format_progress(snapshot.step, view.total_steps)}")
    return facts


def facts(snapshot: RunSnapshot, now: float) -> list[Content]:
    """Return further facts, most important first. The header drops what does not fit. ``now``: Unix time."""
    state = snapshot.status.state
    if state == "queued" and snapshot.status.hold is None:
        return [Content("waiting in the queue")]
    if state == "queued":
        done_at = done_at_words(snapshot.seconds_left)
        return [Content("continues by itself"), *([fact("done", done_at)] if done_at else [])]
    if state in ACTIVE:
        return _active_facts(snapshot, now)
    return _ended_facts(snapshot, now)


def _active_facts(snapshot: RunSnapshot, now: float) -> list[Content]:
    view = snapshot.view
    facts = [fact("this step", within)] if (within := step_progress(snapshot)) else []
    if snapshot.step and view.data is not None and view.data.steps_per_epoch:
        all_epochs = view.total_steps / view.data.steps_per_epoch
        facts.append(fact("epoch", f"{_epochs(snapshot.epoch)} of {_epochs(all_epochs)}"))
    if view.started_at is not None:
        facts += _times_so_far(snapshot, max(0.0, now - view.started_at))
    if snapshot.fix is not None:
        facts.append(highlight_keys(fix_text(snapshot)))
    if view.checkpoints:
        facts.append(_checkpoints(snapshot))
    if following := next_evaluation(snapshot.recipe, view.data, snapshot.step, last_evaluation(view)):
        facts.append(fact("next evaluation at", f"{following:,}"))
    if snapshot.energy_kwh is not None:
        facts.append(Content(energy_words(snapshot.energy_kwh)))
    return facts or [Content("starting")]


def _checkpoints(snapshot: RunSnapshot) -> Content:
    """Return the steps of the best checkpoint, if it is saved, and of the newest one, such as
    ``checkpoints 60 ★, 70``. There must be at least one checkpoint.
    """
    newest = snapshot.view.checkpoints[-1].step
    if snapshot.best is None or not snapshot.is_best_saved:
        return fact("checkpoint", f"{newest:,}")
    best = f"{snapshot.best.step:,} {BEST}"
    if snapshot.best.step == newest:
        return fact("checkpoint", best)
    return fact("checkpoints", f"{best}, {newest:,}")


def _times_so_far(snapshot: RunSnapshot, since_start: float) -> list[Content]:
    """Return the time since the start and, after the first step, the total time of the steps, such as
    ``running 21 min`` and ``13 min in steps``. If the two times cannot be compared, return only the time of
    the steps. ``since_start``: seconds since the start of the last attempt.
    """
    trained, running = snapshot.seconds_trained, fact("running", format_duration(since_start))
    if not trained:
        return [running]
    in_steps = fact("", format_duration(trained), "in steps")
    # The time in steps includes earlier attempts, while ``since_start`` counts from the start of the last
    # attempt. Also, the system clock may have been changed.
    is_comparable = snapshot.view.attempt == 1 and trained <= since_start
    return [running, in_steps] if is_comparable else [in_steps]


def step_progress(snapshot: RunSnapshot) -> str:
    """Return the progress within a long step, in micro-batches: ``▄▄▄▁▁▁▁▁ 3 of 8``. The text is empty in
    short steps, in steps with one micro-batch, and in any phase except training.
    """
    status = snapshot.status
    if snapshot.view.phase != "training" or status.micro_batches < 2:
        return ""
    if snapshot.seconds_per_step is not None and snapshot.seconds_per_step < _LONG_STEP_S:
        return ""
    done = bar(status.micro_batch / status.micro_batches, _STEP_BAR)
    return f"{done} {format_progress(status.micro_batch, status.micro_batches)}"


def _epochs(count: float) -> str:
    return format_float(count, 3 if count >= 1 else 2)


def _ended_facts(snapshot: RunSnapshot, now: float) -> list[Content]:
    view, status, best = snapshot.view, snapshot.status, snapshot.best
    facts = []
    if best is not None:
        facts.append(fact("at step", f"{best.step:,}"))
        if status.state in BROKEN:
            facts.insert(0, fact(f"{best_word(view.loss_to_beat)} validation loss", format_loss(best.loss)))
        facts += _last_loss(snapshot)
    elif snapshot.loss is not None:
        facts.append(fact("last loss", f"{format_loss(snapshot.loss)}, not validated"))
    if status.at:
        ended = fact("paused" if status.state == "paused" else "ended", format_ago(status.at, now))
        # The time of a failure comes before what the run reached.
        facts = [ended, *facts] if status.state in BROKEN else [*facts, ended]
    if best is not None and snapshot.verdict is None and view.loss_before_training is not None:
        # The verdict also gives the loss before training.
        facts.append(fact("", format_loss(view.loss_before_training), "before training"))
    if isinstance(view.ending, Finished):
        facts.append(fact("trained", format_duration(view.ending.seconds)))
        if view.ending.tokens_per_s:
            facts.append(fact("mean", f"{format_speed(view.ending.tokens_per_s)} tok/s"))
        if energy := format_energy(view.ending):
            facts.append(Content(energy))
    if view.run.adapter_dir.is_dir():
        facts.append(fact("adapter", format_path(view.run.adapter_dir)))
    return facts


def _last_loss(snapshot: RunSnapshot) -> list[Content]:
    """Return the last validation loss and its rise from the best one, such as ``last 2.915 (+0.4%)``, if the
    verdict is based only on mean losses and the last evaluation is not the best one; otherwise, return an
    empty list.
    """
    last, best = snapshot.view.trained_evaluation, snapshot.best
    if snapshot.verdict is None or not snapshot.verdict.lacks_rows or last is None or last == best:
        return []
    text = format_loss(last.loss)
    if last.loss is not None and best is not None and best.loss and text != format_loss(best.loss):
        rise = last.loss / best.loss - 1
        text += f" (+{format_small_percent(rise)})" if rise > 0 else ""
    return [fact("last", text)]


def finding_line(snapshot: RunSnapshot, width: int, height: int) -> list[Content]:
    """Return a line for windows without a panel of warnings: the warning that has a fix, and the key for the
    fix. If the warning is too long, it is shortened to its first sentence, then to the part of this sentence
    before a parenthesis. If not even this part fits, the warning is cut. If the verdict contains the warning,
    only the fix is shown. Return no line if there is no warning with a fix.
    """
    fix = snapshot.fix
    if fix is None or not fix.evidence:
        return []
    if fix.kind == "forgetting" and snapshot.verdict is not None:
        return [highlight_keys(f"▸ {fix_text(snapshot)}").truncate(width, ellipsis=True)]
    key = highlight_keys(f" ▸ {key_name('train.fix')} {fix.short_label}")
    room = max(0, width - key.cell_length)
    headline = fix.evidence.partition(". ")[0].removesuffix(".")
    options = [fix.evidence, f"{headline}.", f"{headline.partition(' (')[0]}."]
    text = next((option for option in options if len(option) + 2 <= room), fix.evidence)
    return [Content.styled(f"! {text}", "$warning").truncate(room, ellipsis=True) + key]


def health_lines(snapshot: RunSnapshot) -> list[Content]:
    """Return lines about problems: the run's failure, the latest warning of each kind (newest first), the
    key for a fix, and :func:`other_warnings`. The failure and the key are left out if the outcome
    already has them. Return no lines if there are no problems.
    """
    latest = {health.kind: health for health in snapshot.health}
    lines = []
    if isinstance(snapshot.view.ending, Failed) and snapshot.status.state != "failed":
        lines.append(Content.styled(f"✗ {snapshot.view.ending.title}.", "$error"))
    for health in sorted(latest.values(), key=lambda health: health.step, reverse=True):
        sign, style = ("✗", "$error") if health.severity == "error" else ("!", "$warning")
        # The first sentence is the warning; the measurements after it may be below a limit.
        headline, dot, details = health.evidence.partition(". ")
        evidence = Content.assemble((f"{sign} {headline}{dot}", style), (details, "$text-muted"))
        lines.append(evidence + f" ▸ {health.remedy}")
    if snapshot.fix is not None and not outcome_has_fix(snapshot):
        lines.append(highlight_keys(f"▸ {fix_text(snapshot)}"))
    lines += [Content.styled(f"! {text}", "$warning") for _, text in other_warnings(snapshot)]
    return lines


def other_warnings(snapshot: RunSnapshot) -> list[tuple[float, str]]:
    """Return (Unix time, text) for each warning that is not a finding of the trainer: a peak of memory far
    above its estimate, and other programs that slow down a run on the CPU.
    """
    memory, warnings = snapshot.view.memory, []
    if memory is not None and exceeds_estimate(memory):
        warnings.append((memory.at, f"{capitalize(describe(memory))}."))
    if others := _contention(snapshot):
        warnings.append((snapshot.telemetry[-1].at, others))
    return warnings


def count_warnings(snapshot: RunSnapshot) -> int:
    """Return the number of warnings about a run. Warnings of one kind count once."""
    kinds = {health.kind for health in snapshot.health if health.severity == "warning"}
    return len(kinds) + len(other_warnings(snapshot))


def _contention(snapshot: RunSnapshot) -> str:
    """Return a warning that other programs slow down a run on the CPU; empty if they do not."""
    last = snapshot.telemetry[-1] if snapshot.telemetry else None
    if last is None or last.gpu is not None or snapshot.status.state not in ACTIVE:
        return ""
    everything = 100.0 * (os.cpu_count() or 1)
    own, all_programs = last.cpu_percent / everything, (last.machine_cpu_percent or 0.0) / everything
    if all_programs - own < _MUCH_OF_CPU:
        return ""
    others = format_percent(all_programs - own)
    return f"Other programs use {others} of the CPU, and this run gets {format_percent(own)}."


def sample_lines(snapshot: RunSnapshot, width: int, height: int) -> list[Content]:
    """Return the last answers to the sample prompts.

    If a prompt was also answered at an earlier step, the beginning of its first answer comes next. If
    ``height`` is less than :data:`_LEAST_FOR_ANSWERS`, return only the first prompt and the beginning of its
    last answer.
    """
    step = _sample_step(snapshot)
    if height < _LEAST_FOR_ANSWERS:
        return [
            Content.styled(text, style).truncate(width, ellipsis=True)
            for sample in [sample for sample in snapshot.samples if sample.step == step][:1]
            for text, style in ((f"❯ {sample.prompt}", "bold"), (f"  {' '.join(sample.answer.split())}", ""))
        ]
    first = {sample.prompt: sample for sample in reversed(snapshot.samples)}
    answers = []
    for sample in snapshot.samples:
        if sample.step == step:
            lines = [Content.styled(f"❯ {sample.prompt}", "bold")]
            lines += [Content(f"  {line}") for line in sample.answer.splitlines()]
            answers.append((wrapped(lines, width, height), first[sample.prompt]))
    rows_left = height - sum(len(lines) for lines, _ in answers)
    rows = max(_ROWS_OF_FIRST, rows_left // max(1, len(answers)))
    all_lines = []
    for lines, before in answers:
        all_lines += lines
        if before.step != step:
            answer = " ".join(before.answer.split())
            all_lines += _start(f"at step {before.step:,}: {answer}", width - 2 * _INDENT, rows)
    return wrapped(all_lines, width, height)


def _start(text: str, width: int, rows: int) -> list[Content]:
    """Return the first ``rows`` lines of a text, wrapped to ``width`` cells, indented and dim."""
    lines = Content(text).wrap(max(1, width))
    if len(lines) > rows:
        lines = [*lines[: rows - 1], Content(f"{lines[rows - 1].plain[: width - 1].rstrip()}…")]
    return [(Content(" " * _INDENT) + line).stylize("dim") for line in lines]


def samples_title(snapshot: RunSnapshot) -> str:
    """Return the title of the answers panel, with the step of the last answers."""
    step = _sample_step(snapshot)
    return "Answers" if step is None else f"Answers at step {step:,}"


def _sample_step(snapshot: RunSnapshot) -> int | None:
    return snapshot.samples[-1].step if snapshot.samples else None


def setup_lines(snapshot: RunSnapshot, width: int, height: int) -> list[Content]:
    """Return labeled facts about the run, as many as fit: model, data, settings, how steps are computed."""
    view, recipe, lines = snapshot.view, snapshot.recipe, []
    if recipe is not None:
        lines += [_row(*fact) for fact in recipe_facts(recipe, width - _LABEL, _batch(view, recipe))]
    if view.adapter is not None:
        share = view.adapter.trained_parameters / view.adapter.total_parameters
        lines.append(
            _row(
                "trains",
                f"{format_count(view.adapter.trained_parameters)} weights, {format_small_percent(share)}",
            )
        )
    if view.data is not None:
        lines.append(_row("samples", f"{view.data.samples:,}, {view.data.validation_samples:,} to validate"))
    if view.environment is not None:
        environment = view.environment
        lines += [
            _row("compute", environment.compute_dtype),
            _row("optim", environment.optimizer),
            _row("loss", environment.loss),
        ]
    return lines[:height]


def _batch(view: RunView, recipe: Recipe) -> str:
    """Return the length and batch of the current attempt, such as ``1,024 tok · batch 2 × 4, chosen``.
    ``chosen`` means that the trainer chose a micro-batch size other than the recipe's.
    """
    words = batch_words(view.plan.apply_to(recipe))
    chosen = view.step_chosen
    return (
        f"{words}, chosen"
        if chosen and chosen.micro_batch_size != recipe.training.micro_batch_size
        else words
    )


def evaluation_lines(snapshot: RunSnapshot, width: int, height: int) -> list[Content]:
    """Return the lines of :func:`validation_lines` for the run's evaluations. Each line also has the
    percentage of correct comparisons or of exact answers, if measured.
    """

    def share(event: Evaluated) -> str:
        if event.reward_accuracy is not None:
            return f"{format_percent(event.reward_accuracy):>5} right"
        return "" if event.accuracy is None else f"{format_percent(event.accuracy):>5} exact"

    rows = [(e.step, math.nan if e.loss is None else e.loss, share(e)) for e in snapshot.evaluations]
    return validation_lines(rows, None if snapshot.best is None else snapshot.best.step, width, height)
