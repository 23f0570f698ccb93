"""The Chat screen: the base model and an adapter answer the same prompt, with one copy of the base model's
weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from textual import work
from textual.containers import Horizontal
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static, TextArea

from qlora_tui.chat.chat_sources import adapter_label, proposed_adapter, run_source
from qlora_tui.chat.chat_types import BASE, ChatSource, Effect, Sampling
from qlora_tui.engine.client import EngineClosedError
from qlora_tui.engine.protocol import CountTokens
from qlora_tui.errors import UserError
from qlora_tui.formatting import capitalize, pluralize, truncate_middle
from qlora_tui.memory.budget import budget_for
from qlora_tui.recipe.schema import Recipe
from qlora_tui.remote.calls import refuse_on_box
from qlora_tui.runs.chat_choices import ENOUGH, ChoiceKind, recipe_on_choices
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.run_summary import RunSummary, summarize
from qlora_tui.tui.breakpoints import TALL_CELLS, VERY_WIDE_CELLS
from qlora_tui.tui.key_names import highlight_keys, key_name, name_keys
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.screens.chat.conversation import AdapterPair, Conversation
from qlora_tui.tui.screens.chat.dialogs import (
    AnswerEditor,
    ChatSettingsScreen,
    chat_runs,
    conversation_picker,
    source_picker,
)
from qlora_tui.tui.screens.chat.panels import (
    NOTHING_TO_CHAT_WITH,
    ChatMain,
    ChatSide,
    effect_text,
    has_default_settings,
    loaded_text,
    prompt_title,
    sampling_line,
    session_line,
    unloaded_text,
)
from qlora_tui.tui.screens.chat.prompt_box import PromptBox
from qlora_tui.tui.screens.chat.saved import list_conversations, transcript_path
from qlora_tui.tui.screens.chat.start import (
    ChatStart,
    Starters,
    read_start,
)
from qlora_tui.tui.screens.modals.dialogs import ask_search
from qlora_tui.tui.screens.train.screen import prepare_run
from qlora_tui.tui.ui_state import add_recent, recent
from qlora_tui.tui.widgets.controls import Drawing, Lines, Panel

if TYPE_CHECKING:
    from qlora_tui.gpu.metrics import GpuDevice
    from qlora_tui.tui.app import QloraApp
    from qlora_tui.tui.system_status import SystemStatus

_TYPING_ACTIONS = ("stop", "leave_field", "next_answers", "scroll_conversation", "thinking", "unfold")
"""Actions whose keys do not type text. While a prompt is being written, the footer shows only these."""
_SIDE_CELLS = 120
"""Minimum width of the window, in cells, at which the side column is shown if one adapter answers. If two
answer, the side column needs a very wide window.
"""
_COUNT_AFTER_S = 0.3
"""Seconds to wait after the last key press before the tokens of a prompt are counted."""
_MAX_SEARCH = 24
"""Maximum width of the search text in the title, in cells."""
_TITLE_FRAME, _FRAME, _SHORT_FRAME = 6, 4, 2
"""Cells around a panel's title, and around its contents with and without a border."""
_CHOICES: dict[ChoiceKind, str] = {"edits": "edit", "pairs": "choice"}
"""Noun for each kind of judgment. If there are enough judgments of both kinds, the first kind is used for
training.
"""


