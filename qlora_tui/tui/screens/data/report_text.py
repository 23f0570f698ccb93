"""What the Data screen says about a whole source: its totals, lengths and problems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from textual.content import Content

from qlora_tui.data.dataset_report import Report
from qlora_tui.data.problems import OVERFLOW_OUTCOMES, DataProblem, is_bad_row, row_outcome
from qlora_tui.data.step_estimate import steps_per_epoch, total_steps
from qlora_tui.formatting import format_percent, pluralize
from qlora_tui.recipe.schema import Data, Recipe
from qlora_tui.runs.suggested_fix import FEW_STEPS
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.render.charts import bar, labeled
from qlora_tui.tui.screens.data.text import SIGNS

_ROWS_NAMED = 3
_LABEL = 9
"""Cells of the column of labels."""
_MIN_BAR, _MAX_BAR = 6, 24


def totals(
    report: Report, recipe: Recipe, width: int, time: str = "", *, brief: bool = False, evidence: bool = True
) -> Content:
    """The detected format and the resulting samples and tokens.

    ``evidence``: what the format was recognized by. ``brief`` leaves out all sentences on reasoning but the
    first.
    """
    counts, data = report.counts, recipe.data
    lines: list[Content] = []
    for file in report.files[:1]:
        more = f", {len(report.files)} files" if len(report.files) > 1 else ""
        # A column that is called like the format says nothing more.
        columns = ", ".join(name for name in file.columns.values() if name != file.format)
        why = "; ".join(file.evidence) if evidence else columns
        text = Content.assemble((file.format, "bold"), (f"{': ' if why else ''}{why}{more}", "dim"))
        lines += _labeled("format", text, width)
    reading = "" if report.complete else f"  ({format_percent(report.share)} read)"
    excluded = f", {counts.excluded:,} excluded" if counts.excluded else ""
    if not report.template:
        conversations = pluralize(counts.conversations, "conversation")
        lines += _labeled("rows", Content(f"{counts.rows:,}, {conversations}{excluded}{reading}"), width)
        return Content("\n").join([*lines, *map(Content, report.thinking)])
    unused = counts.rows - counts.conversations
    samples = Content.assemble(
        f"{counts.samples:,} {'pairs ' if recipe.trains_pairs else ''}from {pluralize(counts.rows, 'row')}",
        (f", {unused:,} left out" if unused > 0 else "", "$warning"),
        excluded,
        (reading, "bold"),
    )
    lines += _labeled("samples", samples, width)
    lines += _labeled("tokens", Content(f"{counts.tokens:,}"), width)
    lines += _labeled("to learn", _to_learn(counts.trained_tokens, counts.tokens, width), width)
    if report.complete:
        lines += _labeled("steps", Content(steps_line(report, recipe) + time), width)
    lines += map(Content, report.thinking[:1] if brief else report.thinking)
    lines.append(Content.styled(_rules(data, {file.format for file in report.files}), "dim"))
    return Content("\n").join(lines)


def _labeled(label: str, text: Content, width: int) -> list[Content]:
    """A label and its text, whose further lines are below the first."""
    first, *others = text.wrap(max(10, width - _LABEL)) or [Content("")]
    return [
        labeled(label, first, _LABEL),
        *(Content(" " * _LABEL) + other for other in others),
    ]


def _to_learn(trained: int, tokens: int, width: int) -> Content:
    share = trained / tokens if tokens else 0.0
    text = f"{trained:,} ({format_percent(share)})" if tokens else "none"
    cells = min(_MAX_BAR, width - _LABEL - len(text) - 1)
    return Content.assemble((f"{bar(share, cells)} " if cells >= _MIN_BAR else "", "$secondary"), text)


def _rules(data: Data, formats: set[str]) -> str:
    packing = "packed" if data.packing else "not packed"
    scope = "answers only" if data.train_on == "assistant" and formats != {"text"} else "all tokens"
    if data.validation_path:
        held = f"validates on {Path(data.validation_path).name}"
    elif data.validation_fraction:
        held = f"{format_percent(data.validation_fraction)} validation"
    else:
        held = "no validation"
    return f"{scope} · {packing} · {held}"


def lengths_line(report: Report, data: Data, width: int) -> Content:
    """The lines above the histogram: percentiles, and samples that are too long."""
    lengths = report.lengths
    points = f"median {lengths.p50:,}  90% ≤{lengths.p90:,}  99% ≤{lengths.p99:,}"
    most = f"  all ≤{lengths.longest:,}"
    unit = "tokens" if lengths.unit == "tokens" else "chars"
    # The longest is also at the end of the axis.
    line = next(
        (words for words in (f"{unit}: {points}{most}", f"{unit} {points}") if len(words) <= width), points
    )
    if not report.too_long:
        return Content(line)
    share = format_percent(report.too_long / report.counts.rows)
    dropped = report.counts.dropped if data.overflow.startswith("cut") else 0
    outcomes = [f"{report.counts.cut:,} {OVERFLOW_OUTCOMES[data.overflow]}", f"{dropped:,} left out"]
    how = " · ".join(outcomes[not report.counts.cut :]) if dropped else OVERFLOW_OUTCOMES[data.overflow]
    over = f"✂ {report.too_long:,} ({share}) over {data.max_length:,}: {how}"
    return Content.assemble(line, "\n", (over, "$warning"))


def problem_line(
    problem: DataProblem, data: Data, *, brief: bool = False, several: bool = False, bad_rows: int = 0
) -> Content:
    """One kind of problem in the list with what becomes of its rows, and its fix unless ``brief``.

    ``several``: the source has several files, so the problem's file is named. ``bad_rows``: how many rows the
    fix leaves out, of all problems; 0 where another line says so.
    """
    sign, style = SIGNS[problem.severity]
    rows = ", ".join(f"{row:,}" for row in problem.rows[:_ROWS_NAMED])
    more = "…" if problem.count > _ROWS_NAMED else ""
    where = f"  row {rows}{more}" if rows and not brief else ""
    if several and problem.path:
        where = f"  {Path(problem.path).name}{where}"
    return Content.assemble(
        (f"{sign} {problem.title}", style),
        (f": {pluralize(problem.count, 'row')}", "bold"),
        row_outcome(problem, data),
        (where, "dim"),
        (f"\n  ▸ {key_name('data.fix')} {fix}" if (fix := _fix_label(problem, bad_rows)) else "", "$accent"),
        ("" if brief or not problem.fix else f"\n  ▸ {problem.fix}", "dim"),
    )


def _fix_label(problem: DataProblem, bad_rows: int) -> str:
    """What the key for fixes does about the problem; empty if nothing."""
    if is_bad_row(problem):
        return f"leave {pluralize(bad_rows, 'bad row')} out" if bad_rows else ""
    if problem.split_rows:
        return f"split into {'about ' if problem.is_estimate else ''}{pluralize(problem.split_rows, 'row')}"
    return f"train {', '.join(problem.tokens)}" if problem.tokens else ""


def problem_lines(
    report: Report, problems: Sequence[DataProblem], data: Data, *, brief: bool, bad_rows: int
) -> list[tuple[str, Content]]:
    """(id, line) of each problem; of those with bad rows only the first says that one key leaves all out."""
    lines = []
    for problem in problems:
        skipped, bad_rows = (bad_rows, 0) if is_bad_row(problem) else (0, bad_rows)
        several = len(report.files) > 1
        line = problem_line(problem, data, brief=brief, several=several, bad_rows=skipped)
        lines.append((f"{problem.kind} {problem.path}", line))
    return lines


def no_problem_line(report: Report) -> Content:
    """The line shown if there are no problems."""
    if report.complete:
        return Content.styled("✓ No problems found", "$success")
    return Content.styled("No problems so far", "dim")


def few_steps_line(report: Report, recipe: Recipe, *, brief: bool) -> Content | None:
    """The warning that the whole run has too few steps, as before a launch; None where it has enough.

    ``brief``: without what to do.
    """
    if not report.complete or not report.counts.samples:
        return None
    if len(recipe.data.sources) > 1:  # the report is on one of them, and the run has steps of all
        return None
    a_pass, steps = _steps(report, recipe)
    if steps >= FEW_STEPS:
        return None
    # In one line of 37 cells: in a small window it is beside a scrollbar.
    warning = Content.styled(f"! Only {pluralize(steps, 'step')}: too few to learn much", "$warning")
    if brief:
        return warning
    training = recipe.training
    accumulation, micro_batch = training.gradient_accumulation, training.micro_batch_size
    lower = f"accumulation (now {accumulation})" if accumulation > 1 else f"micro-batch (now {micro_batch})"
    less = f", or lower {lower}" if recipe.effective_batch > 1 else ""
    # Where Max steps ends the run, neither more epochs nor smaller steps make it longer.
    is_limited = steps < total_steps(a_pass, recipe)
    change = "raise Max steps" if is_limited else f"raise Epochs{less}"
    return warning + Content.styled(f"\n  ▸ On {key_name('go.train')} Train, {change}.", "dim")


def steps_line(report: Report, recipe: Recipe) -> str:
    """How many optimizer steps the data makes, roughly: packing is only known once it is done."""
    if not report.counts.samples:
        return "Nothing to train on"
    a_pass, steps = _steps(report, recipe)
    return f"about {a_pass:,} an epoch, {steps:,} in all"


def _steps(report: Report, recipe: Recipe) -> tuple[int, int]:
    """Optimizer steps of an epoch, and of the whole run."""
    sources = recipe.data.sources
    weight = sources[0].weight if len(sources) == 1 else 1.0
    a_pass = steps_per_epoch(report.counts.samples * weight, report.counts.tokens * weight, recipe)
    steps = total_steps(a_pass, recipe)
    return a_pass, min(steps, recipe.training.max_steps or steps)
