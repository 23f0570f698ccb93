"""Styled text of the Data screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from textual.content import Content

from qlora_tui.data.dataset_report import Piece, Report, Shown
from qlora_tui.data.format_hints import UNMAPPED_COLUMNS
from qlora_tui.data.formats import NOT_IN_FORMAT
from qlora_tui.data.preferences import PAIRS, RATED, UNMAPPED_SIDES
from qlora_tui.data.problems import CHECKS, DataProblem, check_of
from qlora_tui.data.sources import is_hub_dataset
from qlora_tui.errors import UserError
from qlora_tui.formatting import abbreviate_home, format_bytes
from qlora_tui.recipe.schema import Data, Source
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.screens.data.row_navigation import Place
from qlora_tui.tui.screens.data.token_changes import CHANGES_LEGEND, shaded_tokens

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
NO_MODEL = "Select a model with {go.models} to see tokens, the chat template and what is to learn.\n\n"
SIGNS = {"error": ("✗", "$error"), "warning": ("⚠", "$warning")}
_CONTROL, _LEARNED_CONTROL = "reverse", "reverse bold underline $accent"
_LEARNED_BREAK = "bold underline $accent"
_LEARNED, _READ = "bold underline", "dim"
_LEGEND = Content.assemble(
    ("to learn", _LEARNED),
    "  ",
    ("only read", _READ),
    "  ",
    (" control ", _CONTROL),
    "  ",
    (" control to learn ", _LEARNED_CONTROL),
    "  ",
    ("↵", _LEARNED_BREAK),
    (" line break to learn", "dim"),
)
"""The styles of a row's tokens."""


def sample(
    shown: Shown,
    problems: Sequence[DataProblem],
    data: Data,
    changes: Sequence[tuple[float, float]] = (),
) -> Content:
    """The row as the model will see it, below its problems.

    Args:
        changes: loss of each token in the loss before and after a run, by which the tokens are shaded; empty
            where it was not measured.
    """
    parts: list[Content | str | tuple[str, str]] = []
    for kind, example in _row_problems(shown, problems):
        check = check_of(kind, skips_bad_rows=data.bad_rows == "skip") if kind in CHECKS else None
        sign, style = SIGNS[check.severity if check else "warning"]
        parts.append((f"{sign} {check.title if check else kind}", f"{style} bold"))
        parts.append((f"  {example}" if example else "", "dim"))
        parts += [("\n  ▸ ", "$accent"), (check.fix, "dim")] if check and check.fix else []
        parts.append("\n")
    if parts:
        parts.append("\n")
    if shown.refused:
        text = "This row cannot be used.\n\n" if data.bad_rows == "refuse" else "This row is left out.\n\n"
        return Content.assemble(*parts, (text, "bold"), shown.refused)
    if not shown.token_counts:
        parts.insert(0, PLAIN)
    cut = any(count > data.max_length for count in shown.token_counts)
    if cut and data.overflow == "cut-left":
        parts.append(_cut_mark(shown, data))
    shaded = shaded_pieces(shown, changes)
    parts += shaded
    for number, pieces in enumerate(shown.samples if not shaded else ()):
        if shown.sides:
            parts.append((f"{chr(10) if number else ''}──── {shown.sides[number]} ────\n", "dim"))
        elif number:
            parts.append(("\n──── next sample of this row ────\n", "dim"))
        parts += [styled(piece) for piece in pieces]
    if cut and data.overflow == "cut-right":
        parts.append(_cut_mark(shown, data))
    return Content.assemble(*parts)


def legend(shown: Shown | None, changes: Sequence[tuple[float, float]]) -> Content:
    """What the styles of a row's tokens mean; empty where none is shown. ``changes``: see :func:`sample`."""
    if shown is None or shown.refused or not shown.token_counts:
        return Content("")
    return CHANGES_LEGEND if shaded_pieces(shown, changes) else _LEGEND


def shaded_pieces(shown: Shown, changes: Sequence[tuple[float, float]]) -> list[Content | tuple[str, str]]:
    """The one sample of a row with its tokens shaded; empty where the losses are of other tokens."""
    if len(shown.samples) != 1 or len(shown.trained_texts) != 1 or not changes:
        return []
    texts = shown.trained_texts[0]
    if len(texts) != len(changes):
        return []
    tokens = list(zip(texts, changes, strict=True))
    parts: list[Content | tuple[str, str]] = []
    for piece in shown.samples[0]:
        taken = 0
        if piece.in_loss:
            length = 0
            while taken < len(tokens) and length < len(piece.text):
                length += len(tokens[taken][0])
                taken += 1
        here, tokens = tokens[:taken], tokens[taken:]
        if here and "".join(text for text, _ in here) == piece.text and not piece.special:
            parts += shaded_tokens(here)
        else:
            # A special token, or a character that is split over several tokens.
            parts.append(styled(piece))
    return parts


