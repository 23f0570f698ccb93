"""The launch pane of the Train screen: the expected time of the run, its settings by group, and its
checks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING

from msgspec import Struct
from textual.app import ComposeResult
from textual.containers import Container, Vertical
from textual.content import Content

from qlora_tui.formatting import (
    abbreviate_home,
    capitalize,
    format_duration,
    format_number,
    pluralize,
    truncate_middle,
)
from qlora_tui.memory.explain import verdict_word
from qlora_tui.recipe.conflicts import require_runnable
from qlora_tui.recipe.fields import Field, fields, get_setting, name_settings
from qlora_tui.recipe.schema import Recipe
from qlora_tui.remote.calls import current
from qlora_tui.runs import actions as run_actions
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.doctor import Check, CheckKind
from qlora_tui.runs.expected_time import Forecast
from qlora_tui.runs.preflight import errors
from qlora_tui.runs.suggested_fix import SuggestedFix
from qlora_tui.tui.key_names import TITLE_GAP, highlight_keys, key_hint, key_name
from qlora_tui.tui.render.columns import hanging
from qlora_tui.tui.render.figures import Figure, large_figures
from qlora_tui.tui.render.labels import OUTCOME_SIGNS, FitLine, place_words, refusal_words
from qlora_tui.tui.screens.base import OnQloraApp
from qlora_tui.tui.screens.modals.dialogs import ConfirmScreen
from qlora_tui.tui.widgets.controls import Drawing, Lines, Panel, ViScroll
from qlora_tui.tui.widgets.settings_form import SettingGroup, SettingsForm

if TYPE_CHECKING:
    from qlora_tui.memory.estimate import Verdict
    from qlora_tui.tui.app import QloraApp

_NOT_IN_FORM = frozenset(("data.sources", "note"))
"""Settings that are edited elsewhere: sources on the Data screen, the note when a preset is saved."""
_MAIN = (
    "training.epochs",
    "training.learning_rate",
    "data.max_length",
    "training.gradient_accumulation",
    "lora.rank",
)
"""The settings with the largest effect on a run and its duration."""
_PREFERENCES = "Preferences"
_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "Run",
        (
            *("name", "training.max_steps", "training.seed", "training.checkpoint_every"),
            *("training.keep_checkpoints", "training.log_every", "training.report_to"),
        ),
    ),
    (
        "Evaluation",
        (
            *("data.validation_fraction", "data.validation_seed", "data.validation_path"),
            *(
                "training.eval_every",
                "training.early_stopping",
                "training.sample_prompts",
                "training.general_prompts",
            ),
            *("training.task_prompts", "training.forgetting_weight"),
        ),
    ),
    (
        "Memory and speed",
        (
            *("training.micro_batch_size", "training.auto_micro_batch", "training.gradient_checkpointing"),
            *("training.optimizer", "training.gpus", "quantization.", "model.attention", "model.kernels"),
        ),
    ),
    (_PREFERENCES, ("data.preferences", "training.preference_beta", "training.simpo_gamma")),
    ("Training", ("training.",)),
    ("LoRA", ("lora.",)),
    ("Data", ("data.",)),
    ("Model", ("model.",)),
)
"""(title, names of settings) for each group except the main group. A name is the path of a setting or, if
it ends with a dot, a prefix of several paths. A setting belongs to the first group in which a name matches
its path.
"""
_LARGE_HEIGHT = 6
"""Minimum height of the first panel, in lines, at which the time is in large digits."""
_LEAST_TEXT = 20
"""Minimum width of the text after a check's outcome and name, in cells."""
_SEPARATOR = " · "
_MEMORY = "memory"
_SHORT_HEAD = 10
"""Width of a check's outcome, such as ``✗ error``, in cells."""
_PLACES: dict[CheckKind, tuple[str, str]] = {
    CheckKind.MODEL: ("go.models", "choose or download the model"),
    CheckKind.DATA: ("go.data", "choose or correct the data"),
    CheckKind.LORA: ("go.lora", "choose other targets"),
    CheckKind.LENGTH: ("go.memory", "choose a shorter length"),
    CheckKind.MEMORY: ("go.memory", "make it fit"),
}
"""(command, action) by kind of check: the command that opens the screen where an error is fixed, and what to
do there if the error does not say it.
"""
_CHECK_KEYS = (("train.recheck", "check again"),)
_RECIPE_TITLE = TITLE_GAP.join(
    ("Recipe", Content("  ").join((key_hint("Enter", "edit"), key_hint("←→", "change"))))
)


