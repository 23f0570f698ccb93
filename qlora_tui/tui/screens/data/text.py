"""Styled text of the Data screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from textual.content import Content

from qlora_tui.data.dataset_report import Piece, Report, Shown
from qlora_tui.data.preferences import PAIRS_TITLE, TITLES
from qlora_tui.data.problems import CHECKS, DataProblem
from qlora_tui.data.sources import is_hub_dataset
from qlora_tui.data.step_estimate import steps_per_epoch, total_steps
from qlora_tui.errors import UserError
from qlora_tui.formatting import abbreviate_home, format_bytes, format_percent, pluralize
from qlora_tui.recipe.schema import Data, Recipe, Source
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.screens.data.row_navigation import Place

EMPTY = (
    "No data yet.\n\nPress {data.open} to open a file (JSON, JSONL, CSV, TSV, Parquet or text, also "
    "compressed with gzip or zstd), a folder of such files, or a dataset from the Hub.\n\n"
    "The format is detected: conversations (messages, ShareGPT), instructions (Alpaca), prompt and "
    "completion, question and answer, text and label, plain text.\n\n"
    "Every row is then shown here exactly as the model will see it.\n\n"
    "To try it without a file of your own, press {go.home} for Home and then {home.demo} for the demo's "
    "conversations."
)
PLAIN = Content.styled("The row as it is in the file:\n\n", "dim")
NO_MODEL = "Select a model with {go.models} to see tokens, the chat template and what is in the loss.\n\n"
TOO_LONG = {
    "drop": "left out",
    "cut-left": "cut left",
    "cut-right": "cut right",
    "split": "split",
}
_SIGNS = {"error": ("✗", "$error"), "warning": ("⚠", "$warning")}
_ROWS_NAMED = 3


def sample(shown: Shown, problems: Sequence[DataProblem], data: Data) -> Content:
    """The row as the model will see it, below its problems."""
    parts: list[Content | str | tuple[str, str]] = []
    for kind, example in _row_problems(shown, problems):
        check = CHECKS.get(kind)
        sign, style = _SIGNS[check.severity if check else "warning"]
        parts.append((f"{sign} {check.title if check else kind}", f"{style} bold"))
        parts.append((f"  {example}" if example else "", "dim"))
        parts.append((f"\n  ▸ {check.fix}\n" if check and check.fix else "\n", "$accent"))
    if parts:
        parts.append("\n")
    if shown.refused:
        return Content.assemble(*parts, ("This row cannot be used.\n\n", "bold"), shown.refused)
    if not shown.token_counts:
        parts.insert(0, PLAIN)
    cut = any(count > data.max_length for count in shown.token_counts)
    if cut and data.overflow == "cut-left":
        parts.append(_cut_mark(shown, data))
    for number, pieces in enumerate(shown.samples):
        if number:
            parts.append(("\n──── next sample of this row ────\n", "dim"))
        parts += [_styled(piece) for piece in pieces]
    if cut and data.overflow == "cut-right":
        parts.append(_cut_mark(shown, data))
    return Content.assemble(*parts)


def _row_problems(shown: Shown, problems: Sequence[DataProblem]) -> list[tuple[str, str]]:
    """(kind, example) of each problem of this row."""
    seen = {kind for kind, _ in shown.findings}
    here = (p for p in problems if p.path in ("", shown.path))
    others = [(p.kind, "") for p in here if shown.row in p.rows and p.kind not in seen]
    return [*shown.findings, *others]


def _styled(piece: Piece) -> tuple[str, str]:
    text = piece.text
    if piece.special:
        return text, "reverse bold underline" if piece.in_loss else "reverse"
    if not piece.in_loss:
        return text, "dim"
    # Line breaks in the loss are invisible; only those at the edges are marked, to keep the text readable.
    inner = text.strip("\n")
    if not inner:
        return "↵\n" * len(text), "bold underline"
    before = len(text) - len(text.lstrip("\n"))
    after = len(text) - len(text.rstrip("\n"))
    return "↵\n" * before + inner + "↵\n" * after, "bold underline"


def _cut_mark(shown: Shown, data: Data) -> tuple[str, str]:
    lost = sum(max(0, count - data.max_length) for count in shown.token_counts)
    mark = f"✂ {lost:,} more tokens do not fit in {data.max_length:,}"
    return (f"{mark}\n" if data.overflow == "cut-left" else f"\n{mark}"), "$warning"


def reading(source: Source) -> Content:
    """The text shown until the first row arrives."""
    doing = "Loading from the Hub…" if is_hub_dataset(source.path) else "Reading…"
    return Content.styled(doing, "dim")


def error_text(error: UserError) -> Content:
    """The error shown in place of the sample."""
    parts: list[tuple[str, str]] = [
        (f"✗ {error.title}\n\n", "$error bold"),
        (abbreviate_home(error.what), ""),
    ]
    if error.why:
        parts.append((f"\n{abbreviate_home(error.why)}", "dim"))
    if error.fix:
        parts.append((f"\n\n▸ {abbreviate_home(error.fix)}", "$accent"))
    return Content.assemble(*parts)


def unreadable_text(error: UserError, fields: dict[str, str]) -> Content:
    """The error for a file that cannot be read, with its columns and the keys that may help."""
    keys = [
        (key_name("data.reload"), "read it again"),
        (key_name("data.open"), "open another file"),
        (key_name("data.remove"), "remove this one"),
    ]
    if fields and error.fix.startswith(("Say which column", "Map the columns")):
        # The fix is for the recipe as a file; here there is a key for it.
        error = UserError(
            error.title,
            what=error.what,
            why=error.why,
            fix=f"Press {key_name('data.columns')} to map the columns.",
        )
    if error.title in TITLES:
        side = "chosen" if error.title == PAIRS_TITLE else "good"
        fix = f"Press {key_name('data.fix')} to train on the {side} answers only."
        error = UserError(error.title, what=error.what, why=error.why, fix=fix)
        keys = [(key_name("data.fix"), f"train on the {side} answers only"), *keys]
    parts: list[Content | tuple[str, str]] = [error_text(error)]
    if fields and error.title not in TITLES:
        parts.append(("\n\nIts rows contain:", ""))
        parts += [
            part for name, held in fields.items() for part in ((f"\n  {name}  ", "bold"), (held, "dim"))
        ]
        keys = [
            (key_name("data.columns"), "map the columns"),
            (key_name("data.format"), "read it in another format"),
            *keys,
        ]
    parts.append(("\n\n", ""))
    parts += [part for key, does in keys for part in ((key, "$accent bold"), (f" {does}   ", "dim"))]
    return Content.assemble(*parts)


def source_line(source: Source, alone: bool) -> Content:
    """A source in the list; its weight where there are others."""
    path = Path(source.path)
    weight = "" if alone and source.weight == 1 else f" ×{source.weight:g}"
    if is_hub_dataset(source.path):
        return Content.assemble(source.path, ("  hub", "dim"), (weight, "bold"))
    try:
        bytes_ = "folder" if path.is_dir() else format_bytes(path.stat().st_size)
    except OSError:
        bytes_ = "missing"
    return Content.assemble(path.name, (f"  {bytes_}", "dim"), (weight, "bold"))


def row_line(place: Place, report: Report | None, shown: Shown | None, data: Data, width: int) -> Content:
    """The row number, its tokens in the loss, and a legend of the styles, as far as they fit."""
    path, row = place
    of = name = ""
    if report and len(report.files) > 1:
        file = next((file for file in report.files if file.path == path), report.files[0])
        name = f"{Path(file.path).name} "
        of = f" of {file.last_row:,}" if file.last_row else ""
    elif report and report.complete:
        # In a file with blank lines rows are called by their lines, of which there are more.
        of = f" of {max(report.counts.rows, report.files[0].last_row):,}"
    elif report:
        # A jump may go beyond what has been read so far.
        of = f" of {max(row, report.counts.rows):,} or more"
    parts = [f"{name}row {row:,}{of}"]
    if shown and shown.samples and shown.token_counts:
        most = max(shown.token_counts) if data.overflow == "split" else data.max_length
        rendered_tokens = sum(min(count, most) for count in shown.token_counts)
        parts.append(f"{sum(shown.trained_counts):,} of {rendered_tokens:,} tokens in loss")
    if shown:
        parts += shown.notes
    words = _join_to_width(parts, width)
    legend = Content.assemble(
        ("in loss", "bold underline"),
        " ",
        ("read", "dim"),
        " ",
        (" control ", "reverse"),
    )
    for each in (Content.assemble(legend, ("  ← → rows", "dim")), legend):
        width_left = width - len(words) - each.cell_length
        if width_left >= 2:
            return Content.assemble(words, " " * width_left, each)
    return Content(words)


def _join_to_width(parts: Sequence[str], width: int) -> str:
    """Join as many parts as fit on one line, with an ellipsis if there are more."""
    for count in range(len(parts), 1, -1):
        words = " · ".join(parts[:count]) + (" …" if count < len(parts) else "")
        if len(words) <= width:
            return words
    return parts[0]


def totals(report: Report, recipe: Recipe, time: str = "", *, brief: bool = False) -> Content:
    """The detected format and the resulting samples and tokens; ``brief`` leaves out the evidence."""
    counts, data = report.counts, recipe.data
    parts: list[Content] = []
    for file in report.files[:1]:
        more = f", {len(report.files)} files" if len(report.files) > 1 else ""
        # A column that is called like the format says nothing more.
        columns = ", ".join(name for name in file.columns.values() if name != file.format)
        evidence = columns if brief else "; ".join(file.evidence)
        between = ": " if evidence else " format"
        parts.append(Content.assemble((file.format, "bold"), (f"{between}{evidence}{more}", "dim")))
    reading = "" if report.complete else f"  ({format_percent(report.share)} read)"
    if not report.template:
        parts.append(
            Content(
                f"{pluralize(counts.rows, 'row')}, {pluralize(counts.conversations, 'conversation')}{reading}"
            )
        )
        return Content("\n").join([*parts, *map(Content, report.thinking)])
    parts.append(
        Content.assemble(
            f"{pluralize(counts.rows, 'row')} → {pluralize(counts.samples, 'sample')}",
            f" ({unused:,} left out)" if (unused := counts.rows - counts.conversations) > 0 else "",
            (reading, "bold"),
        )
    )
    share_in_loss = format_percent(counts.trained_tokens / counts.tokens) if counts.tokens else "none"
    parts.append(Content(f"{counts.tokens:,} tokens, {counts.trained_tokens:,} in loss ({share_in_loss})"))
    if report.complete:
        parts.append(Content(steps_line(report, recipe) + time))
    parts += map(Content, report.thinking[:1] if brief else report.thinking)
    parts.append(Content.styled(_rules(data, {file.format for file in report.files}), "dim"))
    return Content("\n").join(parts)


def _rules(data: Data, formats: set[str]) -> str:
    packing = "packed" if data.packing else "not packed"
    scope = "answers only" if data.train_on == "assistant" and formats != {"text"} else "everything in loss"
    if data.validation_path:
        held = f"validates on {Path(data.validation_path).name}"
    elif data.validation_fraction:
        held = f"{format_percent(data.validation_fraction)} for validation"
    else:
        held = "no validation"
    return f"{scope} · {packing} · {held}"


def lengths_line(report: Report, data: Data, width: int) -> Content:
    """The lines above the histogram: percentiles, and samples that are too long."""
    lengths = report.lengths
    points = f"p50 {lengths.p50:,}  p90 {lengths.p90:,}  p99 {lengths.p99:,}"
    most = f"  most {lengths.longest:,}"
    unit = "tokens" if lengths.unit == "tokens" else "chars"
    # The longest is also at the end of the axis.
    line = next(
        (words for words in (f"{unit}: {points}{most}", f"{unit} {points}") if len(words) <= width), points
    )
    if not report.too_long:
        return Content(line)
    share = format_percent(report.too_long / lengths.count) if lengths.count else ""
    dropped = report.counts.dropped if data.overflow.startswith("cut") else 0
    outcomes = [f"{report.counts.cut:,} {TOO_LONG[data.overflow]}", f"{dropped:,} left out"]
    how = " · ".join(outcomes[not report.counts.cut :]) if dropped else TOO_LONG[data.overflow]
    over = f"✂ {report.too_long:,} ({share}) over {data.max_length:,}: {how}"
    return Content.assemble(line, "\n", (over, "$warning"))


def problem_line(problem: DataProblem, *, brief: bool = False, several: bool = False) -> Content:
    """One kind of problem in the list, with its fix unless ``brief``.

    ``several``: the source has several files, so the problem's file is named.
    """
    sign, style = _SIGNS[problem.severity]
    rows = ", ".join(f"{row:,}" for row in problem.rows[:_ROWS_NAMED])
    more = "…" if problem.count > _ROWS_NAMED else ""
    where = f"  row {rows}{more}" if rows and not brief else ""
    if several and problem.path:
        where = f"  {Path(problem.path).name}{where}"
    return Content.assemble(
        (f"{sign} {problem.title}", style),
        (f" ×{problem.count:,}" if brief else f": {pluralize(problem.count, 'row')}", "bold"),
        (where, "dim"),
        (f"\n  ▸ {key_name('data.fix')} {fix}" if (fix := _fix_label(problem)) else "", "$accent"),
        ("" if brief or not problem.fix else f"\n  ▸ {problem.fix}", "dim"),
    )


def _fix_label(problem: DataProblem) -> str:
    """What the key for fixes does about the problem; empty if nothing."""
    if problem.split_rows:
        return f"split into {'about ' if problem.is_estimate else ''}{pluralize(problem.split_rows, 'row')}"
    return f"train {', '.join(problem.tokens)}" if problem.tokens else ""


def no_problem_line(report: Report) -> Content:
    """The line shown if there are no problems."""
    if report.complete:
        return Content.styled("✓ No problems found", "$success")
    return Content.styled("No problems so far", "dim")


def steps_line(report: Report, recipe: Recipe) -> str:
    """How many optimizer steps the data makes, roughly: packing is only known once it is done."""
    if not report.counts.samples:
        return "Nothing to train on"
    a_pass = steps_per_epoch(report.counts.samples, report.counts.tokens, recipe)
    steps = total_steps(a_pass, recipe)
    if recipe.training.max_steps:
        steps = min(steps, recipe.training.max_steps)
    return f"about {pluralize(a_pass, 'step')} an epoch, {steps:,} in all"
