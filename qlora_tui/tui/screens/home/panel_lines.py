"""The lines of Home's panels, formatted from what ``reader`` has read.

Import this module only after the first frame has been painted, since its own imports take a long time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from textual.content import Content

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.formatting import (
    capitalize,
    format_bytes,
    format_count,
    format_duration,
    format_gib,
    format_loss,
    format_percent,
    format_points,
    format_power,
    format_progress,
    format_rate,
    format_reading,
    format_speed,
    short_model_name,
)
from qlora_tui.gpu.metrics import GpuDevice, GpuMetrics
from qlora_tui.memory.budget import MemoryBudget
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import phase_label
from qlora_tui.runs.expected_time import Forecast
from qlora_tui.runs.main_settings import setting_words, shared_settings
from qlora_tui.runs.run_summary import RunSummary, data_words
from qlora_tui.runs.servers import ServerStatus
from qlora_tui.runs.status import ACTIVE, BROKEN, Status, held_words
from qlora_tui.tui.key_names import highlight_keys, key_name
from qlora_tui.tui.render.columns import Column, Fact, fact_lines, hanging, table
from qlora_tui.tui.render.figures import Figure, fact, figure_line, large_figures
from qlora_tui.tui.render.labels import (
    CANNOT_TRAIN,
    batch_words,
    best_figure,
    cut_cells,
    format_ago,
    lora_words,
    progress_figures,
    recipe_fit,
    recipe_line,
    result_label,
    verdict_content,
)
from qlora_tui.tui.render.loss import changes_of_loss, mean_losses, validation_lines
from qlora_tui.tui.render.meters import bar, labeled, meter
from qlora_tui.tui.screens.home.next_step import Steps
from qlora_tui.tui.screens.runs.run_list import short_name
from qlora_tui.tui.system_status import Host, SystemStatus, read_host
from qlora_tui.tui.workbench import Workbench

_LEAST_NAME, _MAX_NAME_WIDTH = 20, 44
"""Minimum and maximum width of a run's or model's name in the list of runs, in cells."""
_FELL = "bold $validation"
"""Style of the percentage by which the validation loss of a run fell."""
_LABEL = 8
"""Width of the label before a bar, in cells."""
_OUTCOME_CELLS = 26
"""Maximum width of a run's outcome in the list of runs, in cells."""
_MIN_WIDTH_FOR_BARS, _MIN_WIDTH_FOR_MODELS = 90, 140
"""Minimum width, in cells, at which the list of runs shows the changes of validation losses
(:func:`changes_of_loss`), and at which it also shows models and settings.
"""
_MAX_EVALUATIONS = 16


@dataclass(frozen=True)
class HomeLayout:
    """Widths of the text in Home's panels, in cells, and whether the panels are compact or large."""

    wide: int
    """Width of the text in panels that are as wide as the window."""
    left: int
    right: int
    is_compact: bool
    """Whether panels have no borders and as few lines as possible."""
    is_large: bool = False
    """Whether there is room for large digits."""