@cache
def form_groups() -> tuple[SettingGroup, ...]:
    """Return the group of the main settings, followed by folded groups with all other settings."""
    left = {path: field for path, field in fields().items() if path not in _NOT_IN_FORM}
    groups = [SettingGroup("", tuple(left.pop(path) for path in _MAIN))]
    for title, wanted in _GROUPS:
        paths = [path for name in wanted for path in left if path == name or _is_in(path, name)]
        own = tuple(left.pop(path) for path in paths)
        applies = _compares if title == _PREFERENCES else _always
        groups.append(SettingGroup(title, own, is_open=False, applies=applies))
    return tuple(groups)


def _is_in(path: str, section: str) -> bool:
    return section.endswith(".") and path.startswith(section)


def _compares(recipe: Struct) -> bool:
    """Return whether the recipe accepts preference data."""
    return isinstance(recipe, Recipe) and recipe.data.preferences != "refuse"


def _always(recipe: Struct) -> bool:
    return True


def setting_notes(recipe: Recipe, expected: Forecast | None) -> dict[str, str]:
    """Return a note for some settings, such as the resulting number of steps, by the path of the setting.
    ``expected``: the forecast of the run; None if unknown.
    """
    training = recipe.training
    rows = pluralize(recipe.effective_batch, "pair" if recipe.trains_pairs else "sequence")
    notes = {
        "training.gradient_accumulation": f"× {training.micro_batch_size} = {rows}",
        "lora.rank": f"alpha {format_number(recipe.lora.alpha)}",
    }
    if expected is not None and expected.length.is_complete:
        length = expected.length
        notes["training.epochs"] = f"{length.about}{pluralize(length.steps_per_epoch, 'step')} each"
    return notes


