"""The Data screen's report on a whole source: totals, the lengths of samples, the costs of other maximum
lengths, and problems.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

from msgspec.structs import replace
from textual.content import Content

from qlora_tui.data.dataset_report import Lengths, Report
from qlora_tui.data.problems import OVERFLOW_OUTCOMES, DataProblem, is_bad_row, row_outcome
from qlora_tui.formatting import capitalize, format_duration, format_percent, pluralize
from qlora_tui.recipe.schema import Data, Recipe
from qlora_tui.runs.data_checks import advise_more_steps
from qlora_tui.runs.expected_time import Forecast
from qlora_tui.runs.length_costs import LengthCost
from qlora_tui.tui.key_names import highlight_keys, key_name
from qlora_tui.tui.render.columns import Column, Fact, fact_lines, table
from qlora_tui.tui.render.labels import SEVERITY_SIGNS, needed_words, next_step, verdict_sign, verdict_words
from qlora_tui.tui.render.meters import bar, blocks
from qlora_tui.tui.render.plot import Axis, ticks
from qlora_tui.tui.widgets.controls import Drawing, Lines, Panel, ViList

_TOTALS_KEYS = (("data.format", "format"), ("data.columns", "columns"))
_LENGTH_KEYS = (("data.longer", "longer"), ("data.shorter", "shorter"), ("data.too_long", "if too long"))
_NOTHING_LEFT = "No row can be used. Choose other data, or map the columns of the file."
_ROWS_NAMED = 3
LABEL_CELLS = 10
"""Width of the labels in the first column of the totals, in cells."""
_MIN_BAR, _MAX_BAR = 6, 24
_MAX_HISTOGRAM = 72
"""Maximum number of columns of the histogram. More columns would only make the bars wider."""
_HATCHED = str.maketrans("▄▅▆▇█", "▒▒▒▒▒")
_TIMED_WIDTH = 46
"""Minimum width of the table of costs, in cells, at which it has a column of times. A narrower table has
none, because the totals already include the time at the recipe's length.
"""


class TotalsPanel(Panel):
    """The detected format and the resulting samples, tokens and steps."""

    def __init__(self) -> None:
        self._totals = Lines(id="data-totals")
        super().__init__("Tokens", self._totals, keys=_TOTALS_KEYS, id="totals-panel")

    def show(
        self,
        report: Report,
        recipe: Recipe,
        expected: Forecast | None,
        fit: Content | None,
        *,
        brief: bool,
        evidence: bool,
    ) -> None:
        """Show the totals of a report; :func:`totals` describes the arguments."""
        width = self.content_size.width
        self.show_text(totals(report, recipe, width, expected, fit, brief=brief, evidence=evidence))

    def show_text(self, text: Content) -> None:
        """Show a text in place of the totals."""
        self._totals.show(text)


class LengthsPanel(Panel):
    """The distribution of the lengths of samples, and the costs of other maximum lengths."""

    def __init__(self) -> None:
        self._line, self._costs = Lines(id="lengths-line"), Lines(id="costs")
        self._histogram = Drawing(id="histogram", classes="graph")
        super().__init__(
            "Lengths", self._line, self._histogram, self._costs, keys=_LENGTH_KEYS, id="lengths-panel"
        )

    def show(self, report: Report | None, data: Data, costs: list[LengthCost]) -> None:
        """Show the lengths of a report, with a histogram in the rows that are free. If ``report`` is None,
        clear the panel.
        """
        width, lengths, cut = self.content_size.width, None, None
        if report is not None:
            lengths, cut = report.lengths, data.max_length if report.template else None
        unit = "" if lengths is None else f" in {lengths.unit}"
        self.show_title(Content.assemble("Lengths", (unit, "not bold $text-muted")))
        self._line.show(Content("") if report is None else lengths_line(report, data, width))
        self._histogram.show(partial(histogram, lengths, cut))
        self._costs.show(cost_table(costs if report is not None and report.complete else [], width))


class ProblemsPanel(Panel):
    """A list of the kinds of problems in the data, with their effect on the rows."""

    def __init__(self) -> None:
        self._list = ViList(id="problems", classes="quiet")
        super().__init__("Problems", self._list, id="problems-panel")

    def show(
        self,
        report: Report | None,
        problems: Sequence[DataProblem],
        recipe: Recipe,
        expected: Forecast | None,
        *,
        brief: bool,
    ) -> None:
        """Show the problems of a report.

        Args:
            report: The report; None to show an empty list.
            problems: The problems of the report that the recipe does not already fix.
            recipe: The recipe that uses the rows.
            expected: The forecast of the run; None if unknown.
            brief: Whether each problem takes only one line.
        """
        if report is None:
            self._list.show([])
            self.show_title("Problems")
            self.empty = "none yet"
            return
        bad_rows = skippable_rows(report, problems)
        lines, unsaid = [], bad_rows
        for problem in problems:
            # The key leaves out the bad rows of all problems, so only the first problem with bad rows
            # mentions the key.
            skipped, unsaid = (unsaid, 0) if is_bad_row(problem) else (0, unsaid)
            several = len(report.files) > 1
            line = problem_line(problem, recipe.data, brief=brief, several=several, bad_rows=skipped)
            lines.append((f"{problem.kind} {problem.path}", line))
        if few_steps := few_steps_line(expected, recipe, brief=brief):
            lines.append(("steps", few_steps))
        # Unless the list has the focus, keep the cursor on the first line. Errors that are found later are
        # inserted above the current lines.
        select = lines[0][0] if lines and not self._list.has_focus else None
        self._list.show(lines, select)
        # If each problem takes one line, a single problem without a key is shown in the title.
        is_title = brief and len(lines) == 1 and not has_fix(report, problems)
        self._list.display = not is_title
        if is_title:
            self.show_title(Content("Problem: ") + lines[0][1].stylize_before("not bold"))
        else:
            self.show_title(f"Problems ({len(lines)})" if lines else "Problems")
        keys = [("data.problem", "next")] if problems else []
        if has_fix(report, problems):
            keys.append(("data.fix", "fix"))
        if recipe.data.bad_rows == "skip":
            keys.append(("data.bad_rows", "refuse bad rows"))
        elif bad_rows:
            keys.append(("data.bad_rows", "skip bad rows"))
        self.show_keys(keys)
        done = Content.assemble("none found   ", next_step("go.memory", "see what it needs"))
        self.empty = "" if lines else done if report.complete else "none so far"


def unfixed_problems(report: Report | None, trained_tokens: Collection[str]) -> tuple[DataProblem, ...]:
    """Return the report's problems, except those about tokens that the recipe already trains. If all rows of
    the source are bad, the fix text of each problem with bad rows says that no row can be used.

    The list on the screen has the same order: a line is opened by its index.
    """
    if report is None:
        return ()
    trained = set(trained_tokens)
    problems = [p for p in report.problems if not p.tokens or not trained.issuperset(p.tokens)]
    if _has_usable_rows(report):
        return tuple(problems)
    return tuple(replace(p, fix=_NOTHING_LEFT) if is_bad_row(p) else p for p in problems)


def _has_usable_rows(report: Report) -> bool:
    """Return whether at least one row remains if bad rows are left out. True until the whole source has been
    read.
    """
    return bool(report.counts.conversations) or not report.complete


def skippable_rows(report: Report | None, problems: Sequence[DataProblem]) -> int:
    """Return the number of bad rows that prevent a run from starting and can be left out; 0 if no rows would
    remain.
    """
    if report is None or not _has_usable_rows(report):
        return 0
    return sum(problem.count for problem in problems if is_bad_row(problem))


def has_fix(report: Report | None, problems: Sequence[DataProblem]) -> bool:
    """Return whether a key can fix any of these problems by changing a setting."""
    can_change = any(problem.split_rows or problem.tokens for problem in problems)
    return can_change or skippable_rows(report, problems) > 0


def totals(
    report: Report,
    recipe: Recipe,
    width: int,
    expected: Forecast | None = None,
    fit: Content | None = None,
    *,
    brief: bool = False,
    evidence: bool = True,
) -> Content:
    """Return the detected format, the resulting samples and tokens, and the run's length and memory if known.

    Args:
        report: The report on the source.
        recipe: The recipe that uses the source.
        width: Available width, in cells.
        expected: The forecast of the run; None if unknown.
        fit: The memory that the run needs, as text; None if unknown.
        brief: Whether to include only the first sentence about reasoning.
        evidence: Whether to say how the format was recognized. If not, the columns are named instead.
    """
    counts, data = report.counts, recipe.data
    facts: list[Fact] = []
    for file in report.files[:1]:
        more = f", {len(report.files)} files" if len(report.files) > 1 else ""
        # A column with the same name as the format adds no information.
        columns = ", ".join(name for name in file.columns.values() if name != file.format)
        why = "; ".join(file.evidence) if evidence else columns
        text = Content.assemble((file.format, "bold"), (f"{': ' if why else ''}{why}{more}", "dim"))
        facts.append(("format", text))
    reading = "" if report.complete else f"  ({format_percent(report.share)} read)"
    excluded = f", {counts.excluded:,} excluded" if counts.excluded else ""
    if not report.template:
        conversations = pluralize(counts.conversations, "conversation")
        facts.append(("rows", f"{counts.rows:,}, {conversations}{excluded}{reading}"))
        return Content("\n").join(fact_lines([*facts, *map(Content, report.thinking)], width))
    unused = counts.rows - counts.conversations
    samples = Content.assemble(
        f"{counts.samples:,} {'pairs ' if recipe.trains_pairs else ''}from {pluralize(counts.rows, 'row')}",
        (f", {unused:,} left out" if unused > 0 else "", "$warning"),
        excluded,
        (reading, "bold"),
    )
    facts.append(("samples", samples))
    facts.append(("tokens", f"{counts.tokens:,}"))
    share = counts.trained_tokens / counts.tokens if counts.tokens else 0.0
    trained = f"{counts.trained_tokens:,} ({format_percent(share)})" if counts.tokens else "none"
    cells = min(_MAX_BAR, width - LABEL_CELLS - len(trained) - 1)
    drawn = f"{bar(share, cells)} " if cells >= _MIN_BAR else ""
    facts.append(("to learn", Content.assemble((drawn, "$training"), trained)))
    if report.complete:
        words = _length_words(expected) if counts.samples else "Nothing to train on"
        facts.append(("steps", words))
    facts += [("memory", fit)] if fit is not None else []
    facts += map(Content, report.thinking[:1] if brief else report.thinking)
    facts.append(Content.styled(_rules(data, {file.format for file in report.files}), "dim"))
    return Content("\n").join(fact_lines(facts, width))


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
    """Return the text above the histogram: a line with percentiles of the lengths and, if samples are too
    long, a line with their number and what happens to them.
    """
    lengths = report.lengths
    points = f"median {lengths.p50:,}  90% ≤{lengths.p90:,}  99% ≤{lengths.p99:,}"
    most = f"  all ≤{lengths.longest:,}"
    # The maximum can be left out, since it is also at the end of the axis.
    line = points + most if len(points + most) <= width else points
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
    """Return the text for one kind of problem: the problem, its effect on the rows, and its fix.

    Args:
        problem: The problem.
        data: The data settings of the recipe.
        brief: Whether the text must be a single line.
        several: Whether the source has several files. If so, the text names the problem's file.
        bad_rows: Number of bad rows of all problems, which the fix leaves out; 0 if the text of another
            problem states this number.
    """
    sign, style = SEVERITY_SIGNS[problem.severity]
    begin, fix = "  " if brief else "\n  ", _fix_label(problem, bad_rows)
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
        highlight_keys(f"{begin}▸ {key_name('data.fix')} {fix}", "$primary") if fix else "",
        (f"{begin}▸ {problem.fix}" if problem.fix and not (brief and fix) else "", "dim" if fix else ""),
    )


def _fix_label(problem: DataProblem, bad_rows: int) -> str:
    """Return what the fix key does about this problem; empty if the key does nothing about it, or if another
    problem's text names the key.
    """
    if is_bad_row(problem):
        return f"leave {pluralize(bad_rows, 'bad row')} out" if bad_rows else ""
    if problem.split_rows:
        return f"split into {'about ' if problem.is_estimate else ''}{pluralize(problem.split_rows, 'row')}"
    return f"train {', '.join(problem.tokens)}" if problem.tokens else ""


def few_steps_line(expected: Forecast | None, recipe: Recipe, *, brief: bool) -> Content | None:
    """If the run has too few steps, return a warning and its fix. Return None if the run has enough steps, or
    if the number of steps is not known yet. ``brief``: whether the text must be a single line.
    """
    if expected is None or not expected.length.is_too_short:
        return None
    length = expected.length
    warning = Content.styled(f"! {capitalize(length.shortage)}", "$warning")
    change = advise_more_steps(recipe, length, brief=brief)
    if brief:
        return warning + highlight_keys(f"  ▸ {key_name('go.train')} {change}")
    return warning + highlight_keys(f"\n  ▸ On {key_name('go.train')} Train, {change}.")


def _length_words(expected: Forecast | None) -> str:
    """Return the length of a run, such as ``57 per epoch, 114 in total, about 25 min``; ``not known yet`` if
    ``expected`` is None.
    """
    if expected is None:
        return "not known yet"
    length = expected.length
    time = f", {expected.duration}" if expected.time else ""
    return f"{length.about}{length.steps_per_epoch:,} per epoch, {length.steps:,} in total{time}"


def histogram(lengths: Lengths | None, cut_at: int | None, width: int, height: int) -> list[Content]:
    """Return ``height`` lines with the lengths of samples as bars, with the highest count and an axis; no
    lines if there are no lengths yet, or if ``width`` is too small.

    Bars beyond the length ``cut_at`` are hatched, and the axis has a mark at this length. If no sample is
    longer, or if ``cut_at`` is None, there are no hatched bars and no mark.
    """
    bins = lengths.histogram if lengths else ()
    most = max((bin_.count for bin_ in bins), default=0)
    gutter = len(f"{most:,}") + 1
    width = min(width - gutter, _MAX_HISTOGRAM)
    if not bins or width < 8:
        return []
    edges = [0, *(bin_.up_to for bin_ in bins)]
    cut = width if cut_at is None else _column(edges, cut_at, width)
    counts = [bins[column * len(bins) // width].count or None for column in range(width)]
    lines = []
    for number, row in enumerate(blocks(counts, 0.0, most, max(1, height - 1))):
        scale = f"{'│' if number else f'{most:,}┤':>{gutter}}"
        hatched = row[cut:].translate(_HATCHED)
        lines.append(Content.assemble((scale, "dim"), (row[:cut], "$training"), (hatched, "$warning")))
    axis = Content.styled(f"{'└':>{gutter}}", "dim") + _axis(edges, cut_at, cut, width)
    return [*lines, axis]


def _column(edges: list[int], length: int, width: int) -> int:
    """Return the column of a length on the axis, or ``width`` if the length is not below the last edge.

    Each bin, between two edges, has the same number of columns.
    """
    for number, (low, high) in enumerate(pairwise(edges)):
        if length < high:
            return round((number + (length - low) / (high - low)) * width / (len(edges) - 1))
    return width


def _axis(edges: list[int], cut_at: int | None, cut: int, width: int) -> Content:
    """Return the axis below the histogram, with round lengths, the longest length, and the length at which
    samples are cut: ``0────500────✂ 1,024──2,300``. ``cut``: the column of ``cut_at``.
    """
    tail = len(edges) > 2 and edges[-1] - edges[-2] > edges[1]
    end = f"{'⋯ ' if tail else ''}{edges[-1]:,}"
    mark = f"✂ {cut_at:,}" if cut_at is not None and cut < width else ""
    line = ["─"] * width

    def put(text: str, at: int) -> bool:
        """Write a label that starts at this column, unless it would overlap another label or run past the end
        of the axis. Return whether the label was written.
        """
        around = line[max(0, at - 1) : at + len(text) + 1]
        is_free = 0 <= at <= width - len(text) and set(around) <= {"─", " "}
        if is_free:
            line[at : at + len(text)] = text
        return is_free

    place = min(max(2, cut), width - len(mark))
    is_marked = bool(mark) and put(mark, place)
    put(f" {end}", width - len(end) - 1)
    for value, label in ticks(Axis(0, edges[-1]), max(1, width // 10)):
        put(label, _column(edges, round(value), width))
    text = "".join(line)
    if not is_marked:
        return Content.styled(text, "dim")
    return Content.assemble(
        (text[:place], "dim"), (mark, "$warning bold"), (text[place + len(mark) :], "dim")
    )


def cost_table(costs: list[LengthCost], width: int) -> Content:
    """Return a table of the costs, with a line for each maximum length. The line for the recipe's
    maximum length is marked. If there are no costs, return empty text.
    """
    if not costs:
        return Content("")
    timed = width >= _TIMED_WIDTH and any(cost.seconds is not None for cost in costs)

    def verdict(cost: LengthCost) -> Content:
        if cost.verdict is None or cost.verdict.word == "fits":
            return Content("")
        word, style = verdict_words(cost.verdict)
        room = width - (46 if timed else 34)
        return Content.styled(word, style) if len(word) <= room else verdict_sign(cost.verdict)

    def in_weight(text: Callable[[LengthCost], str]) -> Callable[[LengthCost], Content]:
        return lambda cost: Content.styled(text(cost), "bold" if cost.name == "now" else "")

    def name(cost: LengthCost) -> str:
        return f"{'●' if cost.name == 'now' else ' '} {cost.name:<5}{cost.length:>8,}"

    columns = [
        Column(title="  max length", text=in_weight(name), width=15),
        Column(
            title="whole", text=in_weight(lambda cost: format_percent(cost.whole)), width=6, right=True, gap=0
        ),
        Column(
            title="needs",
            text=in_weight(lambda cost: needed_words(cost.verdict) if cost.verdict else "NA"),
            width=9,
            right=True,
        ),
        Column(text=verdict),
    ]
    if timed:
        seconds = in_weight(lambda cost: format_duration(cost.seconds))
        columns.insert(3, Column(title="time", text=seconds, width=12, right=True, gap=0))
    return Content("\n").join(table(columns, costs, width))