def gpu_lines(
    system_status: SystemStatus, budget: MemoryBudget, width: int, *, is_compact: bool
) -> list[Content]:
    """Return lines about the GPU: its name, utilization and memory. If there is no GPU, the lines say so,
    and say either that training runs on the CPU or which device the memory estimates are for. Unless
    ``is_compact``, lines about the machine's memory and disk follow.

    Args:
        system_status: The latest readings.
        budget: The device that memory estimates are for.
        width: Width of a line, in cells.
        is_compact: Whether to return as few lines as possible.
    """
    gpu, metrics = system_status.gpu, system_status.gpu_metrics
    problem = system_status.gpu_problem
    if gpu is None:
        title = capitalize(system_status.no_gpu_title)
        where = f"Estimates: {budget.name}."
        if system_status.trains_on == budget.device.kind:
            where = "Training runs on the CPU, slowly."
        lines = [Content.assemble((title, "bold"), (f"   {where}" if is_compact else "", "dim"))]
        reasons = [] if is_compact else [where]
        lines += [Content.styled(text, "dim") for text in (*reasons, system_status.no_gpu_reason) if text]
    elif metrics is None or problem is not None:
        title, reason = "does not respond", system_status.no_gpu_reason
        if metrics is not None and problem is not None:
            title, reason = problem.title, problem.what
        head = Content.assemble((gpu.short_name, "bold"), (f"   {title}", "$warning"))
        lines = [head, Content.styled(reason, "dim")]
    else:
        use = format_reading(metrics.utilization_percent)
        temperature = "NA" if metrics.temperature_c is None else f"{metrics.temperature_c} °C"
        power = "" if metrics.power_w is None else f"   {format_power(metrics.power_w)} W"
        used, total = metrics.memory_used_bytes, metrics.memory_total_bytes
        memory = f"{format_gib(used)} of {format_gib(total)} GiB"
        share = used / total if used is not None and total else None
        if is_compact:
            drawn = "" if share is None else f"{bar(share, 16)} "
            text = f"   util {use}   {drawn}{memory}   {temperature}"
            return [Content.assemble((gpu.short_name, "bold"), text)]
        lines = [
            Content.assemble((gpu.short_name, "bold"), (f"   {temperature}{power}", "dim")),
            meter("util", (metrics.utilization_percent or 0) / 100, use, _LABEL, width),
            meter("memory", share or 0.0, memory, _LABEL, width),
            *map(_short_gpu_line, system_status.other_gpus, system_status.other_gpu_metrics),
        ]
    return lines if is_compact else [*lines, *_host_lines(system_status.host or read_host(), width)]


def _short_gpu_line(gpu: GpuDevice, metrics: GpuMetrics | None) -> Content:
    """Return a GPU's name, utilization and memory in one line: ``RTX 3060   80%  7.1 of 12.0 GiB``. If
    ``metrics`` is None, the line says that the GPU does not respond.
    """
    if metrics is None:
        return Content.assemble((gpu.short_name, "bold"), ("   does not respond", "$warning"))
    use = format_reading(metrics.utilization_percent)
    memory = f"{format_gib(metrics.memory_used_bytes)} of {format_gib(metrics.memory_total_bytes)} GiB"
    return Content.assemble((gpu.short_name, "bold"), f"   {use}  {memory}")


def other_run_line(name: str, status: Status, width: int) -> Content:
    """Return a line of at most ``width`` cells about one of the runs in :attr:`SystemStatus.also_active`,
    with its phase and progress: ``● crows training 12% step 36 of 300``.
    """
    sign, _, style = result_label(status, None)
    steps = ""
    if status.total_steps:
        share = format_percent(status.step / status.total_steps)
        steps = f"  {share}  step {format_progress(status.step, status.total_steps)}"
    word = phase_label(status.phase or status.state)
    name = cut_cells(name, max(0, width - len(f"{sign}   {word}{steps}")))
    return Content.assemble((f"{sign} ", style), (name, "bold"), "  ", (word, style), steps)


def machine_line(system_status: SystemStatus, budget: MemoryBudget, width: int) -> Content:
    """Return one line with compact texts about the GPUs, followed by the machine's free memory and free disk
    space. If the line is too long, parts at its end are left out.
    """
    lines = gpu_lines(system_status, budget, width, is_compact=True)
    if system_status.gpu is not None and system_status.gpu_problem is None and system_status.other_gpus:
        gpus = (system_status.gpu, *system_status.other_gpus)
        readings = (system_status.gpu_metrics, *system_status.other_gpu_metrics)
        lines = list(map(_short_gpu_line, gpus, readings))
    host = system_status.host or read_host()
    free = [f"RAM {format_gib(host.available_bytes)} of {format_gib(host.memory_bytes)} GiB free"]
    if host.disk_free_bytes is not None:
        free.append(f"disk {format_gib(host.disk_free_bytes)} GiB free")
    parts = [*lines, *(Content.styled(text, "dim") for text in free)]
    while len(parts) > 1 and sum(part.cell_length + 3 for part in parts) > width:
        parts.pop()
    return Content("   ").join(parts)


def _host_lines(host: Host, width: int) -> list[Content]:
    """Return lines with the memory of the machine, and the free space on the disk that stores the runs."""
    used = host.memory_bytes - host.available_bytes
    disk = "NA" if host.disk_free_bytes is None else f"{format_gib(host.disk_free_bytes)} GiB free"
    text = f"{format_gib(used)} of {format_gib(host.memory_bytes)} GiB"
    return [meter("RAM", used / host.memory_bytes, text, _LABEL, width), labeled("disk", disk, _LABEL)]