class LaunchPane(Vertical, OnQloraApp):
    """The expected time of the run and the key to press now, above the settings and the checks."""

    def __init__(self) -> None:
        super().__init__(id="launch")
        self._checks: tuple[Check, ...] = ()
        self._preset: Recipe | None = None
        self._shows_all = False
        """Whether the user has reversed the default. By default, each passed check has its own line in a very
        wide window; in a smaller window, all passed checks share one line.
        """

    def compose(self) -> ComposeResult:
        verdict = Drawing(partial(verdict_lines, (), None, None, "", "", None), id="verdict")
        yield Panel("Launch", verdict, id="verdict-panel")
        with Container(id="launch-body"):
            yield Panel(_RECIPE_TITLE, SettingsForm(form_groups(), id="recipe-form"), id="recipe-panel")
            with Vertical(id="checks-column"):
                with Panel("Checks", keys=_CHECK_KEYS, id="checks-panel"), ViScroll(id="checks-side"):
                    yield Lines(id="checks")
                yield Panel("", Drawing(id="notes"), id="notes-panel")

    def on_mount(self) -> None:
        self.on_setting_list_moved()

    def on_setting_list_moved(self) -> None:
        """Explain the setting or the group under the cursor."""
        list_ = self.query_one(SettingsForm).list
        current = list_.current
        title = (
            Content(f"Settings: {current.title}")
            if isinstance(current, SettingGroup)
            else Content.assemble(current.label, (f"  {current.path}", "$text-muted not bold"))
        )
        self.query_one("#notes-panel", Panel).show_title(title)
        notes = partial(note_lines, current, list_.groups_from_cursor, self._preset)
        self.query_one("#notes", Drawing).show(notes)

    def show_settings(self, recipe: Recipe, preset: Recipe, notes: Mapping[str, str]) -> None:
        """Show the recipe's settings, and mark those that differ from the preset's."""
        self.query_one(SettingsForm).show(recipe, preset, notes)
        self._preset = preset
        self.on_setting_list_moved()

    def show_checks(
        self, checks: tuple[Check, ...], recipe: Recipe, expected: Forecast | None, probing: str = ""
    ) -> None:
        """Show the results of the checks, the expected time of the run, and whether the run can start.

        Args:
            checks: The results.
            recipe: The recipe that was checked.
            expected: The forecast of the run; None if unknown.
            probing: Progress of the step measurement; empty if none is in progress.
        """
        self._checks = checks
        place, planned = place_words(self.app.run_budget), self.app.memory_budget
        # The other screens estimate for the GPU that the user assumes, but the run uses this machine.
        of_planned = self.app.workbench.verdict(planned) if planned.is_assumed else None
        assumed = None
        if of_planned is not None and any(check.verdict is not None for check in checks):
            assumed = of_planned, place_words(planned)
        verdict = self.query_one("#verdict", Drawing)
        verdict.set_class(time_figure(checks, expected) is not None, "-large")
        verdict.set_class(assumed is not None, "-assumed")
        verdict.show(partial(verdict_lines, checks, recipe, expected, probing, place, assumed))
        self._show_check_lines()

    def toggle_checks(self) -> None:
        """Toggle between showing passed checks in one line and in full."""
        self._shows_all = not self._shows_all
        self._show_check_lines()

    def on_resize(self) -> None:
        """Draw the checks and the notes again, since their lines depend on the size of the window."""
        self.call_after_refresh(self._show_check_lines)
        self.call_after_refresh(self.on_setting_list_moved)

    def _show_check_lines(self) -> None:
        def lines(width: int) -> list[Content]:
            return check_lines(self._checks, width, shows_all=shows_all)

        shows_all = self._shows_all != self.screen.has_class("-very-wide")
        self.query_one("#checks", Lines).show(lines)
        words = "only problems" if shows_all else "all checks"
        self.query_one("#checks-panel", Panel).show_keys((("train.level", words), *_CHECK_KEYS))


def note_lines(
    current: Field | SettingGroup,
    groups: tuple[SettingGroup, ...],
    preset: Recipe | None,
    width: int,
    height: int,
) -> list[Content]:
    """Return lines about what settings do. If ``current`` is a setting, its explanation comes first, with its
    effect on memory, its valid values and the preset's value. The explanations of the other settings of
    ``groups`` follow, as many as fit ``height`` lines. ``groups``: the group that the cursor is on or in, and
    the groups below it.
    """
    lines: list[Content] = []
    if isinstance(current, Field):
        of_preset = "" if preset is None else current.describe(get_setting(preset, current.path))
        facts = {"memory": current.memory, "value": current.expected, "preset": abbreviate_home(of_preset)}
        texts = [Content(current.help)]
        texts += [Content.assemble((f"{name:<8}", "dim"), text) for name, text in facts.items() if text]
        lines += [part for text in texts for part in text.wrap(max(20, width))]
    for group in groups:
        # The title of the first group is the panel's title, or above the cursor.
        title = [] if group is groups[0] else [Content.styled(group.title, "bold")]
        before = [Content(""), *title] if lines else []
        for setting in _overview([field for field in group.fields if field != current], width):
            if len(lines) + len(before) + len(setting) > height:
                return lines
            lines += [*before, *setting]
            before = []
    return lines


def _overview(settings: Sequence[Field], width: int) -> list[list[Content]]:
    """Return the lines for each setting: its label with an explanation, wrapped to ``width`` cells."""
    cells = max((len(field.label) for field in settings), default=0)
    return [
        hanging(
            Content.styled(f"{field.label:<{cells}}  ", "$primary"),
            Content.styled(field.help, "dim"),
            width,
            _LEAST_TEXT,
        )
        for field in settings
    ]