class ChatScreen(WorkScreen):
    """The Chat screen: a conversation, in which one or two adapters answer each prompt."""

    MODE = "chat"
    CSS_PATH = "chat.tcss"

    def __init__(self) -> None:
        super().__init__()
        self.conversation = Conversation(
            Static(highlight_keys(name_keys(NOTHING_TO_CHAT_WITH)), id="chat-empty"),
            Drawing(id="chat-start"),
        )
        self.source_name = ""
        self.search = ""
        """Text that an exchange must contain to be shown; empty to show all exchanges."""
        self._start = ChatStart()
        self._switching = asyncio.Lock()
        """Held while the source changes. Otherwise a message that is sent meanwhile would be removed."""
        self._estimated_for: tuple[bool, GpuDevice | None] = (False, None)
        """Whether the GPU was known when the chat's memory was last estimated, and this GPU, if any."""
        self._effect: str | Effect = ""
        self._held_by_server: tuple[int, int] | None = None
        """Port of the server that holds a model, and that model's memory in bytes; None if no server holds a
        model.
        """

    @property
    def help_state(self) -> str:
        return "empty" if self.conversation.source is None else ""

    def compose_body(self) -> Iterable[Widget]:
        with Horizontal(id="chat-body"):
            yield ChatMain(self.conversation)
            yield ChatSide()

    # Which model

    def on_screen_resume(self) -> None:
        """If nothing is selected, or the selected run was deleted, select the newest run."""
        chat = self.conversation
        deleted = chat.run_dir is not None and not chat.run_dir.path.exists() and not chat.busy
        if deleted:
            self.notify(f"{self.source_name} was deleted.")
        if deleted or chat.source is None:
            self.call_later(self._show_newest, chat.source)
        self.show_header()

    def show_system_status(self, system_status: SystemStatus) -> None:
        """If the GPU has changed, for example after the first poll, estimate the chat's memory again. If a
        server has loaded or unloaded its model and the conversation is not busy, update the header, which
        shows whether a server has a model in memory.
        """
        server = system_status.loaded_server
        held = (server.port, server.memory_bytes) if server is not None else None
        source = self.conversation.source
        if source is not None and self._estimated_for != (system_status.is_known, system_status.gpu):
            self._read_start(source.recipe, self.conversation.run_dir, system_status)
        if held != self._held_by_server and not self.conversation.busy:
            self._held_by_server = held
            self.show_header()

    async def _show_newest(self, before: ChatSource | None) -> None:
        """Switch to the newest run, if the source is still ``before``. If it is not, the user has chosen
        another source in the meantime.
        """
        if self.conversation.source is not before:
            return
        if runs := chat_runs():
            await self._show_run(runs[0])
        elif before is not None:
            await self.set_source(None, "")

    async def chat_with(self, run: RunDir) -> None:
        """Switch to this run, and focus the prompt field."""
        await self._show_run(run)
        self.action_write()

    async def _show_run(self, run: RunDir) -> None:
        """Switch to this run. Its model is loaded when the first prompt is sent."""
        try:
            source = run_source(run)
        except UserError as problem:
            self.app.show_error(problem)
            return
        async with self._switching:
            if run == self.conversation.run_dir and source == self.conversation.source:
                return
            summary = await asyncio.to_thread(summarize, run)
            await self._switch(source, run.name, run, summary)
        if not source.adapters:
            self.notify(
                f"{run.name} has no saved adapter, so only the base model answers.", severity="warning"
            )

    async def set_source(self, source: ChatSource | None, name: str) -> None:
        async with self._switching:
            await self._switch(source, name)

    async def _switch(
        self,
        source: ChatSource | None,
        name: str,
        run: RunDir | None = None,
        summary: RunSummary | None = None,
    ) -> None:
        adapter_name = BASE if source is None or summary is None else proposed_adapter(source, summary)
        await self.conversation.set_source(source, run, adapter_name)
        self.source_name, self.search, self._start = name, "", ChatStart(summary=summary)
        self.show_effect("")
        self.show_header()
        if source is not None:
            self._read_start(source.recipe, run, self.app.system_status)

    @work(group="start", exclusive=True)
    async def _read_start(self, recipe: Recipe, run: RunDir | None, system_status: SystemStatus) -> None:
        self._estimated_for = (system_status.is_known, system_status.gpu)
        device = budget_for(system_status.gpu).device if system_status.is_known else None
        self._start = await asyncio.to_thread(read_start, recipe, run, device)
        self.show_header()

    def action_choose_source(self) -> None:
        """Ask for another run or the recipe's model, and chat with what the user selects."""
        recipe = self.app.workbench.recipe

        async def chat(chosen: str) -> None:
            run = next((run for run in runs if run.id == chosen), None)
            if run is not None:
                await self.chat_with(run)
            else:
                name = recipe.model.id.rstrip("/").rpartition("/")[2]
                await self.set_source(ChatSource(recipe=recipe, thinking=recipe.data.thinking), name)
                self.action_write()

        runs = chat_runs()
        if runs or recipe.model.id:
            self.ask(source_picker(runs, recipe.model.id), chat)
        else:
            self.notify(
                "No run has an adapter and the recipe has no model. "
                f"Press {key_name('go.models')} to select one."
            )

    def action_serve(self) -> None:
        """Open the dialog that starts and stops a server for other programs."""
        from qlora_tui.tui.screens.chat.server_dialog import ServerScreen

        refuse_on_box("Servers cannot be started from here", "serve RUN --background")
        self.app.push_screen(ServerScreen(self.conversation))

    async def action_unload(self) -> None:
        """Unload the model. The next prompt loads it again."""
        await self.conversation.unload()

    # Which adapters, and how they answer

    def action_next_answers(self) -> None:
        """Switch which adapters answer the next prompt: both side by side, only the right-hand one, or only
        the left-hand one.
        """
        self._choose(self.conversation.pair.next_answers())

    def command_label(self, command_id: str) -> str | None:
        pair = self.conversation.pair
        if command_id != "chat.answers":
            return ""
        shown = pair.shown if pair.shown == "both" else adapter_label(pair.active[0])
        return None if pair.single else f"Answers: {shown}"

    def action_next_adapter(self, side: str) -> None:
        """On this side, ``left`` or ``right``, select the run's next adapter or checkpoint."""
        self._choose(self.conversation.pair.next(side))

    def _choose(self, pair: AdapterPair) -> None:
        if pair == self.conversation.pair and self.conversation.source is not None:
            self.notify("This run has no other adapter or checkpoint.")
        self.conversation.pair = pair
        self.show_header()
        self.refresh_bindings()

    def action_thinking(self) -> None:
        """Turn thinking on or off. If the model does not support this, notify the user."""
        chat = self.conversation
        if chat.source is None:
            return
        known = chat.ready.thinking if chat.ready else None
        default = known.default if known else "off"
        now = default if chat.thinking == "auto" else chat.thinking
        chat.thinking = "off" if now == "on" else "on"
        if known is not None and (effect := known.effect_of(chat.thinking)):
            if known.kind != "effort":
                chat.thinking = "auto"
            self.notify(effect)
        self.show_header()

    async def action_unfold(self) -> None:
        """Fold each thought into one line if thoughts are shown in full; otherwise show them in full."""
        await self.conversation.unfold(not self.conversation.unfolded)

    def action_settings(self) -> None:
        """Ask for the sampling settings and the system prompt. They take effect with the next prompt."""

        def apply(given: tuple[Sampling, str]) -> None:
            self.conversation.sampling, self.conversation.system_prompt = given
            add_recent("system_prompts", given[1])
            self.show_header()

        chat = self.conversation
        self.ask(ChatSettingsScreen(chat.sampling, chat.system_prompt, recent("system_prompts")), apply)

    # Prompts and answers

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Return whether an action is available. Without a model, few actions are available; while a prompt
        is being written, only actions whose keys do not type text.
        """
        is_own = self.has_command(action)
        if self.conversation.source is None and is_own:
            return action in ("choose_source", "settings", "serve")
        typing = isinstance(self.focused, PromptBox)
        if action == "stop":
            return self.conversation.busy
        if action == "leave_field":
            return typing and not self.conversation.busy
        if typing and action not in _TYPING_ACTIONS:
            return not is_own
        return super().check_action(action, parameters)

    def action_write(self) -> None:
        """Focus the prompt field."""
        if self.conversation.source is not None:
            self.query_one(PromptBox).focus()

    def action_leave_field(self) -> None:
        """Leave the field, so that keys are commands again."""
        self.set_focus(None)
        self._focus_starters()

    def _focus_starters(self) -> None:
        """Focus the starter prompts if they are shown and no other widget has the focus."""
        starters = self.query_one(Starters)
        if starters.display and self.is_current and self.focused is None:
            starters.focus()

    def on_option_list_option_selected(self, event: Starters.OptionSelected) -> None:
        """Send the selected starter prompt. The focus stays on the starter prompts, so that Enter sends the
        next one.
        """
        self._send(self.query_one(Starters).prompt(event.option), lambda: None)

    def on_option_list_option_highlighted(self) -> None:
        """Prioritize the recorded answers to the starter prompt under the cursor."""
        if self.has_class("-start"):
            self._show_start()

    async def on_prompt_box_sent(self, event: PromptBox.Sent) -> None:
        """Send the prompt. If the model is still answering, put the prompt back into the field instead."""
        box = self.query_one(PromptBox)
        self._send(event.text, lambda: box.put(event.text))

    def _send(self, prompt: str, cancel: Callable[[], object]) -> None:
        """Send a prompt. ``cancel`` is called if the model is still answering, or if the user decides not to
        load the model.
        """
        if self.conversation.busy:
            cancel()
            self.notify(f"The model is still answering. Press {key_name('chat.stop')} to stop it.")
            return
        # End the search, so that the new exchange is shown.
        self._search_for("")
        self.conversation.send(prompt, cancel)

    async def on_prompt_box_recalled(self) -> None:
        """Move the last prompt from the conversation back into the field. Before the first prompt, focus the
        starter prompts instead.
        """
        if self.conversation.turns:
            await self.action_edit_last()
        else:
            self.query_one(Starters).focus()

    def on_text_area_changed(self, event: TextArea.Changed) -> None:
        """Show the prompt's estimated length in tokens; the exact length follows if a model is loaded."""
        self._show_prompt_length(None)
        if self.conversation.ready is not None and event.text_area.text:
            self._count_tokens(event.text_area.text)

    @work(group="count", exclusive=True)
    async def _count_tokens(self, text: str) -> None:
        await asyncio.sleep(_COUNT_AFTER_S)
        if self.conversation.ready is None or text != self.query_one(PromptBox).text:
            # Either the prompt has changed, or the model was unloaded and a request would start the engine.
            return
        try:
            tokens = await self.conversation.engine.ask(CountTokens(text=text)).result()
        except (EngineClosedError, UserError):
            # The title keeps the estimate, because the tokens could not be counted.
            return
        if text == self.query_one(PromptBox).text:
            self._show_prompt_length(tokens)

    def _show_prompt_length(self, tokens: int | None) -> None:
        text, starters = self.query_one(PromptBox).text, self.query_one(Starters)
        is_typing = isinstance(self.focused, PromptBox)
        may_select = starters.display and not text and not self.conversation.busy
        is_suggested = may_select if is_typing else starters.has_focus
        title = prompt_title(text, tokens, is_typing=is_typing, is_suggested=is_suggested)
        self.query_one("#prompt-panel", Panel).show_title(title)

    async def action_stop(self) -> None:
        """Stop the current activity."""
        await self.conversation.stop()

    async def action_retry(self) -> None:
        """Answer the last prompt again, with the adapters selected now, and remove its old answers."""
        if self.conversation.turns and not self.conversation.busy:
            self.conversation.send((await self.conversation.remove_last_turn()).prompt)

    async def action_edit_last(self) -> None:
        """Move the last prompt from the conversation back into the field, and remove its answers."""
        if self.conversation.turns and not self.conversation.busy:
            self.query_one(PromptBox).put((await self.conversation.remove_last_turn()).prompt)

    def action_copy(self, side: str) -> None:
        """Copy the last answer of the adapter on this side, ``left`` or ``right``."""
        pair = self.conversation.pair
        name = pair.left if side == "left" else pair.right
        answers = [turn.answers[name] for turn in self.conversation.turns if name in turn.answers]
        if not answers or not answers[-1].text:
            self.notify(f"{capitalize(adapter_label(name))} has no answer to copy yet.")
            return
        self.app.copy_to_clipboard(answers[-1].text.strip())

    def action_scroll_conversation(self, by: int) -> None:
        """Scroll down by three lines times ``by``, or up if ``by`` is negative."""
        self.conversation.scroll_relative(y=3 * by, animate=False)

    def action_effect(self) -> None:
        """Measure the effect of the right-hand adapter."""
        if self.conversation.pair.single:
            self.notify("This chat has no adapter to measure.")
        elif not self.conversation.busy:
            self.conversation.measure()

    # Earlier exchanges

    async def action_clear(self) -> None:
        """Start a new conversation, and end the search."""
        self.search = ""
        await self.conversation.clear()

    def action_history(self) -> None:
        """Ask for a saved conversation, and continue it."""
        conversations = list_conversations(self.conversation.run_dir)
        if not conversations:
            self.notify("No conversation with this run has been saved yet.")
            return

        async def open_saved(path: Path) -> None:
            self.search = ""
            await self.conversation.open_saved(path, dict(conversations)[path])
            self.query_one(PromptBox).focus()

        self.ask(conversation_picker(conversations), open_saved)

    def action_search(self) -> None:
        """Ask for a text, and show only the exchanges that contain the text."""
        ask_search(self, "exchanges", self.search, self._search_for)

    def _search_for(self, text: str) -> None:
        """Show only the exchanges that contain this text; show all exchanges if the text is empty."""
        self.search = text
        for turn in self.conversation.turns:
            turn.display = turn.contains(text)
        self.show_header()

    # Judgments

    def action_prefer(self, side: str) -> None:
        """Record that, of the last two answers, the answer on this side (``left`` or ``right``) is better."""
        turn = self.conversation.last_answered(2)
        if turn is None:
            self.notify("A choice needs two answers. Show base and adapter side by side first.")
            return
        left, right = list(turn.answers.values())[:2]
        chosen, rejected = (left, right) if side == "left" else (right, left)
        if chosen.text.strip() == rejected.text.strip():
            self.notify("The answers are identical, so there is nothing to choose.")
        elif chosen.was_cut:
            self.notify(
                f"The better answer was cut off: a model trained on it would stop there too. "
                f"{key_name('chat.settings')} raises the limit and {key_name('chat.retry')} asks again, or "
                f"{key_name('chat.edit_answer')} edits the answer.",
                severity="warning",
            )
        else:
            self.conversation.record_choice(turn, chosen, rejected)
            self._notify_recorded("pairs", f"{adapter_label(chosen.adapter_name)} is better")
            turn.show_question(False)
            chosen.show_judgment("better")
            rejected.show_judgment("")

    def action_edit_answer(self) -> None:
        """Let the user edit the last answer, and save the edited answer as training data. If there are two
        last answers, side by side, the right one is edited.
        """
        turn = self.conversation.last_answered(1)
        if turn is None:
            self.notify("There is no answer to edit yet.")
            return
        answer = [each for each in turn.answers.values() if each.text.strip()][-1]

        def record(text: str) -> None:
            self.conversation.record_edit(turn, answer, text)
            self._notify_recorded("edits", "the edited answer")
            answer.show_judgment("edited")

        self.ask(AnswerEditor(adapter_label(answer.adapter_name), answer.text.strip()), record)

    def _notify_recorded(self, kind: ChoiceKind, what: str) -> None:
        """Notify the user that ``what`` was saved, and how many judgments there are of its kind."""
        count = self.conversation.choice_counts[kind]
        if count < ENOUGH:
            self.notify(f"Saved: {what} ({count} of the {ENOUGH} needed to train).")
        else:
            number = pluralize(count, _CHOICES[kind])
            self.notify(f"Saved: {what}. Press {key_name('chat.train_choices')} to train on {number}.")
        self.show_header()

    async def action_train_on_choices(self) -> None:
        """Prepare a run that trains on the saved edits if there are enough, otherwise on the saved choices.
        If there are too few of both, notify the user.
        """
        source, run = self.conversation.source, self.conversation.run_dir
        if source is None:
            return
        counts = self.conversation.choice_counts
        kind = next((kind for kind in _CHOICES if counts[kind] >= ENOUGH), None)
        if kind is None:
            so_far = ", ".join(pluralize(counts[kind], _CHOICES[kind]) for kind in reversed(_CHOICES))
            self.notify(
                f"{so_far} so far; training needs {ENOUGH} choices or {ENOUGH} edits. "
                f"{key_name('chat.prefer_right')} and {key_name('chat.prefer_left')} record a choice, "
                f"{key_name('chat.edit_answer')} an edit."
            )
            return
        run_id = run.id if run is not None and source.adapters else ""
        if self.app.load_recipe(recipe_on_choices(source.recipe, kind, run_id)):
            start = f", starting from the adapter of {run_id}" if run_id else ""
            self.notify_undoable(f"Prepared a run that trains on your {kind}{start}.")
        await prepare_run(self.app)

    # What is shown around the conversation

    def on_descendant_focus(self) -> None:
        """When the focus moves, update the title of the prompt field, which names keys, and the footer, which
        leaves these keys out.
        """
        self.call_later(self._show_prompt_length, None)
        self.call_later(self.refresh_bindings)

    def on_resize(self) -> None:
        self.call_after_refresh(self.show_header)
        self.call_after_refresh(lambda: self.show_effect(self._effect))

    def on_conversation_changed(self, event: Conversation.Changed) -> None:
        """Show the new state of the conversation."""
        self.show_header(event.doing)
        self.refresh_bindings()

    def on_conversation_effect_changed(self, event: Conversation.EffectChanged) -> None:
        """Show the adapter's effect or, while it is still being measured, the progress of the measurement."""
        self.show_effect(event.effect)

    def show_effect(self, effect: str | Effect) -> None:
        self._effect = effect
        text = Content(effect) if isinstance(effect, str) else effect_text(effect, self._room)
        self.query_one("#effect").display = bool(effect)
        self.query_one("#effect", Lines).show(text)

    @property
    def _main_width(self) -> int:
        # Before the first layout the column has no width.
        return self.query_one(ChatMain).size.width or self.size.width

    def _show_start(self) -> None:
        is_described = bool(self.query_one(ChatSide).display)
        hides_facts = bool(self.search)
        self.query_one(ChatMain).show_start(self._start, is_described=is_described, hides_facts=hides_facts)

    @property
    def _room(self) -> int:
        """Width of a line inside the chat panel, in cells."""
        has_border = self.has_class("-tall") and not self.has_class("-narrow")
        return self._main_width - (_FRAME if has_border else _SHORT_FRAME)

    def show_header(self, doing: str = "") -> None:
        """Update everything around the turns. ``doing``: the current activity; empty if there is none."""
        chat, has_source = self.conversation, self.conversation.source is not None
        # If the window is not wide enough for two answers and the side column, two answers take the whole
        # width.
        side_from = _SIDE_CELLS if len(chat.pair.active) == 1 else VERY_WIDE_CELLS
        has_side = self.size.width >= side_from and self.size.height >= TALL_CELLS
        self.query_one("#chat-empty").display = not has_source
        self.set_class(has_source, "-answering")
        self.set_class(chat.is_new, "-start")
        self.query_one(ChatSide).display = has_source and has_side
        self._show_start()
        if not self.query_one(PromptBox).text:
            self._show_prompt_length(None)
        self.query_one("#prompt-panel").display = has_source
        # A short window has a row for the settings before the first message, and later if one was changed.
        is_short = self.size.height < TALL_CELLS
        has_facts = chat.is_new or not is_short or not has_default_settings(chat)
        self.query_one("#sampling-line").display = has_source and not has_side and has_facts
        unloaded = unloaded_text(chat, self.app.system_status.loaded_server)
        self.query_one("#unloaded", Lines).show(Content.styled(unloaded, "$warning"))
        self.query_one("#unloaded").display = bool(unloaded)
        panel = self.query_one("#chat-panel", Panel)
        if not has_source:
            panel.show_title("Chat")
            return
        loaded = "loaded" if has_side or not chat.ready else loaded_text(chat.ready, is_brief=is_short)
        state = doing or (loaded if chat.ready else "not loaded yet")
        if self.search:
            matching = sum(turn.contains(self.search) for turn in chat.turns)
            state = f"/{truncate_middle(self.search, _MAX_SEARCH)} in {matching} of {len(chat.turns)}"
        width = self._main_width - _TITLE_FRAME
        panel.show_title(session_line(self.source_name, chat.pair, self._start, state, width))
        transcript = transcript_path(chat.run_dir)
        path = transcript if transcript.exists() else None
        self.query_one("#sampling-line", Lines).show(sampling_line(chat, path, self._room))
        if has_side:
            self.query_one(ChatSide).show(chat, self._start, path)
        self._focus_starters()


async def show_chat(app: QloraApp, run: RunDir) -> None:
    """Switch to the Chat screen, and chat with this run."""
    await app.switch_mode("chat")
    await cast("ChatScreen", app.screen).chat_with(run)
