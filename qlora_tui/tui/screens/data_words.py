"""What the Data screen says, as text with styles. No widget here."""

from __future__ import annotations

import math
from pathlib import Path

from textual.content import Content

from qlora_tui.data.inspect import Report, Shown
from qlora_tui.errors import Problem
from qlora_tui.recipe.schema import Recipe, Source
from qlora_tui.tui.widgets.histogram import histogram

EMPTY = Content.from_markup(
    "[b]No data yet.[/b]\n\nPress [b]o[/b] to open a file: JSON, JSONL, CSV, TSV, Parquet or text, "
    "packed with gzip or zstd if you like, or a folder of such files.\n\n"
    "Conversations (messages, ShareGPT), instructions (Alpaca), prompt and completion, question and answer, "
    "text and label are recognized by themselves."
)
NO_MODEL = Content.from_markup(
    "[b]Choose a model first (1).[/b]\n\nWhat the model sees of a row depends on its tokenizer and its chat "
    "template, and so does what is trained."
)
_ROWS_NAMED = 4


def sample(shown: Shown) -> Content:
    """The row as the model will see it."""
    if shown.refused:
        return Content.assemble(("This row gives no sample.\n\n", "bold"), shown.refused)
    parts: list[Content | str | tuple[str, str]] = []
    for number, pieces in enumerate(shown.samples):
        if number:
            parts.append(("\n──── next row of the batch ────\n", "dim"))
        for piece in pieces:
            style = ["reverse"] if piece.special else []
            style += ["bold underline"] if piece.trained else ["dim"] if not piece.special else []
            parts.append((piece.text, " ".join(style)))
    for kind, example in shown.findings:
        parts.append((f"\n\n⚠ {kind.replace('_', ' ')}: {example}", "$warning"))
    return Content.assemble(*parts)


def problem(found: Problem) -> Content:
    """What stands where the sample would be, when there is none."""
    return Content.assemble(
        (f"✗ {found.title}\n\n", "$error bold"),
        f"{found.what}\n{found.why}\n\n",
        (f"▸ {found.fix}", "$accent"),
    )


def source_line(source: Source) -> Content:
    """A source in the list."""
    weight = "" if source.weight == 1 else f" ×{source.weight:g}"
    format_ = "" if source.format == "auto" else f" as {source.format}"
    return Content.assemble(Path(source.path).name, (f"{format_}{weight}", "dim"))


def row_line(row: int, report: Report | None, shown: Shown | None) -> Content:
    """Which row it is, and how much of it is trained."""
    of = f" of {report.counts.rows:,}{'' if report.complete else '+'}" if report else ""
    trained = ""
    if shown and shown.samples:
        trained = f"   {sum(shown.trained_counts):,} of {sum(shown.token_counts):,} tokens trained"
    return Content.assemble(
        (f"row {row:,}{of}{trained}", ""),
        ("     ‹ › rows   ", "dim"),
        ("underlined", "bold underline"),
        (" is learnt", "dim"),
    )


def lengths(report: Report, recipe: Recipe, width: int, height: int) -> Content:
    """The histogram under its figures."""
    found = report.lengths
    if not found.count:
        return Content("")
    points = f"p50 {found.p50:,}  p90 {found.p90:,}  p99 {found.p99:,}  max {found.longest:,}"
    line = f"{found.unit}: {points}"
    drawn = histogram(found, recipe.data.max_length, width, height)
    return Content.assemble((line[: width + 2], "bold"), "\n", drawn)


def facts(report: Report, recipe: Recipe) -> Content:
    """Totals, the format with its evidence, and the problems."""
    parts: list[Content] = []
    reading = "" if report.complete else f" ({report.share:.0%} read)"
    counts = report.counts
    parts.append(Content(f"{counts.rows:,} rows, {counts.conversations:,} conversations{reading}"))
    if report.template:
        parts.append(
            Content(
                f"{counts.samples:,} samples, {counts.tokens:,} tokens, {counts.trained_tokens:,} trained"
            )
        )
        parts.append(Content(steps_line(report, recipe)))
    cut = recipe.data.too_long
    if report.too_long:
        parts.append(
            Content.styled(f"✂ {report.too_long:,} over {recipe.data.max_length:,} tokens: {cut}", "$warning")
        )
    for file in report.files[:1]:
        parts.append(Content.styled(f"{file.format}: {'; '.join(file.evidence)}", "dim"))
    for found in report.problems:
        sign, style = ("✗", "$error") if found.severity == "error" else ("⚠", "$warning")
        rows = ", ".join(f"{row:,}" for row in found.rows[:_ROWS_NAMED])
        more = "…" if found.count > _ROWS_NAMED else ""
        parts.append(
            Content.assemble(
                (f"{sign} {found.title}: {found.count:,}", style), f" (rows {rows}{more})" if rows else ""
            )
        )
        if found.fix:
            parts.append(Content.styled(f"  ▸ {found.fix}", "dim"))
    if report.complete and not report.problems:
        parts.append(Content.styled("✓ no problems found", "$success"))
    return Content("\n").join(parts)


def steps_line(report: Report, recipe: Recipe) -> str:
    """How many optimizer steps the data makes, roughly: packing is only known once it is done."""
    kept = report.counts.samples * (1 - recipe.data.validation_fraction)
    rows = kept
    if recipe.data.packing and report.lengths.count:
        fit = min(report.lengths.mean, recipe.data.max_length)
        rows = math.ceil(kept * fit / recipe.data.max_length)
    a_pass = max(1, math.ceil(rows / recipe.effective_batch))
    steps = math.ceil(a_pass * recipe.training.epochs)
    if recipe.training.max_steps:
        steps = min(steps, recipe.training.max_steps)
    return f"about {steps:,} steps, {a_pass:,} an epoch"