def verdict_lines(
    checks: tuple[Check, ...],
    recipe: Recipe | None,
    expected: Forecast | None,
    probing: str,
    place: str,
    assumed: tuple[Verdict, str] | None,
    width: int,
    height: int,
) -> list[Content]:
    """Return at most ``height`` lines: whether the run can start, with its steps and time; a key that
    corrects an error or improves the run, if there is one; the run's memory; and the run's plan.

    If ``height`` is at least six, the time is in large digits. ``probing``: progress of the step measurement;
    empty if none is in progress. ``place``: the device whose memory the run uses. ``assumed``: the verdict
    for a GPU of the size that the user assumes, and the GPU's name; None if no size is assumed. This verdict
    is on a separate line below the run's memory.
    """
    if recipe is None:
        return [Content("Checking what the run needs…")]
    parts = _plan(recipe)
    while len(_SEPARATOR.join(parts)) > width and len(parts) > 1:
        parts.pop()
    verdict = next((check.verdict for check in checks if check.verdict is not None), None)
    plan = Content.styled(_SEPARATOR.join(parts), "dim")
    time = time_figure(checks, expected) if height >= _LARGE_HEIGHT else None
    large = [] if time is None else large_figures([time])
    can_train = _can_train(checks)
    verdicts = [] if verdict is None else [(_MEMORY, verdict, place)]
    if verdicts and assumed is not None:
        verdicts.append((" " * len(_MEMORY), *assumed))
    fits = [
        FitLine(*each, can_train=can_train).draw(width, 0, keeps_place=len(verdicts) > 1) for each in verdicts
    ]
    concluded = conclusion(checks, expected, width, with_time=time is None)
    memory = [*_headline(expected, next(iter(fits), None), probing, width), *fits[1:]]
    return [*concluded, *large, *memory, plan][:height]


def _can_train(checks: tuple[Check, ...]) -> bool:
    return not any(check.problem is not None for check in checks)


def time_figure(checks: tuple[Check, ...], expected: Forecast | None) -> Figure | None:
    """Return the time of the run as a figure to be shown in large digits; None if the time is unknown, or if
    a check has an error.
    """
    if errors(checks) or expected is None or expected.time is None:
        return None
    return Figure("on this machine", format_duration(expected.time.seconds))


def _length_words(expected: Forecast, *, with_time: bool) -> str:
    """Return the run's steps and, if ``with_time``, its time, such as ``54 steps, about 25 min``."""
    return expected.steps + (f", {expected.duration or 'time unknown'}" if with_time else "")


def _headline(expected: Forecast | None, fit: Content | None, probing: str, width: int) -> list[Content]:
    """Return a line with the run's memory and the source of its expected time, such as
    ``memory fits: uses ~1.3 of 23.5 GiB   judging by vicuna-1``. The source is left out if the line would be
    too long. Return no line if nothing is known.
    """
    parts = [] if fit is None else [fit]
    if expected is not None or probing:
        parts.append(Content.assemble(*_source(expected, probing)))
    while len(parts) > 1 and Content("   ").join(parts).cell_length > width:
        parts.pop()
    return [Content("   ").join(parts)] if parts else []


def _source(expected: Forecast | None, probing: str) -> list[Content]:
    """Return the progress of the step measurement if ``probing`` is not empty. Otherwise, return the source
    of the expected time; if the time is unknown, the key that measures it.
    """
    key = key_name("train.probe")
    if probing:
        measuring = Content.styled(f"measuring three steps: {probing}   ", "$primary")
        return [measuring, highlight_keys(f"{key} stop", "$text-muted")]
    if expected is None or expected.time is None:
        return [highlight_keys(f"{key} trains three steps to measure the time", "$text-muted")]
    return [Content.styled(expected.time.source, "dim")]


