"""Curves, axes and marks, whatever the numbers; columns of tables."""

from __future__ import annotations

import math
import random
import re
from array import array
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.segment import Segment
from textual.content import Content
from textual.strip import Strip

from qlora_tui.tui.render.columns import Column, cut_sentence, table
from qlora_tui.tui.render.loss import SMOOTHED, TRAINING_STYLE, VALIDATION_STYLE, LossFacts, run_plot
from qlora_tui.tui.render.plot import (
    LEAST_CHART,
    Axis,
    Curve,
    Mark,
    Plot,
    loss_axis,
    plot,
    rounded,
    so_far,
    ticks,
)
from qlora_tui.tui.render.series import (
    MAX_POINTS,
    NOT_A_NUMBER,
    DecimatedSeries,
    Envelope,
    local_fits,
    smooth,
)
from qlora_tui.tui.screens.train.step_charts import StepChart, graph_lines
from qlora_tui.tui.terminal_app import changed_cells

ANY_FLOATS = st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=600)


def envelope_of(values: list[float], most: int = MAX_POINTS) -> Envelope:
    history = DecimatedSeries(most=most)
    history.extend(range(len(values)), values)
    return history.envelopes()[0]


def drawn(envelope: Envelope, x: Axis, y: Axis, width: int = 40, height: int = 8) -> list[str]:
    return [line.plain for line in plot(Plot(x, y, (Curve(envelope, "loss", ""),)), width, height)]


