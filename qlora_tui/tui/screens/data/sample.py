"""Rows of the data as the model will see them: the panel with the rows, the styles of tokens, and navigation
between rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from textual.app import App
from textual.containers import Grid
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from qlora_tui.data.dataset_report import FileReport, Piece, Report, Shown
from qlora_tui.data.formats import NOT_IN_FORMAT
from qlora_tui.data.preferences import PAIRS, RATED, UNMAPPED_SIDES
from qlora_tui.data.problems import CHECKS, DataProblem, check_of
from qlora_tui.data.unsupported import UNMAPPED_COLUMNS
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_number
from qlora_tui.recipe.schema import Data
from qlora_tui.tui.key_names import TITLE_GAP, bare_key, highlight_keys, key_hint, key_name, name_keys
from qlora_tui.tui.render.labels import SEVERITY_SIGNS, error_content
from qlora_tui.tui.screens.data.row_engines import PreviewRequest
from qlora_tui.tui.themes import lacks_shades
from qlora_tui.tui.widgets.controls import Lines, Panel, ViScroll

Place: TypeAlias = tuple[str, int]
"""(path, row number) of a row. An empty path means the source's first file."""
Changes: TypeAlias = Sequence[tuple[float, float]]
"""(loss before training, loss after training) of each token to learn; empty if not measured. The change
determines the token's shade.
"""

_EMPTY = (
    "No data yet.\n\nPress {data.open} to open a file (JSON, JSONL, CSV, TSV, Parquet or text, "
    "optionally compressed with gzip or zstd), a folder of such files, or a dataset from the Hub.\n\n"
    "The format is detected: conversations (messages, ShareGPT), instructions (Alpaca), prompt and "
    "completion, question and answer, text and label, plain text.\n\n"
    "Every row is then shown here exactly as the model will see it.\n\n"
    "To try it without a file of your own, press {go.home} for Home and then {home.demo} for the demo's "
    "conversations."
)
_PLAIN = Content.styled("The row as it is in the file:\n\n", "dim")
_NO_MODEL = (
    "Select a model with {go.models} to see tokens, the chat template and which tokens are learned.\n\n"
)
_KEYS = (
    ("data.previous", "previous"),
    ("data.next", "next row"),
    ("data.goto", "go to"),
    ("data.view", "view"),
)
TITLE_FRAME = 6
"""Width of a panel's corners and of the spaces around its title, in cells."""

_TO_LEARN = " to learn"
_MOST_BESIDE = 9
_ROW_CELLS, _ROW_LINES = 62, 12
"""Minimum width, in cells, and height, in lines, of each row if several rows are shown at once."""


@dataclass(frozen=True)
class TokenStyles:
    """Styles of tokens. Tokens to learn stand out. Control tokens are in italics; those that are only read
    are also dim. Other tokens that are only read have no style.
    """

    learned: str

    @classmethod
    def of(cls, app: App[Any]) -> TokenStyles:
        """Return the styles for the app's theme. Tokens to learn are bold, and have a tinted background or,
        if the theme has no tints, the training color. Without color, they are only bold.
        """
        return cls("bold $training" if lacks_shades(app) else "bold on $training 30%")

    def of_piece(self, piece: Piece) -> str:
        """Return the style of a piece of text. All tokens of a piece have the same role."""
        if piece.special:
            return f"{self.learned} italic" if piece.in_loss else "dim italic"
        return self.learned if piece.in_loss else ""

    def legend(self) -> Content:
        """Return a text that explains the styles."""
        return Content.assemble(
            (f"{_TO_LEARN} ", self.learned),
            "  only read",
            ("  control token", "dim italic"),
            "  ",
            ("↵", self.learned),
            (" line break to learn", "dim"),
        )


_FELL = 2.0
"""A token counts as learned if its loss falls by this many nats."""
_ROSE = 0.5
"""A token counts as less likely if its loss rises by this many nats."""
_FALL_MARK, _RISE_MARK = "▾", "▴"
_CHANGES_LEGEND = Content.assemble(
    ("Loss in nats: ", "dim"),
    (f"{_FALL_MARK}fell by {format_number(_FELL)} or more", "bold $success"),
    "  ",
    ("between", "underline"),
    "  ",
    (f"{_RISE_MARK}rose by {format_number(_ROSE)} or more", "bold reverse $error"),
)