def check_lines(checks: tuple[Check, ...], width: int, *, shows_all: bool) -> list[Content]:
    """Return lines for each check, with problems first: its outcome, name and result, then its remedy. The
    remedy that :func:`conclusion` gives is left out if it fits in one line there.

    Args:
        checks: Results of the checks.
        width: Available width, in cells.
        shows_all: Whether passed checks have lines of their own; otherwise they share one line.
    """
    lines: list[Content] = []
    offered, above = first_fix(checks), concluded_check(checks)
    cells = max((len(check.label) for check in checks), default=0)
    for check in worst_first(checks):
        if check.outcome == "ok" and not shows_all:
            continue
        sign, style = OUTCOME_SIGNS[check.outcome]
        remedy = highlight_keys(_remedy(check, offered), "$primary")
        head = Content.assemble((f"{sign:<{_SHORT_HEAD}}", style), (f"{check.label:<{cells}} ", "bold"))
        room = max(_LEAST_TEXT, width - head.cell_length)
        text = check.text
        if check.verdict is not None:
            # Above, the same verdict is worded for a model that may be unable to train.
            word = verdict_word(check.verdict, can_train=_can_train(checks))
            text = f"{word}{text.removeprefix(check.verdict.word)}"
        words = (truncate_middle(word, room) for word in name_settings(abbreviate_home(text)).split(" "))
        lines += hanging(head, Content(" ".join(words)), width, _LEAST_TEXT)
        if remedy and not (check is above and remedy.cell_length <= width):
            lines += hanging(Content(" " * head.cell_length), remedy, width, _LEAST_TEXT)
    return lines if shows_all else [*lines, *_passed(checks, width)]


def _passed(checks: tuple[Check, ...], width: int) -> list[Content]:
    """Return lines that list the checks without problems, such as ``✓ 7 checks ok  model, data, memory, disk,
    queue``. The list is empty if no check passed.
    """
    names = [check.label for check in checks if check.outcome == "ok"]
    if not names:
        return []
    count = Content.styled(f"✓ {pluralize(len(names), 'check')} ok  ", "$success")
    listed = Content.styled(", ".join(dict.fromkeys(names)), "dim")
    return hanging(count, listed, width, _LEAST_TEXT)


def worst_first(checks: tuple[Check, ...]) -> list[Check]:
    """Return the checks in display order, the worst outcome first."""
    return sorted(checks, key=lambda check: list(OUTCOME_SIGNS).index(check.outcome), reverse=True)


def first_fix(checks: tuple[Check, ...]) -> SuggestedFix | None:
    """Return the fix that a key applies: the fix of the first check, in display order, that has one. None if
    no check has a fix.
    """
    return next((check.suggested_fix for check in worst_first(checks) if check.suggested_fix), None)


def concluded_check(checks: tuple[Check, ...]) -> Check | None:
    """Return the check whose remedy :func:`conclusion` gives: the first error or, if there is none, the first
    warning with a fix; None if there is neither.
    """
    fixable = (check for check in checks if check.outcome == "warning" and check.suggested_fix is not None)
    return next(iter(errors(checks)), None) or next(fixable, None)