def _row_problems(shown: Shown, problems: Sequence[DataProblem]) -> list[tuple[str, str]]:
    """(kind, example) of each problem of this row."""
    seen = {kind for kind, _ in shown.findings}
    here = (p for p in problems if p.path in ("", shown.path))
    others = [(p.kind, "") for p in here if shown.row in p.rows and p.kind not in seen]
    return [*shown.findings, *others]


def styled(piece: Piece) -> Content:
    text = piece.text
    if piece.special:
        return Content.styled(text, _LEARNED_CONTROL if piece.in_loss else _CONTROL)
    if not piece.in_loss:
        return Content.styled(text, _READ)
    # Line breaks in the loss are invisible; only those at the edges are marked, to keep the text readable.
    inner = text.strip("\n")
    if not inner:
        return Content.styled("↵\n" * len(text), _LEARNED_BREAK)
    before = len(text) - len(text.lstrip("\n"))
    after = len(text) - len(text.rstrip("\n"))
    return Content.assemble(
        ("↵\n" * before, _LEARNED_BREAK), (inner, _LEARNED), ("↵\n" * after, _LEARNED_BREAK)
    )


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


def refused_preferences(error: UserError) -> Literal["", "pairs", "ratings"]:
    """The kind of preferences for which a file is refused until the recipe says how to train on them."""
    return "pairs" if error.code == PAIRS else "ratings" if error.code == RATED else ""


def unreadable_text(error: UserError, fields: dict[str, str]) -> Content:
    """The error for a file that cannot be read, with its columns and the keys that may help."""
    keys = [
        (key_name("data.reload"), "read it again"),
        (key_name("data.open"), "open another file"),
        (key_name("data.remove"), "remove this one"),
    ]
    if fields and error.code in (UNMAPPED_COLUMNS, UNMAPPED_SIDES, NOT_IN_FORMAT):
        # The fix is for the recipe as a file; here there is a key for it.
        error = error.replace(fix=f"Press {key_name('data.columns')} to map the columns.")
    if kind := refused_preferences(error):
        sides = "chosen or on both answers" if kind == "pairs" else "good or on all answers"
        fix = f"Press {key_name('data.fix')} to train on the {sides}."
        error = error.replace(fix=fix)
        keys = [(key_name("data.fix"), "choose how to train on them"), *keys]
    parts: list[Content | tuple[str, str]] = [error_text(error)]
    if fields and error.code not in (PAIRS, RATED):
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
    weight = "" if alone and source.weight == 1 else f"  weight {source.weight:g}"
    if is_hub_dataset(source.path):
        return Content.assemble(source.path, ("  hub", "dim"), (weight, "bold"))
    try:
        bytes_ = "folder" if path.is_dir() else format_bytes(path.stat().st_size)
    except OSError:
        bytes_ = "missing"
    return Content.assemble(path.name, (f"  {bytes_}", "dim"), (weight, "bold"))


def row_title(place: Place, report: Report | None, shown: Shown | None, data: Data, width: int) -> Content:
    """The row number, its tokens to learn, and notes, as far as they fit."""
    path, row = place
    of = name = ""
    if report and len(report.files) > 1:
        file = next((file for file in report.files if file.path == path), report.files[0])
        name = f"{Path(file.path).name} "
        of = f" of {file.last_row:,}" if file.last_row else ""
    elif report and report.complete:
        # In a file with blank lines rows are called by their lines, of which there are more.
        rows = report.counts.rows + report.counts.excluded
        of = f" of {max(rows, report.files[0].last_row):,}"
    elif report:
        # A jump may go beyond what has been read so far.
        of = f" of {max(row, report.counts.rows):,} or more"
    parts = [f"{name}row {row:,}{of}"]
    if shown and shown.samples and shown.token_counts:
        most = max(shown.token_counts) if data.overflow == "split" else data.max_length
        rendered_tokens = sum(min(count, most) for count in shown.token_counts)
        parts.append(f"{sum(shown.trained_counts):,} of {rendered_tokens:,} tokens to learn")
    if shown:
        parts += shown.notes
    title = _join_to_width(parts, width)
    first, _, rest = title.partition(" · ")
    return Content.assemble(first, (f" · {rest}" if rest else "", "not bold $foreground"))


def _join_to_width(parts: Sequence[str], width: int) -> str:
    """Join as many parts as fit on one line, with an ellipsis if there are more."""
    for count in range(len(parts), 1, -1):
        words = " · ".join(parts[:count]) + (" …" if count < len(parts) else "")
        if len(words) <= width:
            return words
    return parts[0]
