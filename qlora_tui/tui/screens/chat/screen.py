"""Chat: base and adapter answering the same prompt, from one copy of the model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from textual import work
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static, TextArea

from qlora_tui.chat.chat_types import Effect
from qlora_tui.engine.client import EngineClosedError
from qlora_tui.engine.protocol import CountTokens, TokensCounted
from qlora_tui.errors import UserError
from qlora_tui.formatting import truncate_middle
from qlora_tui.runs.directory import RunDir
from qlora_tui.tui import clock
from qlora_tui.tui.breakpoints import TALL_CELLS
from qlora_tui.tui.key_names import highlight_keys, key_name, name_keys
from qlora_tui.tui.screens.chat import side_text, transcript
from qlora_tui.tui.screens.chat import text as chat_text
from qlora_tui.tui.screens.chat.actions import ChatActions
from qlora_tui.tui.screens.chat.prompt_box import PromptBox
from qlora_tui.tui.screens.chat.saved_conversations import list_conversations
from qlora_tui.tui.screens.chat.source_picker import chat_runs
from qlora_tui.tui.widgets.line_widgets import update_if_changed
from qlora_tui.tui.widgets.panel import Panel

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp

_TYPING_ACTIONS = ("stop", "leave_field", "toggle_adapter", "scroll_conversation", "thinking", "unfold")
"""Actions whose keys are no text: the footer shows no others while a prompt is written."""
_SIDE_CELLS = 120
"""Width from which two answers leave room for a column beside them."""
_COUNT_AFTER_S = 0.3
"""Time without a key before the tokens of a prompt are counted."""
_MAX_SEARCH = 24
"""Cells of the text searched for in the title."""
_TITLE_FRAME, _FRAME, _SHORT_FRAME = 6, 4, 2
"""Cells of a panel around its title, and around its contents with and without a border."""


class ChatScreen(ChatActions):
    """One prompt, answered by one or two adapters."""

    MODE = "chat"
    CSS_PATH = "chat.tcss"
    HELP_TEXT = (
        "Base and adapter answer the same prompt with the same seed, from one copy of the model; "
        "{chat.adapter} lets only one of them answer. Beside an answer are its tokens, their number in a "
        "second, and how long the first was waited for. context is how many tokens a conversation can have. "
        "While "
        "the prompt field has the focus, every character goes into it. {chat.stop} stops an answer; "
        "if none is running, {chat.leave} leaves the field, so that {go.home} to {go.chat} and the keys "
        "below work. {chat.write} returns to the field. Each conversation is saved in the chats folder "
        "of the run, as Markdown; {chat.history} continues an earlier one, {chat.copy} copies the last "
        "answer, {chat.search} shows only exchanges with a text. An answer that repeats a sentence three "
        "times in a row is stopped.\n"
        "What the model thinks before it answers is folded into one line: {chat.unfold} shows it. "
        "{chat.thinking} turns thinking on and off; it starts as the run was trained. Each has a second key "
        "for use while you type, listed below. {chat.effect} "
        "measures what the adapter changes. KL is the distance between its next-token distribution and "
        "the base model's (0: identical). The columns show for each layer how far its weights moved, "
        "relative to their size."
    )

    def __init__(self) -> None:
        super().__init__()
        self._effect: str | Effect = ""

    def compose_body(self) -> Iterable[Widget]:
        with Horizontal(id="chat-body"):
            with Vertical(id="chat-main"):
                with Panel("Chat", id="chat-panel"):
                    yield Static(id="sampling-line")
                    yield Static(id="effect", markup=False)
                    with VerticalScroll(id="conversation", can_focus=False):
                        yield Static(
                            highlight_keys(name_keys(chat_text.NOTHING_TO_CHAT_WITH)), id="chat-empty"
                        )
                        yield Static(highlight_keys(name_keys(chat_text.START)), id="chat-start")
                yield Panel("Message", PromptBox(name_keys(chat_text.HINT), id="prompt"), id="prompt-panel")
            with Vertical(id="chat-side"):
                yield Panel(
                    "Sampling",
                    Static(id="side-settings"),
                    keys=(("chat.settings", "change"), ("chat.source", "model")),
                )
                yield Panel("Tokens", Static(id="side-tokens"))
                yield Panel(
                    "Conversations",
                    Static(id="side-history"),
                    keys=(("chat.history", "open"), ("chat.clear", "new")),
                    id="history-panel",
                )

    def on_screen_resume(self) -> None:
        """Talk to the newest run, until another is chosen; and once that one is deleted."""
        deleted = self.run_dir is not None and not self.run_dir.path.exists() and not self.busy
        if deleted:
            self.notify(f"{self.source_name} was deleted.")
        runs = chat_runs() if deleted or self.source is None else []
        if runs:
            self.call_later(self.chat_with, runs[0])
        elif deleted:
            self.call_later(self.set_source, None, None, "")
        self.show_header()

    def on_resize(self) -> None:
        has_side = self.size.width >= _SIDE_CELLS and self.size.height >= TALL_CELLS
        self.set_class(has_side, "-side")
        self.call_after_refresh(self._show_all)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys that would be typed are no commands while the field has the focus; few are without a model."""
        is_own = any(action == command.action.partition("(")[0] for command in self.SCREEN_COMMANDS)
        if self.source is None and is_own:
            return action in ("choose_source", "settings")
        typing = isinstance(self.focused, PromptBox)
        if action == "stop":
            return self.busy
        if action == "leave_field":
            return typing and not self.busy
        if typing and action not in _TYPING_ACTIONS:
            return not is_own
        return super().check_action(action, parameters)

    async def on_prompt_box_sent(self, event: PromptBox.Sent) -> None:
        """Send the prompt."""
        if self.busy:
            self.query_one(PromptBox).put(event.text)
            self.notify(f"The model is still answering. Press {key_name('chat.stop')} to stop it.")
            return
        # What is asked now is shown, whatever was searched for.
        self.search_for("")
        await self.send(event.text)

    async def on_prompt_box_recalled(self) -> None:
        """Up in the empty field: the last prompt again."""
        await self.action_edit_last()

    def on_text_area_changed(self, event: TextArea.Changed) -> None:
        """Say how long the prompt is."""
        self._show_prompt_length(None)
        if self.ready is not None and event.text_area.text:
            self._count_tokens(event.text_area.text)

    @work(group="count", exclusive=True)
    async def _count_tokens(self, text: str) -> None:
        await asyncio.sleep(_COUNT_AFTER_S)
        try:
            async for reply in self.engine.ask(CountTokens(text=text)):
                if isinstance(reply, TokensCounted) and text == self.query_one(PromptBox).text:
                    self._show_prompt_length(reply.tokens)
        except (EngineClosedError, UserError):
            # It was unloaded meanwhile: the estimate stays.
            return

    def _show_prompt_length(self, tokens: int | None) -> None:
        title = side_text.prompt_title(self.query_one(PromptBox).text, tokens)
        self.query_one("#prompt-panel", Panel).show_title(title)

    def _show_all(self) -> None:
        self.show_header()
        self.show_effect(self._effect)

    def show_effect(self, effect: str | Effect) -> None:
        self._effect = effect
        text = Content(effect) if isinstance(effect, str) else chat_text.effect_text(effect, self._room)
        self.query_one("#effect").display = bool(effect)
        update_if_changed(self.query_one("#effect", Static), text)

    @property
    def _main_width(self) -> int:
        # Before the first layout the column has no width.
        return self.query_one("#chat-main").size.width or self.size.width

    @property
    def _room(self) -> int:
        """Cells of a line beside the border of the panel."""
        has_border = self.has_class("-tall") and not self.has_class("-narrow")
        return self._main_width - (_FRAME if has_border else _SHORT_FRAME)

    def show_header(self, doing: str = "") -> None:
        has_source = self.source is not None
        self.query_one("#chat-empty").display = not has_source
        self.query_one("#chat-start").display = has_source and not self.turns
        self.query_one("#prompt-panel").display = has_source
        self.query_one("#chat-side").display = has_source and self.has_class("-side")
        self.query_one("#sampling-line").display = has_source and not self.has_class("-side")
        panel = self.query_one("#chat-panel", Panel)
        if not has_source:
            panel.show_title("Chat")
            return
        loaded = "loaded" if self.has_class("-side") or not self.ready else chat_text.loaded_text(self.ready)
        state = doing or (loaded if self.ready else "not loaded yet")
        path = transcript.transcript_path(self.run_dir)
        width = self._main_width - _TITLE_FRAME
        if self.search:
            matching = sum(turn.contains(self.search) for turn in self.turns)
            state = f"/{truncate_middle(self.search, _MAX_SEARCH)} in {matching} of {len(self.turns)}"
        panel.show_title(chat_text.session_line(self.source_name, self.pair, state, width))
        thinking = chat_text.thinking_text(self.thinking, self.ready)
        line = chat_text.sampling_line(
            self.sampling,
            self.system_prompt,
            path if path.exists() else None,
            self._room,
            thinking,
            chat_text.answering_text(self.pair),
        )
        update_if_changed(self.query_one("#sampling-line", Static), line)
        if self.has_class("-side"):
            self._show_side(path if path.exists() else None)

    def _show_side(self, path: Path | None) -> None:
        settings = self.query_one("#side-settings", Static)
        width = max(20, settings.content_size.width)
        lines = side_text.settings_lines(
            self.sampling, self.system_prompt, self.pair, self.thinking, self.ready
        )
        update_if_changed(settings, Content("\n").join(lines))
        outcomes = {
            name: answer.outcome
            for turn in self.turns
            for name, answer in turn.answers.items()
            if answer.outcome is not None
        }
        tokens = side_text.token_lines(outcomes, self.ready, width)
        update_if_changed(self.query_one("#side-tokens", Static), Content("\n").join(tokens))
        self._show_history(path, width)

    @work(group="history", exclusive=True)
    async def _show_history(self, path: Path | None, width: int) -> None:
        saved = await asyncio.to_thread(list_conversations, self.run_dir)
        lines = side_text.history_lines(saved, path, clock.now(), width)
        update_if_changed(self.query_one("#side-history", Static), Content("\n").join(lines))


async def show_chat(app: QloraApp, run: RunDir) -> None:
    """Go to the chat and talk to ``run``."""
    await app.switch_mode("chat")
    await cast("ChatScreen", app.screen).chat_with(run)