def server_line(server: ServerStatus) -> Content:
    """Return a line with a server's address, and its speed or state."""
    speed = f"{server.tokens_per_s:,.0f} tokens/s" if server.tokens_per_s else server.state
    address = server.address.removeprefix("http://").removesuffix("/v1")
    return labeled("server", f"{address} · {speed}", _LABEL)


def run_lines(
    summary: RunSummary,
    while_away: bool,
    now: float,
    layout: HomeLayout,
    waiting: Sequence[str] = (),
) -> list[Content]:
    """Return lines about the active or last run. The first line has the run's name and state. If the run is
    active, its progress and next events follow; if it has ended, its outcome follows.

    Args:
        summary: The run.
        while_away: Whether the run ended while the app was not in use.
        now: The current Unix time.
        layout: Widths of the panels.
        waiting: Names of the queued runs, the next run first.
    """
    status, width = summary.status, layout.left
    sign, word, style = result_label(status, summary.defect)
    if status.state in ACTIVE:
        word = phase_label(status.phase or status.state)
    if status.hold is not None:
        word = held_words(status)
    elif summary.defect is not None:
        word = f"{status.state}, {word}"
    head = Content.assemble((f"{sign} ", style), (summary.name, "bold"), "  ", (word, style))
    if status.state in ACTIVE:
        progress, figures = _progress_lines(summary, layout, waiting)
        if layout.is_compact and head.cell_length + 3 + figures[0].cell_length <= width:
            return [Content.assemble(head, "   ", figures[0]), progress]
        return [head, progress, *figures]
    lines = [head]
    if status.at:
        away = "  while you were away" if while_away else ""
        lines.append(Content.assemble(format_ago(status.at, now), (away, "$primary")))
    if sum(line.cell_length for line in lines) + 2 <= width:
        lines = [Content("  ").join(lines)]
    lines += _outcome_lines(summary, layout)
    if summary.verdict is not None and not summary.verdict.has_only_losses:
        lines.append(verdict_content(summary.verdict))
    if status.state in BROKEN and status.detail:
        lines.append(Content.styled(status.detail, "$error"))
    return lines


def _progress_lines(
    summary: RunSummary, layout: HomeLayout, waiting: Sequence[str]
) -> tuple[Content, list[Content]]:
    """Return a line with a run's progress bar, and lines with its loss, time left, and next events, such as
    an evaluation. Compact lines do not include the loss, which is also above the chart.
    """
    means = [] if layout.is_compact else mean_losses(summary)
    figures = progress_figures(means[-1] if means else None, summary.seconds_left)
    share, steps = 0.0, "preparing"
    if summary.total_steps:
        share = summary.step / summary.total_steps
        steps = f"{format_percent(share)}  step {format_progress(summary.step, summary.total_steps)}"
    drawn = bar(share, max(0, layout.left - len(steps) - 2))
    facts = []
    if summary.next_evaluation:
        is_due = summary.next_evaluation == summary.step
        following = fact("next evaluation at", f"{summary.next_evaluation:,}")
        facts.append(Content("evaluation due") if is_due else following)
    if waiting:
        facts.append(fact("then", waiting[0]))
    return Content.assemble((drawn, "$training"), f"  {steps}"), _figures(figures, facts, layout)


def _outcome_lines(summary: RunSummary, layout: HomeLayout) -> list[Content]:
    """Return lines about a run that has ended: its best loss, the loss before training, its steps, and the
    time that they took.
    """
    figures, facts = [], list[Content]()
    if summary.best is not None:
        loss, _ = summary.best
        figures.append(best_figure(loss, summary.loss_to_beat))
        for first_step, before in summary.evaluations[:1]:
            if not first_step and loss < before:
                change = f"{format_points(loss / before - 1)}%"
                figures.append(Figure(f"from {format_loss(before)}", change, _FELL, label_first=False))
    elif summary.loss is not None:
        figures.append(Figure("last training loss", format_loss(summary.loss)))
    if summary.loss_to_beat is not None:
        facts.append(Content(f"worse than before training ({format_loss(summary.loss_to_beat)})"))
    if summary.step < summary.total_steps:
        facts.append(fact("step", format_progress(summary.step, summary.total_steps)))
    if summary.seconds is not None:
        facts.append(fact("trained", format_duration(summary.seconds)))
    if summary.status.state in BROKEN:
        # The cause of the failure follows, and is more important than the loss.
        layout = replace(layout, is_large=False)
    return _figures(figures, facts, layout) if figures or facts else []