class SamplePanel(Panel):
    """Shows a row, further rows if there is room, and a legend of the styles. If there is no row, it shows
    the reason.
    """

    def __init__(self) -> None:
        super().__init__("Sample", keys=_KEYS, id="sample-panel")

    def compose(self) -> Iterable[Widget]:
        with ViScroll(id="sample-scroll"), Grid(id="samples"):
            yield Static(id="sample")
            yield from (Static(classes="next-sample") for _ in range(_MOST_BESIDE))
        yield Lines(id="legend")

    def show_row(
        self,
        shown: Shown | None,
        problems: Sequence[DataProblem],
        request: PreviewRequest,
        changes: Changes,
        no_tokens: UserError | None,
        *,
        has_legend: bool = True,
    ) -> None:
        """Show a row with its legend.

        Args:
            shown: The row; None to hide the legend and leave the text as it is.
            problems: The problems of the source.
            request: The request for the row.
            changes: Losses of the row's tokens before and after training; empty if not measured.
            no_tokens: Why the row cannot be shown as the model sees it; None if it can, or if no model is
                selected.
            has_legend: Whether to show the legend. If not, the panel's title explains the tint.
        """
        styles = TokenStyles.of(self.app)
        self.show_legend(legend(shown, changes, styles) if has_legend else Content(""))
        if shown is None:
            return
        text = sample(shown, problems, request.data, styles, changes)
        if self.has_columns:
            text = _heading(shown, request.data) + text
        if no_tokens is not None:
            text = Content.assemble(error_content(no_tokens, is_spaced=True), "\n\n", text)
        elif not request.model:
            text = Content.assemble(highlight_keys(name_keys(_NO_MODEL), "dim"), text)
        self.query_one("#sample", Static).update(text)

    def show_text(self, text: Content) -> None:
        """Show a text in place of all rows."""
        self.query_one("#sample", Static).update(text)
        self.show_beside((), Data())

    @property
    def room_beside(self) -> int:
        """Number of rows that fit in addition to the first row."""
        lines = max(1, self.size.height // _ROW_LINES)
        return min(_MOST_BESIDE, self._columns * lines - 1)

    @property
    def has_columns(self) -> bool:
        """Whether rows fit side by side. If so, each row needs a heading."""
        return self._columns > 1

    @property
    def _columns(self) -> int:
        """Number of columns, that is, how many rows fit side by side."""
        return max(1, self.size.width // _ROW_CELLS)

    def show_beside(self, rows: Sequence[Shown], data: Data) -> None:
        """Show ``rows``, the rows that follow the first one, beside and below it."""
        styles = TokenStyles.of(self.app)
        self.query_one("#samples").styles.grid_size_columns = self._columns
        for number, column in enumerate(self.query(".next-sample").results(Static)):
            column.display = number < len(rows)
            if column.display:
                row = rows[number]
                column.update(_heading(row, data) + sample(row, (), data, styles))

    def show_empty(self) -> None:
        """Show a text that says how to open data."""
        self.show_text(highlight_keys(name_keys(_EMPTY)))

    def show_legend(self, text: Content) -> None:
        """Show a legend. An empty text hides the line of the legend."""
        line = self.query_one("#legend", Lines)
        line.display = bool(text)
        line.show(text)


def _heading(shown: Shown, data: Data) -> Content:
    words = filter(None, (f"row {shown.row:,}", _learned_words(shown, data)))
    return Content.styled(f"{' · '.join(words)}\n", "bold")


def sample(
    shown: Shown, problems: Sequence[DataProblem], data: Data, styles: TokenStyles, changes: Changes = ()
) -> Content:
    """Return a row as the model will see it, below the row's problems. If the row cannot be used, return the
    reason instead of the row.

    Args:
        shown: The row.
        problems: The problems of the source, which include their fixes.
        data: The data settings of the recipe.
        styles: The styles of tokens.
        changes: Losses of the row's tokens before and after training; empty if not measured.
    """
    parts: list[Content | str | tuple[str, str]] = []
    found = {kind for kind, _ in shown.findings}
    in_file = [p for p in problems if p.path in ("", shown.path)]
    fixes = {p.kind: p.fix for p in in_file}
    others = [(p.kind, "") for p in in_file if shown.row in p.rows and p.kind not in found]
    for kind, example in (*shown.findings, *others):
        check = check_of(kind, skips_bad_rows=data.bad_rows == "skip") if kind in CHECKS else None
        sign, style = SEVERITY_SIGNS[check.severity if check else "warning"]
        parts.append((f"{sign} {check.title if check else kind}", f"{style} bold"))
        parts.append((f"  {example}" if example else "", "dim"))
        fix = fixes.get(kind) or (check.fix if check else "")
        parts += [("\n  ▸ ", "$primary"), (fix, "dim")] if fix else []
        parts.append("\n")
    if parts:
        parts.append("\n")
    if shown.refused:
        text = "This row cannot be used.\n\n" if data.bad_rows == "refuse" else "This row is left out.\n\n"
        return Content.assemble(*parts, (text, "bold"), shown.refused)
    if not shown.token_counts:
        parts.insert(0, _PLAIN)
    lost = sum(max(0, count - data.max_length) for count in shown.token_counts)
    mark = f"✂ {lost:,} more tokens do not fit in {data.max_length:,}"
    if lost and data.overflow == "cut-left":
        parts.append((f"{mark}\n", "$warning"))
    shaded = _shaded_pieces(shown, changes, styles)
    parts += shaded
    for number, pieces in enumerate(shown.samples if not shaded else ()):
        if shown.sides:
            parts.append((f"{chr(10) if number else ''}──── {shown.sides[number]} ────\n", "dim"))
        elif number:
            parts.append(("\n──── next sample of this row ────\n", "dim"))
        parts += [_styled(piece, styles) for piece in pieces]
    if lost and data.overflow == "cut-right":
        parts.append((f"\n{mark}", "$warning"))
    return Content.assemble(*parts)


def legend(shown: Shown | None, changes: Changes, styles: TokenStyles) -> Content:
    """Return the legend for a row; empty if there is no row, or if the row has no tokens."""
    if shown is None or shown.refused or not shown.token_counts:
        return Content("")
    return _CHANGES_LEGEND if _shaded_pieces(shown, changes, styles) else styles.legend()


def unreadable_text(error: UserError, fields: dict[str, str]) -> Content:
    """Return the error for a source that cannot be read, and the keys that may help. If the columns of the
    file are known, they are listed too. ``fields``: an example value for each column, by the column's name.
    """
    keys = [
        (key_name("data.reload"), "read it again"),
        (key_name("data.open"), "open another file"),
        (key_name("data.remove"), "remove this one"),
    ]
    if fields and error.code in (UNMAPPED_COLUMNS, UNMAPPED_SIDES, NOT_IN_FORMAT):
        # The error's fix is to edit the recipe file. On this screen, a key does the same.
        error = error.replace(fix=f"Press {key_name('data.columns')} to map the columns.")
    if kind := refused_preferences(error):
        sides = (
            "the chosen answers only, or on both" if kind == "pairs" else "the good answers only, or on all"
        )
        error = error.replace(fix=f"Press {key_name('data.fix')} to train on {sides}.")
        keys = [(key_name("data.fix"), "choose how to train on them"), *keys]
    parts: list[Content | tuple[str, str]] = [error_content(error, is_spaced=True)]
    if fields and not kind:
        parts.append(("\n\nIts rows contain:", ""))
        parts += [
            part for name, example in fields.items() for part in ((f"\n  {name}  ", "bold"), (example, "dim"))
        ]
        keys = [
            (key_name("data.columns"), "map the columns"),
            (key_name("data.format"), "read it in another format"),
            *keys,
        ]
    parts.append(("\n\n", ""))
    parts += [part for key, does in keys for part in ((key, "$key bold"), (f" {does}   ", "dim"))]
    return Content.assemble(*parts)


def refused_preferences(error: UserError) -> Literal["", "pairs", "ratings"]:
    """Return the kind of preferences in a refused file. A file is refused if the recipe does not say how to
    train on this kind. Return an empty text if ``error`` is any other error.
    """
    return "pairs" if error.code == PAIRS else "ratings" if error.code == RATED else ""


def row_title(
    place: Place,
    report: Report | None,
    shown: Shown | None,
    data: Data,
    width: int,
    *,
    has_heading: bool = False,
    has_keys: bool = False,
    learned: str = "",
) -> Content:
    """Return the panel's title: the row's number, its number of tokens to learn, and notes, as far as they
    fit.

    Args:
        place: The row.
        report: The report on the source, for the number of rows; None if there is none yet.
        shown: The contents of the row; None if they have not been read.
        data: The data settings of the recipe.
        width: Available width, in cells.
        has_heading: Whether a heading inside the panel has the number of tokens. If so, the title does not.
        has_keys: Whether the title has the keys that show other rows.
        learned: The style of tokens to learn, if the title explains it; otherwise empty.
    """
    path, row = place
    of = name = ""
    if report and len(report.files) > 1:
        file = next((file for file in report.files if file.path == path), report.files[0])
        name = f"{Path(file.path).name} "
        of = f" of {file.last_row:,}" if file.last_row else ""
    elif report and report.complete:
        # In a JSONL file, rows are numbered by line. If there are blank lines, the last number is larger than
        # the number of rows.
        rows = report.counts.rows + report.counts.excluded
        of = f" of {max(rows, report.files[0].last_row):,}"
    elif report:
        # The user may have jumped to a row beyond the part that has been read.
        of = f" of {max(row, report.counts.rows):,} or more"
    parts = [f"{name}row {row:,}{of}"]
    if shown and not has_heading and (words := _learned_words(shown, data)):
        parts.append(words)
    if shown:
        parts += shown.notes
    lengths = (count for count in range(len(parts), 1, -1))
    titles = (" · ".join(parts[:count]) + (" …" if count < len(parts) else "") for count in lengths)
    title = next((title for title in titles if len(title) <= width), parts[0])
    first, _, rest = title.partition(" · ")
    head = Content.assemble(first, (f" · {rest}" if rest else "", "not bold $foreground"))
    if learned and (at := head.plain.find(_TO_LEARN)) >= 0:
        head = head.stylize(f"$foreground {learned}", at, at + len(_TO_LEARN))
    both = f"{bare_key('data.previous')} {bare_key('data.next')}".replace("Left Right", "←→")
    keys = TITLE_GAP + key_hint(both, "row")
    return head + keys if has_keys and head.cell_length + keys.cell_length <= width else head


def _learned_words(shown: Shown, data: Data) -> str:
    """Return how many of a row's tokens are learned, such as ``43 of 79 tokens to learn``; empty if the row
    has no tokens.
    """
    if not shown.samples or not shown.token_counts:
        return ""
    most = max(shown.token_counts) if data.overflow == "split" else data.max_length
    rendered_tokens = sum(min(count, most) for count in shown.token_counts)
    return f"{sum(shown.trained_counts):,} of {rendered_tokens:,} tokens{_TO_LEARN}"


def neighbor(place: Place, by: int, files: Sequence[FileReport]) -> Place:
    """Return the place of the next row if ``by`` is 1, and of the previous row if it is -1. At either end of
    the source, return ``place``.

    The last row of a file is known only after the file has been read. ``files``: the reports on the files so
    far.
    """
    path, row = place
    number = _file_number(path, files)
    # Rows of a JSONL file are numbered by line. Some lines may be blank, but the last row always exists.
    if by > 0 and files and row >= (files[number].last_row or row + 1):
        return (files[number + 1].path, 1) if number + 1 < len(files) else place
    if by < 0 and row == 1:
        return (files[number - 1].path, max(1, files[number - 1].last_row)) if number else place
    return path, max(1, row + by)


def parse_place(text: str, path: str, files: Sequence[FileReport]) -> Place | None:
    """Return the place for a typed row number: ``17`` in the file ``path``, or ``part-2 17`` in the first
    file whose name contains ``part-2``.

    Return None if the text has neither form, or if no file name contains the text before the number.
    """
    name, _, digits = text.strip().rpartition(" ")
    digits = digits.replace(",", "")
    if not digits.isdigit() or int(digits) < 1:
        return None
    if name.strip():
        matches = (file.path for file in files if name.strip().lower() in Path(file.path).name.lower())
        path = next(matches, "")
        return (path, int(digits)) if path else None
    return path, int(digits)


def next_problem(
    problems: Sequence[DataProblem], place: Place, by: int, files: Sequence[FileReport]
) -> Place | None:
    """Return the place of the next row with one of these problems or, if ``by`` is negative, of the previous
    such row. The search wraps around at either end. Return None if no problem has a row.
    """
    places = sorted({(_file_number(p.path, files), row) for p in problems for row in p.rows})
    if not places:
        return None
    here = _file_number(place[0], files), place[1]
    if by > 0:
        number, row = next((one for one in places if one > here), places[0])
    else:
        number, row = next((one for one in reversed(places) if one < here), places[-1])
    return (files[number].path if files else ""), row


def _file_number(path: str, files: Sequence[FileReport]) -> int:
    return next((n for n, file in enumerate(files) if file.path == path), 0)


def _styled(piece: Piece, styles: TokenStyles) -> Content:
    text = piece.text
    if piece.in_loss and not piece.special:
        # Line breaks at the edges of the learned text would be invisible, so they are marked. Marks inside
        # the text would make it hard to read.
        inner = text.strip("\n")
        before = len(text) - len(text.lstrip("\n"))
        after = len(text) - before - len(inner)
        text = "↵\n" * before + inner + "↵\n" * after
    return Content.styled(text, styles.of_piece(piece))


def _shaded_pieces(shown: Shown, changes: Changes, styles: TokenStyles) -> list[Content | tuple[str, str]]:
    """Return the row's sample with each token shaded by its change. Return an empty list if the row has
    several samples, or if ``changes`` does not have exactly one item for each token to learn.
    """
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
            parts += [_shaded(text, after - before) for text, (before, after) in here]
        else:
            # A special token, or a character that consists of several tokens, is not shaded.
            parts.append(_styled(piece, styles))
    return parts


def _shaded(text: str, change: float) -> Content:
    """Return a token styled according to ``change``, the change in its loss in nats. A large change also
    has a mark, for terminals without color.
    """
    # The mark is put between a leading space and the word.
    word = text.lstrip(" ")
    space = text[: len(text) - len(word)]
    word = word.replace("\n", "↵\n")
    if change <= -_FELL:
        return Content.assemble(space, (_FALL_MARK, "$success"), (word, "bold $success"))
    if change >= _ROSE:
        return Content.assemble(space, (_RISE_MARK, "$error"), (word, "bold reverse $error"))
    return Content.assemble(space, (word, "underline"))