@given(ANY_FLOATS, st.integers(2, 40), st.integers(0, 600))
def test_a_decimated_curve_tells_the_extremes_of_every_stretch(
    values: list[float], most: int, low: int
) -> None:
    history = DecimatedSeries(most=most)
    history.extend(range(len(values)), values)
    envelope = history.envelopes(low)[0]
    ends = [round(x) for x in envelope.xs]
    length, whole = 1, list(range(len(values)))
    while len([end for end in whole if end >= low]) > most:
        length *= 2
        whole = list(range(length - 1, len(values), length))
    # What may hold a value before ``low`` is left out.
    shown = [end for end in whole if end >= low][int(length > 1 and low > 0) :]
    rest = [len(values) - 1] if len(values) % length and low < len(values) else []
    assert ends == shown + rest
    for number, end in enumerate(ends):
        part = values[end // length * length : end + 1]
        finite = [value for value in part if math.isfinite(value)]
        assert envelope.lows[number] == min(finite, default=math.inf)
        assert envelope.highs[number] == max(finite, default=-math.inf)
        assert envelope.broken[number] == (len(finite) < len(part))


@given(ANY_FLOATS, st.integers(4, 120), st.integers(3, 40))
def test_no_column_of_numbers_can_crash_a_graph(values: list[float], width: int, height: int) -> None:
    envelope = envelope_of(values)
    low, high = envelope.low, envelope.high
    y = rounded(low, high) if low is not None and high is not None else Axis(0, 1)
    lines = drawn(envelope, so_far(len(values), len(values)), y, width, height)
    assert len(lines) == height


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_an_axis_holds_its_values_and_has_distinct_labels(low: float, spread: float) -> None:
    axis = rounded(low, low + spread)
    slack = 1e-6 * (axis.high - axis.low)
    assert axis.low - slack <= low and low + spread <= axis.high + slack
    texts = [text for _, text in ticks(axis, 5)]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(("steps", "labels"), [(1, ["0", "1"]), (3, ["0", "1", "2", "3"])])
def test_a_short_run_has_no_half_steps(steps: int, labels: list[str]) -> None:
    assert [text for _, text in ticks(so_far(steps, steps, "step"), 8)] == labels


def test_the_axis_of_steps_ends_just_after_the_last_step() -> None:
    ends = [so_far(done, 3000).high for done in (3, 11, 140, 1240, 1499, 1500, 1990, 3000, 3001)]
    assert ends == [10, 11, 140, 1250, 1500, 1500, 2000, 3000, 3100]
    assert so_far(1240, 3000, start=900) == Axis(900, 1240, named=1240)
    curve = Curve(Envelope.of_points([0.0, 1240.0], [2.0, 1.0]), "", "red")
    for done, end in ((1240, "1,000     step 1,240"), (1210, "step 1,210"), (3, "8               10")):
        foot = plot(Plot(so_far(done, 3000, "step"), Axis(1, 2), (curve,)), 90, 9)[-1].plain
        assert foot.endswith(end) and f"step {done:,}" in foot


def test_nan_is_marked_at_the_bottom_without_a_line() -> None:
    values = [1.0] * 40
    values[20:24] = [math.nan, math.inf, -math.inf, math.nan]
    lines = drawn(envelope_of(values), Axis(0, 40, "step"), Axis(0, 2, "loss"))
    assert NOT_A_NUMBER in lines[-2]
    gap = lines[-2].index(NOT_A_NUMBER)
    assert all(line[gap] in " ┈×" for line in lines[1:-1])


def test_a_nan_curve_is_marked_and_an_empty_one_unscaled() -> None:
    nothing = Plot(
        Axis(0, 9, "step"), Axis(0, 1, "loss"), (Curve(Envelope(), "", ""),), empty="No steps yet."
    )
    lines = [line.plain for line in plot(nothing, 40, 8)]
    assert "".join(lines).split() == ["No", "steps", "yet."]
    broken = Plot(nothing.x, nothing.y, (Curve(envelope_of([math.nan] * 9), "", ""),), empty="No steps yet.")
    text = "\n".join(line.plain for line in plot(broken, 40, 8))
    assert NOT_A_NUMBER in text and "No steps yet." not in text


@pytest.mark.slow
def test_a_million_steps_cost_no_more_than_ten_thousand() -> None:
    luck = random.Random(1)
    points = []
    for steps in (10_000, 1_000_000):
        history = DecimatedSeries()
        history.extend(range(steps), array("d", (luck.random() for _ in range(steps))))
        envelope = history.envelopes()[0]
        axis = so_far(float(steps), float(steps))
        assert len(drawn(envelope, axis, Axis(0, 1), 160, 40)) == 40
        points.append(len(envelope.xs))
    assert points[1] < 1.5 * points[0] and points[1] <= MAX_POINTS, points


def test_a_graph_zoomed_past_a_spike_is_rid_of_it() -> None:
    values = array("d", [2.0]) * 100_000
    values[50_001] = 90.0
    history = DecimatedSeries()
    history.extend(range(100_000), values)
    assert history.envelopes(50_001)[0].high == history.envelopes(50_010)[0].high == 2.0
    assert history.envelopes(49_000)[0].high == history.envelopes()[0].high == 90.0


@pytest.mark.slow
def test_a_curves_memory_grows_with_the_logarithm_of_its_length() -> None:
    def held_bytes(steps: int) -> int:
        history = DecimatedSeries(columns=5, most=64)
        for start in range(0, steps, 1000):
            history.extend(range(start, start + 1000), *[array("d", [1.0]) * 1000] * 5)
        return sum(len(level.xs) for level in history._levels)

    few, many = held_bytes(10_000), held_bytes(160_000)
    assert many - few <= 4 * 2 * 64


@given(st.lists(st.lists(st.floats(-9, 9), max_size=200), max_size=6), st.integers(5, 60))
def test_a_growing_curve_equals_one_drawn_at_once(pieces: list[list[float]], most: int) -> None:
    history, values = DecimatedSeries(most=most), list[float]()
    for piece in pieces:
        history.extend(range(len(values), len(values) + len(piece)), piece)
        values += piece
        assert len(history) == len(values)
        for low in (0, len(values) // 2, len(values) - most // 2):
            at_once = DecimatedSeries(most=most)
            at_once.extend(range(len(values)), values)
            assert history.envelopes(low) == at_once.envelopes(low)


@pytest.mark.parametrize("steps", [2, 7, 900, 10_000])
def test_a_linear_fall_is_smoothed_exactly_up_to_both_ends(steps: int) -> None:
    line = [3 - 2 * step / steps for step in range(1, steps + 1)]
    assert list(smooth(line, 100.0)) == pytest.approx(line)
    history, xs = DecimatedSeries(columns=2), [float(step) for step in range(1, steps + 1)]
    history.extend(xs, line, xs)
    loss, step = history.envelopes()
    fits = local_fits(step.means, loss.means, 100.0, at=loss.xs)
    assert list(fits) == pytest.approx([line[round(x) - 1] for x in loss.xs])
    assert loss.xs[-1] == steps


def test_smoothing_removes_noise_and_skips_what_is_not_a_number() -> None:
    luck, steps = random.Random(1), 3_000
    line = [1 + 2 * math.exp(-step / 1_000) for step in range(steps)]
    smoothed = smooth([loss + luck.gauss(0, 0.1) for loss in line], 100.0)
    errors = [fit - loss for fit, loss in zip(smoothed, line, strict=True)]
    assert sum(error * error for error in errors) / steps < 0.02**2
    assert abs(smoothed[-1] - line[-1]) < 0.04
    first, *others = smooth([math.nan, 2.0, math.nan, 1.0, math.inf], 100.0)
    assert math.isnan(first) and others == pytest.approx([2.0, 1.5, 1.0, 1.0])
    assert all(map(math.isnan, smooth([math.nan] * 3, 9.0)))


def test_only_the_cells_that_changed_are_painted() -> None:
    old = Strip([Segment("loss 1.25 "), Segment("step 10")])
    new = Strip([Segment("loss 1.31 "), Segment("step 10")])
    assert changed_cells(old, new) == (7, 9)
    assert changed_cells(old, old) == (0, 0)


SPIKE = Envelope(
    tuple(float(step) for step in range(101)),
    tuple(9.0 if step == 60 else 1.0 for step in range(101)),
    tuple(9.0 if step == 60 else 1.0 for step in range(101)),
    (False,) * 101,
)


def drawn_with(width: int, height: int) -> list[str]:
    plot = Plot(Axis(0, 100, "step"), Axis(0, 10, "loss"), (Curve(SPIKE, SMOOTHED, ""),))
    charts = (StepChart("lr", "1e-4", SPIKE, 10.0), StepChart("tok/s", "12,345", SPIKE, 10.0))
    return [line.plain for line in graph_lines(plot, charts, width, height)]


def test_a_spike_has_one_column_in_graph_and_charts() -> None:
    lines = drawn_with(80, 24)
    assert len(lines) == 24
    tips = [at for line in lines[1:-3] for at, each in enumerate(line[14:], 14) if each not in " ┈"]
    tops = [line.index(max(line, key="▁▂▃▄▅▆▇█".find)) for line in lines[-3:-1]]
    assert tops == [tips[0]] * 2


@pytest.mark.parametrize(("height", "width"), [(1, 78), (LEAST_CHART - 1, 78), (1, 60)])
def test_below_five_rows_a_chart_is_one_line_of_words_and_blocks(height: int, width: int) -> None:
    steps = [float(step) for step in range(1, 82)]
    losses = [*(2.531 + 2.869 * (1 - step / 81) ** 3 for step in steps)]
    evaluations = [(0, 5.006), (30, 2.9), (60, 2.781), (81, 2.784)]
    facts = LossFacts(
        x=Axis(0, 81, "step"),
        loss=Envelope(),
        mean_loss=Envelope.of_points(steps, losses),
        last_mean=losses[-1],
        evaluations=evaluations,
        best=(60, 2.781),
    )
    words, *blank = (line.plain for line in plot(run_plot(facts), width, height))
    assert len(blank) == height - 1 and not any(blank) and len(words) <= width
    without = "train 5.295 → 2.531  val 5.006 → 2.784  ★ best 2.781 at 60"
    assert re.sub(" [▁▂▃▄▅▆▇█]+", "", words) == without
    assert (words == without) == (width == 60) and (width == 60 or "2.784 █▁▁▁  ★" in words)


def test_a_small_change_of_the_loss_is_no_cliff_and_labels_have_the_decimals_of_their_distance() -> None:
    steps = tuple(range(9))
    losses = tuple(6.261 - 0.0005 * step for step in steps)
    curve = Envelope.of_points([float(step) for step in steps], losses)
    facts = LossFacts(
        x=Axis(0, 8, "step"),
        loss=curve,
        mean_loss=curve,
        last_mean=losses[-1],
        evaluations=((0, 6.2605), (8, 6.257)),
        best=(8, 6.257),
    )
    shown = run_plot(facts)
    assert shown.y.high - shown.y.low >= 0.05 * 6.26
    legend, *graph, _ = (line.plain for line in plot(shown, 70, 16))
    labels = [line[:5].strip() for line in graph if line[:5].strip()]
    for numbers, decimals in ((re.findall(r"\d+\.\d+", legend), 3), (labels, 1)):
        assert numbers and {len(number.partition(".")[2]) for number in numbers} == {decimals}, numbers


def test_the_axis_fits_the_mean_and_leaves_out_a_spike_of_one_step() -> None:
    steps = [0.0, 1.0, 2.0]
    facts = LossFacts(
        x=Axis(0, 2, "step"),
        loss=Envelope.of_points(steps, [2.0, 90.0, 2.0]),
        mean_loss=Envelope.of_points(steps, [2.0, 2.5, 2.2]),
        last_mean=2.2,
        evaluations=((0, 3.0),),
        best=None,
    )
    shown = run_plot(facts)
    assert 3.0 <= shown.y.high < 4
    points = replace(shown, curves=shown.curves[:1], marks=())
    drawn = "".join(line.plain for line in plot(points, 40, 12)[1:])
    assert sum("⠀" < each <= "⣿" for each in drawn) == 2


@pytest.mark.parametrize(("low", "height"), [(0.0, 20), (0.0, 12), (6.0, 20)])
def test_a_fill_is_under_its_line_if_the_axis_begins_at_zero_and_rows_are_many(
    low: float, height: int
) -> None:
    steps = [float(step) for step in range(40)]
    losses = [low + 4 + 3.9 * math.cos(step / 4) for step in steps]
    curve = Curve(Envelope.of_points(steps, losses), "", "red", fill="blue")
    lines = plot(Plot(Axis(0, 39), Axis(low, low + 8), (curve,)), 30, height)[1:-1]
    for column in range(4, lines[0].cell_length):
        filled = [
            any("blue" in str(span.style) and span.start <= column < span.end for span in line.spans)
            for line in lines
        ]
        lowest = max(row for row, line in enumerate(lines) if "⠀" < line.plain[column] <= "⣿")
        has_fill = low == 0 and height == 20
        assert filled == [has_fill and row > lowest for row in range(len(lines))]


ROWS = [("qwen2.5-7b-tickets-1", 12), ("owls", 3_400)]
COLUMNS = (
    Column[tuple[str, int]](title="name", text=lambda row: row[0], fills=True, width=8),
    Column[tuple[str, int]](title="rows", text=lambda row: f"{row[1]:,}", right=True),
    Column[tuple[str, int]](text=lambda row: Content.styled("✓", "$success"), shown_from=40),
)


def _plain(width: int) -> list[str]:
    return [line.plain.rstrip() for line in table(COLUMNS, ROWS, width)]


def test_the_column_that_fills_takes_what_the_others_leave() -> None:
    assert _plain(30) == [
        "name                      rows",
        "qwen2.5-7b-tickets-1        12",
        "owls                     3,400",
    ]


def test_names_are_cut_in_their_middle_and_columns_without_room_are_left_out() -> None:
    assert [line[-1] for line in _plain(40)[1:]] == ["✓", "✓"]
    narrow = _plain(20)
    assert max(map(len, narrow)) == 20
    assert narrow[1].startswith("qwen2") and "…" in narrow[1] and narrow[1].split("…")[1].startswith("1 ")


@pytest.mark.parametrize("height", range(LEAST_CHART, 60))
@pytest.mark.parametrize(("low", "high"), [(2.1, 5.9), (1.21, 2.93), (1.28, 2.71), (2.4, 5.5)])
def test_a_chart_is_filled_by_its_curve_and_its_labels_have_the_same_rows_between_them(
    height: int, low: float, high: float
) -> None:
    curve = Curve(Envelope.of_points([0.0, 50.0], [high, low]), "loss", "")
    lines = plot(Plot(so_far(50, 81, "step"), loss_axis(low, high), (curve,)), 80, height)[1:-1]
    rows = [row for row, line in enumerate(lines) if "┈" in line.plain]
    assert len(rows) > 1 and len({after - before for before, after in pairwise(rows)}) == 1
    labeled = [row for row, line in enumerate(lines) if line.plain[:4].strip()]
    assert labeled == rows, "each label is round and has its grid line"
    used = [number for number, line in enumerate(lines) if any("⠀" < each <= "⣿" for each in line.plain)]
    assert len(used) > 0.7 * len(lines) - 1
    assert height < 12 or used[-1] <= rows[-1] + 1


def dots_of(lines: list[Content], style: str) -> dict[int, set[int]]:
    """The rows of dots by column of cells, of what is drawn in a color."""
    rows: dict[int, set[int]] = {}
    for row, line in enumerate(lines):
        for span in line.spans:
            for column in range(span.start, span.end):
                bits = ord(line.plain[column]) - 0x2800
                if str(span.style) == style and 0 < bits < 256:
                    inside = (dot for dot, mask in enumerate((0x09, 0x12, 0x24, 0xC0)) if bits & mask)
                    rows.setdefault(column, set()).update(4 * row + dot for dot in inside)
    return dict(sorted(rows.items()))


@pytest.mark.parametrize("height", range(LEAST_CHART, 41))
def test_a_mark_is_in_the_cell_of_its_value_and_lines_between_unlike_marks_are_not_flat(
    height: int,
) -> None:
    points = [(float(x), 4 + 1.9 * math.sin(x)) for x in range(0, 60, 7)]
    curve = Curve(Envelope.of_points(*map(list, zip(*points, strict=True))), "", "red", look="dotted")
    marks = tuple(Mark(*point, "blue", "★" if point == points[3] else "○") for point in points)
    shown = Plot(Axis(0, 60), Axis(2, 6), (curve,), marks)
    lines = plot(shown, 90, height)
    body = lines[1:-1]
    labels = {
        row: float(found[1])
        for row, line in enumerate(body)
        if (found := re.match(r" *(\d+\.?\d*) ", line.plain))
    }
    (top, high), *_, (bottom, low) = labels.items()
    line = dots_of(body, "red dim")
    blocks = dict(
        sorted(
            (column, set(range(4 * row, 4 * row + 4)))
            for row, each in enumerate(body)
            for column, character in enumerate(each.plain)
            if character in "○★"
        )
    )
    assert len(blocks) == len(points)
    rows = []
    for dots, (_, value) in zip(blocks.values(), points, strict=True):
        assert len(dots) <= 4 and max(dots) - min(dots) < 4
        exact = 4 * (top + 0.5 + (high - value) / (high - low) * (bottom - top))
        rows.append(exact)
        assert min(dots) - 1e-6 <= exact <= max(dots) + 1 + 1e-6
    for (here, there), (left, right) in zip(pairwise(rows), pairwise(blocks), strict=True):
        between = set().union(*(line.get(column, set()) for column in range(left + 1, right)))
        if len(body) < 14:
            assert not between, "the dots of two lines in few rows would merge"
            continue
        assert between and (len(between) > 1 or abs(here - there) < 4)


@given(
    st.lists(st.floats(1.0, 4.0), min_size=2, max_size=8),
    st.lists(st.floats(1.0, 4.0), min_size=2, max_size=40),
    st.integers(7, 30),
    st.integers(40, 120),
)
def test_the_smoothed_line_is_solid_and_every_other_dash_of_shared_cells_is_validation(
    validation: list[float], smoothed: list[float], height: int, width: int
) -> None:
    def over_all(losses: list[float]) -> list[float]:
        return [100 * number / (len(losses) - 1) for number in range(len(losses))]

    evaluations = [(round(step), loss) for step, loss in zip(over_all(validation), validation, strict=True)]
    facts = LossFacts(
        x=Axis(0, 100, "step"),
        loss=Envelope(),
        mean_loss=Envelope.of_points(over_all(smoothed), smoothed),
        last_mean=smoothed[-1],
        evaluations=evaluations,
        best=evaluations[-1],
    )
    shown = run_plot(facts)
    *lines, foot = plot(shown, width, height)[1:]
    gutter = foot.plain.index("0")
    alone = {
        curve.name: plot(replace(shown, curves=(curve,), marks=()), width, height)[1:-1]
        for curve in shown.curves
    }
    stars = 0
    for row, line in enumerate(lines):
        styles = {place: str(span.style) for span in line.spans for place in range(span.start, span.end)}
        for column, text in enumerate(line.plain):
            dots = {
                name: ord(each) - 0x2800
                for name, drawn in alone.items()
                if "⠀" < (each := drawn[row].plain[column : column + 1]) <= "⣿"
            }
            stars += text == "★"
            if styles.get(column) == f"{VALIDATION_STYLE} bold":
                assert text in "★○", "a mark is whole, whatever is drawn below it"
            elif "smoothed" in dots:
                assert (ord(text) - 0x2800) & dots["smoothed"] == dots["smoothed"]
                has_both = "validation" in dots and (column - gutter) // 2 % 2 == 0
                assert styles[column] == (f"{VALIDATION_STYLE} dim" if has_both else TRAINING_STYLE)
            elif dots:
                assert styles[column].startswith(VALIDATION_STYLE)
    assert stars <= 1 and (stars or max(map(abs, map(float.__sub__, smoothed, smoothed[1:]))) > 0.3)
    columns = dots_of(alone["smoothed"], TRAINING_STYLE)
    assert set(columns) >= set(range(min(columns), max(columns) + 1))


@pytest.mark.parametrize("best", [(76, 2.902), (95, 2.915)], ids=["before the end", "at the end"])
def test_the_legend_names_the_best_evaluation_in_every_window(best: tuple[int, float]) -> None:
    curve = Envelope.of_points([0.0, 95.0], [4.5, 2.1])
    facts = LossFacts(
        x=Axis(0, 95, "step"),
        loss=curve,
        mean_loss=curve,
        last_mean=2.079,
        evaluations=((0, 4.57), (76, 2.902), (95, 2.915)),
        best=best,
        more=(("showing 1 in 16 steps", "dim"),),
    )
    legend = plot(run_plot(facts), 70, 12)[0].plain
    assert "smoothed 2.079" in legend and "★ best" in legend and f"{best[1]} at {best[0]}" in legend
    assert legend.endswith("· step") and ("validation  ·" in legend) == (best[0] == 95)


def test_a_column_that_shrinks_is_no_wider_than_its_texts() -> None:
    first = Column[str](text=lambda row: row[:2], shrinks=True, min_width=6)
    (line,) = table((first, Column[str](text=str, shrinks=True)), ["abcdefghijkl"], 10)
    assert line.plain.startswith("ab  ab") and line.cell_length == 10


@pytest.mark.parametrize(
    ("width", "text"),
    [
        (40, "RTX 4090, 24,564 MiB; attention: sdpa"),
        (36, "RTX 4090, 24,564 MiB"),
        (19, "RTX 4090"),
        (7, "RTX 40…"),
    ],
)
def test_a_sentence_is_cut_after_a_clause_that_fits_or_else_at_its_end(width: int, text: str) -> None:
    column = Column[str](text=str, shrinks=True, is_sentence=True)
    (line,) = table((column,), ["RTX 4090, 24,564 MiB; attention: sdpa"], width)
    assert line.plain.rstrip() == text
    assert cut_sentence(Content("Probably killed: it ended."), 20).plain == "Probably killed"
    assert cut_sentence(Content("step 0: loss 2, best"), 20).plain == "step 0: loss 2, best"


def test_columns_are_left_out_in_their_order_before_one_is_narrower_than_its_least() -> None:
    columns = (
        Column[str](title="name", text=str, shrinks=True, min_width=4),
        Column[str](title="first", text=lambda row: "1" * 6, dropped=1),
        Column[str](title="second", text=lambda row: "2" * 6, dropped=2),
        Column[str](title="same", text=lambda row: "3", shown_if_same=False),
    )
    titles = {
        width: table(columns, ["abcdefgh", "ijkl"], width)[0].plain.split() for width in (24, 18, 12, 5)
    }
    assert titles == {
        24: ["name", "first", "second"],
        18: ["name", "second"],
        12: ["name", "second"],
        5: ["name"],
    }
    assert max(line.cell_length for line in table(columns, ["abcdefgh", "ijkl"], 3)) == 3