def conclusion(
    checks: tuple[Check, ...], expected: Forecast | None, width: int, *, with_time: bool
) -> list[Content]:
    """Return lines that say whether the run can start, with its number of steps and, if ``with_time``, its
    expected time. If there is an error, the second line says how to correct it.

    If a key corrects a warning, such as too few steps, the first line has only this key, and the second line
    has the key that launches the run anyway. If a key only improves the run, this key is on the second line.
    """
    words = "" if expected is None else _length_words(expected, with_time=with_time)
    length = [Content.styled(words, "dim" if errors(checks) else "bold")] if words else []
    if wrong := errors(checks):
        refusals = [check.problem for check in wrong if check.problem is not None]
        names = ", ".join(dict.fromkeys(check.label for check in wrong))
        reason = capitalize(refusal_words(*refusals)) if refusals else f"Not ready: {names}"
        refusal = Content.styled(f"✗ {reason}.", "bold $error")
        whole = Content("   ").join((refusal, *length))
        remedy = (
            _remedy(worst_first(checks)[0], first_fix(checks)) or f"▸ {key_name('train.recheck')} check again"
        )
        # The check has the whole remedy.
        short = remedy if len(remedy) <= width else remedy.partition(". ")[0]
        return [
            whole if whole.cell_length <= width else refusal,
            highlight_keys(short).truncate(width, ellipsis=True),
        ]
    waits = any(check.kind is CheckKind.QUEUE and check.outcome == "note" for check in checks)
    count = sum(check.outcome == "warning" for check in checks)
    state = Content.styled(
        *((f"! {pluralize(count, 'warning')}", "$warning") if count else ("✓ Ready.", "bold $success"))
    )
    fix, verb = first_fix(checks), "queue" if waits else "launch"
    if fix is not None and concluded_check(checks) is not None:
        first = highlight_keys(f"▸ {key_name('train.fix')} {fix.label}", "bold")
        second = highlight_keys(f"  {key_name('train.launch')} {verb} anyway")
        parts, others = [first], [second, *length, state]
    else:
        parts = [highlight_keys(f"▸ {key_name('train.launch')} {verb} it", "bold"), *length, state]
        others = [] if fix is None else [highlight_keys(f"  {key_name('train.fix')} {fix.label}")]
    lines = [Content("   ").join(parts)]
    return [*lines, Content("   ").join(others)] if others else lines


def _remedy(check: Check, offered: SuggestedFix | None) -> str:
    """Return what to do about a check, and the key for it if there is one; empty if there is nothing to do.
    If ``offered`` is the check's fix, the key applies this fix. Otherwise, the key of an error opens the
    screen where the error is corrected.
    """
    if offered is not None and check.suggested_fix is offered:
        return f"▸ {key_name('train.fix')} {offered.label}"
    words = name_settings(abbreviate_home(check.fix))
    place = _PLACES.get(check.kind) if check.outcome == "error" else None
    if place is not None:
        return f"▸ {key_name(place[0])} {words or place[1]}"
    return f"▸ {words}" if words else ""


def _plan(recipe: Recipe) -> list[str]:
    """Return the plan of the run in short phrases: epochs, batches, validation, checkpoints."""
    training, data = recipe.training, recipe.data
    limit = f", at most {pluralize(training.max_steps, 'step')}" if training.max_steps else ""
    batch = pluralize(recipe.effective_batch, "row" if data.packing else "sequence")
    evaluations = f"every {pluralize(training.eval_every, 'step')}" if training.eval_every else "each epoch"
    has_validation = bool(data.validation_path or data.validation_fraction)
    return [
        f"{format_number(training.epochs)} {'epoch' if training.epochs == 1 else 'epochs'}{limit}",
        f"{batch} of up to {data.max_length:,} tokens per step",
        f"validation {evaluations}" if has_validation else "no validation",
        f"keeps {pluralize(training.keep_checkpoints, 'checkpoint')} and the best",
    ]


async def launch(app: QloraApp, recipe: Recipe, checks: tuple[Check, ...]) -> RunDir | None:
    """Queue a recipe, and return its run. If any check has an error, ask first, and return None if the user
    declines. Raises UserError if the recipe cannot run at all.
    """
    require_runnable(recipe)
    for check in checks:
        if check.problem is not None:
            raise check.problem
    failed = "\n".join(f"{check.label}: {check.text}" for check in errors(checks))
    if failed and not await app.push_screen_wait(ConfirmScreen("Launch anyway?", failed, "Launch")):
        return None
    if current() is not None:
        # In a thread: with --host, data that has changed is sent again, perhaps over a slow link.
        return await asyncio.to_thread(run_actions.submit, recipe)
    return run_actions.submit(recipe)