def _figures(figures: Sequence[Figure], facts: Sequence[Content], layout: HomeLayout) -> list[Content]:
    """Return figures, and as many facts as fit. If ``layout.is_large``, the figures are in large digits
    below an empty line, with the facts in their last line.
    """
    large = large_figures(figures) if layout.is_large and figures else []
    line = large[-1] if large else figure_line(figures)
    gap = 4 if large else 3
    while facts and line.cell_length + gap + Content("  ").join(facts).cell_length > layout.left:
        facts = facts[:-1]
    if facts:
        line = Content.assemble(line, " " * gap if figures else "", Content("  ").join(facts))
    return [Content(""), *large[:-1], line] if large else [line]


def recent_lines(summaries: Sequence[RunSummary], now: float, width: int, height: int) -> list[Content]:
    """Return a line for each of the first ``height`` runs, such as
    ``✓ qwen2.5-7b-tickets-20261123  best val. 1.290  at 03:12, 4 h ago``. ``now``: the current Unix time.
    """

    def sign(summary: RunSummary) -> Content:
        symbol, _, style = result_label(summary.status, summary.defect)
        return Content.styled(symbol, style)

    def outcome(summary: RunSummary) -> Content:
        if summary.failure:
            return Content(summary.failure)
        _, word, style = result_label(summary.status, summary.defect)
        best = "" if summary.best is None else f"best val. {format_loss(summary.best[0])}"
        return Content(best) if best and word == "finished" else Content.assemble((word, style), f"  {best}")

    def when(summary: RunSummary) -> str:
        at = summary.status.at
        if at and width < _MIN_WIDTH_FOR_BARS:
            return f"{format_duration(max(0.0, now - at))} ago"
        return format_ago(at, now) if at else ""

    changes = changes_of_loss(summaries[:height])
    shared = shared_settings(summary.settings for summary in summaries)
    columns: tuple[Column[RunSummary], ...] = (
        Column(text=sign),
        Column(
            text=lambda s: s.name,
            shrinks=True,
            min_width=_LEAST_NAME,
            max_width=_MAX_NAME_WIDTH,
            shorter=short_name,
            gap=1,
        ),
        Column(
            text=lambda s: s.model,
            max_width=_MAX_NAME_WIDTH,
            shown_from=_MIN_WIDTH_FOR_MODELS,
            shown_if_same=False,
        ),
        Column(
            text=lambda s: setting_words(s.settings, shared),
            max_width=_MAX_NAME_WIDTH,
            shown_from=_MIN_WIDTH_FOR_MODELS,
            shown_if_empty=False,
        ),
        Column(text=outcome, shrinks=True, min_width=15, max_width=_OUTCOME_CELLS, is_sentence=True),
        Column(text=lambda s: changes.get(s.id, ""), shown_from=_MIN_WIDTH_FOR_BARS, shown_if_empty=False),
        Column(text=when, style="dim"),
    )
    return table(columns, summaries[:height], width)


def queue_lines(waiting: tuple[str, ...]) -> list[Content]:
    """Return lines with the names of the first three queued runs, and the number of further queued runs.
    ``waiting``: ids in the order of the queue.
    """
    named = [RunDir(paths.runs_dir() / id_).name for id_ in waiting[:3]]
    shown = [Content(f"{number}. {name}") for number, name in enumerate(named, 1)]
    if len(waiting) > len(shown):
        shown.append(Content.styled(f"and {len(waiting) - len(shown)} more", "dim"))
    return shown


def recipe_lines(
    workbench: Workbench,
    budget: MemoryBudget,
    refusal: UserError | None,
    expected: Forecast | None,
    width: int,
    *,
    is_compact: bool,
    is_quiet: bool = False,
) -> list[Content]:
    """Return lines about the recipe being edited, its verdict on memory, and its expected time.

    Args:
        workbench: The recipe.
        budget: The memory that the recipe is compared with.
        refusal: Why the model cannot be trained; None if it can be.
        expected: The forecast of a run; None if unknown.
        width: Width of a line, in cells.
        is_compact: Whether to use as few lines as possible. If not, each item has its own line.
        is_quiet: Whether a run is active, which must stand out: warnings about the recipe are dim. With
            ``is_compact``, there are then at most two lines.
    """
    recipe, fit = workbench.recipe, recipe_fit(workbench, budget)
    compared, architecture = workbench.comparison(budget.device), workbench.architecture()
    memory: list[Content] = []
    if fit is not None:
        refused = None if refusal is None else Content.styled(f"✗ {CANNOT_TRAIN}", "$error")
        if is_compact:  # Compact lines share the width with the expected time.
            line = fit.draw(0, max_bar=0)
            memory = [line if refused is None else Content.assemble(line, "  ", refused)]
        else:
            head = Content.styled(f"{'memory':<{_LABEL}}", "dim")
            memory = hanging(head, fit.draw_wrapped(width - _LABEL), width)
            memory += [] if refused is None else [Content.assemble(" " * _LABEL, refused)]
    elif isinstance(compared, UserError) and recipe.model.id:
        memory = [Content.styled(f"{compared.what} {compared.fix}", "dim")]
    if is_compact:
        parts = list(memory)
        if expected is not None:
            duration, note = _time_words(expected)
            parts += _shortage(expected, width, is_quiet=is_quiet)
            known = (duration if expected.duration else "", note)
            parts.append(Content.styled("   ".join(filter(None, known)), "dim"))
        # The panel's title names the preset.
        parts = _joined([part for part in parts if part], width)
        lines = [Content(recipe_line(workbench, width, names_preset=False)), *parts]
        return lines[:2] if is_quiet else lines
    size = ""
    if not isinstance(architecture, UserError):
        size = f"{format_count(architecture.total_params)} parameters, {architecture.layers} layers"
    rate = f"learning rate {format_rate(recipe.training.learning_rate)}"
    rows = [
        ("model", short_model_name(recipe.model.id) or _none_yet("go.models"), size),
        ("data", data_words(recipe) if recipe.data.sources else _none_yet("go.data"), ""),
        ("LoRA", lora_words(recipe, 40), ""),
        ("length", batch_words(recipe), rate),
    ]
    lines = [line for row in rows for line in _with_note(*row, width)]
    if expected is not None:
        memory += [
            *_with_note("time", *_time_words(expected), width),
            *_shortage(expected, width, is_quiet=is_quiet),
        ]
    return [*lines, *memory]


def _joined(parts: Sequence[Content], width: int) -> list[Content]:
    """Return lines of at most ``width`` cells, each with as many of the parts as fit, in order."""
    lines: list[Content] = []
    for part in parts:
        if lines and lines[-1].cell_length + 3 + part.cell_length <= width:
            lines[-1] = Content.assemble(lines[-1], "   ", part)
        else:
            lines.append(part)
    return lines


def _with_note(label: str, value: str | Content, note: str, width: int) -> list[Content]:
    """Return a line with a label, a value and a note, such as ``model  SmolLM2-135M   135M parameters``. If
    this line would be too long, the note is on a second line.
    """
    line = labeled(label, Content.assemble(value, (f"   {note}" if note else "", "dim")), _LABEL)
    if line.cell_length <= width:
        return [line]
    room = max(1, width - _LABEL)
    parts = [Content(value) if isinstance(value, str) else value, Content.styled(note, "dim")]
    return [
        labeled("" if number else label, part.truncate(room, ellipsis=True), _LABEL)
        for number, part in enumerate(parts)
        if part
    ]


def numbers_lines(summary: RunSummary, is_large: bool, width: int, height: int) -> list[Content]:
    """Return up to ``height`` lines with the validation losses of a run. If ``is_large``, facts about the
    run come first, with a line for each main setting if there is room.
    """
    if not is_large:
        return _validation_lines(summary, width, height)
    used: list[Fact] = []
    if summary.tokens_per_s is not None:
        used.append(("speed", f"mean {format_speed(summary.tokens_per_s)} tok/s"))
    if summary.peak_bytes is not None:
        used.append(("memory", f"{format_bytes(summary.peak_bytes)} at the peak"))
    if summary.energy:
        used.append(("energy", summary.energy))
    of_run: list[Fact] = [each for each in (("model", summary.model), ("data", summary.data)) if each[1]]
    listed: list[Fact] = [(each.title, each.value) for each in summary.settings]
    gap = [Content("")]
    lines = fact_lines([*of_run, *gap, *listed, *(gap if used else []), *used], width)
    rows = len(summary.evaluations) + 3 if summary.evaluations else 0
    if not listed or len(lines) + rows > height:
        lines = fact_lines([*of_run, ("settings", setting_words(summary.settings)), *used], width)
    if summary.evaluations:
        lines += [Content(""), Content.styled("Validation", "bold")]
        lines += _validation_lines(summary, width, max(1, height - len(lines)))
    return lines


def _validation_lines(summary: RunSummary, width: int, height: int) -> list[Content]:
    best_step = None if summary.best is None else summary.best[1]
    evaluations = [(step, loss, "") for step, loss in summary.evaluations]
    return validation_lines(evaluations, best_step, width, min(height, _MAX_EVALUATIONS + 1))


def _none_yet(command: str) -> Content:
    """Return ``none yet`` and the key of ``command``. The command opens the screen where the user can select
    the missing item.
    """
    return Content.assemble("none yet  ", highlight_keys(key_name(command)))


def _time_words(expected: Forecast) -> tuple[str, str]:
    """Return (duration, note): ``about 25 min`` and ``54 steps, judging by vicuna-1``. The note states the
    number of steps if the samples have been counted and :func:`_shortage` does not return a warning.
    """
    source = expected.time.source if expected.time else ""
    length = expected.length
    steps = expected.steps if length.is_exact and not length.is_too_short else ""
    return expected.duration or "unknown: no run here yet", ", ".join(filter(None, (steps, source)))


def _shortage(expected: Forecast, width: int, *, is_quiet: bool) -> list[Content]:
    """If the run has too few steps to learn much, return a warning, with the key of the screen on which the
    user can fix this. Otherwise, return no lines. With ``is_quiet``, the warning is dim.
    """
    words = expected.length.shortage
    if not words:
        return []
    style = "dim" if is_quiet else "$warning"
    lines = hanging(Content.styled("! ", style), Content.styled(words, style), width)
    fix = Content(" ▸ ") + highlight_keys(f"{key_name('go.train')} fix")
    if lines[-1].cell_length + fix.cell_length <= width:
        return [*lines[:-1], lines[-1] + fix]
    return [*lines, " " + fix]


def next_lines(steps: Steps, width: int, *, is_large: bool, has_enter: bool) -> list[Content]:
    """Return lines with the suggested step, its key and its reason, followed by the alternatives.

    Args:
        steps: The suggested step and the alternatives.
        width: Width of a line, in cells.
        is_large: Whether there is room for an empty line between steps, and for each reason on its own line.
        has_enter: Whether Enter currently carries out the suggested step. If not, the key of the step's
            command is shown.
    """
    step, others = steps
    first_key = key_name("home.next" if has_enter or not step.command else step.command)
    keys = [first_key, *(key_name(other.command) for other in others)]
    column = max(map(len, keys))
    lines = []
    for number, (key, each) in enumerate(zip(keys, (step, *others), strict=True)):
        is_next = not number and has_enter
        also = "" if not is_next or each.command in ("home.demo", "") else f" (or {key_name(each.command)})"
        first = Content.assemble(
            ("▸ " if is_next else "  ", "bold $primary"),
            highlight_keys(f"{key:<{column}}  "),
            (each.text, "bold" if is_next else ""),
            (also, "dim"),
        )
        why = Content.styled(each.why, "dim")
        if is_large:
            lines += [Content("")] if number else []
            lines += [first, Content(" " * (column + 4)) + why]
        elif first.cell_length + 2 + why.cell_length <= width:
            lines.append(Content.assemble(first, "  ", why))
        else:
            indent = column + 4
            lines += [first, *(Content(" " * indent) + part for part in why.wrap(max(20, width - indent)))]
    return lines
