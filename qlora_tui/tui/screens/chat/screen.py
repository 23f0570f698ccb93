"""Chat: base and adapter answering the same prompt, from one copy of the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, cast

from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from qlora_tui.chat.chat_sources import run_source
from qlora_tui.chat.chat_types import BASE, ChatSource, Sampling
from qlora_tui.chat.effect import Effect
from qlora_tui.errors import UserError
from qlora_tui.runs.directory import RunDir
from qlora_tui.tui.commands import Command
from qlora_tui.tui.key_names import highlight_keys, key_name, name_keys
from qlora_tui.tui.screens.chat import text as chat_text
from qlora_tui.tui.screens.chat import transcript
from qlora_tui.tui.screens.chat.adapter_pair import AdapterPair
from qlora_tui.tui.screens.chat.chat_turn import ChatTurn
from qlora_tui.tui.screens.chat.commands import COMMANDS
from qlora_tui.tui.screens.chat.conversation_screen import ConversationScreen
from qlora_tui.tui.screens.chat.prompt_box import PromptBox
from qlora_tui.tui.screens.chat.sampling_settings import ChatSettingsScreen
from qlora_tui.tui.screens.chat.source_picker import ChatSourceScreen, chat_runs
from qlora_tui.tui.widgets.static_update import update_if_changed

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp

_TYPING_ACTIONS = ("stop", "leave_field", "toggle_adapter", "scroll_conversation", "thinking", "unfold")
"""Actions whose keys are no text: the footer shows no others while a prompt is written."""


class ChatScreen(ConversationScreen):
    """One prompt, answered by one or two adapters."""

    MODE = "chat"
    CSS_PATH = "chat.tcss"
    HELP_TEXT = (
        "Base and adapter answer the same prompt with the same seed, from one copy of the model. While "
        "the prompt field has the focus, every character goes into it. {chat.stop} stops an answer; "
        "if none is running, {chat.leave} leaves the field, so that {go.home} to {go.chat} and the keys "
        "below work. {chat.write} returns to the field. Each conversation is saved in the chats folder "
        "of the run, as Markdown.\n"
        "What the model thinks before it answers is folded into one line: {chat.unfold} shows it. "
        "{chat.thinking} turns thinking on and off; it starts as the run was trained. Each has a second key "
        "for use while you type, listed below. {chat.effect} "
        "measures what the adapter changes. KL is the distance between its next-token distribution and "
        "the base model's (0: identical). The columns show for each layer how far its weights moved, "
        "relative to their size."
    )
    SCREEN_COMMANDS: ClassVar[tuple[Command, ...]] = COMMANDS

    def __init__(self) -> None:
        super().__init__()
        self._source_name = ""
        self._effect: str | Effect = ""

    def compose_body(self) -> Iterable[Widget]:
        with Vertical(id="chat-header"):
            yield Static(id="session-line")
            yield Static(id="sampling-line")
            yield Static(id="effect", markup=False)
        with VerticalScroll(id="conversation", can_focus=False):
            yield Static(highlight_keys(name_keys(chat_text.NOTHING_TO_CHAT_WITH)), id="chat-empty")
        yield PromptBox(name_keys(chat_text.HINT), id="prompt")

    def on_screen_resume(self) -> None:
        """Talk to the newest run, until another is chosen; and once that one is deleted."""
        deleted = self.run_dir is not None and not self.run_dir.path.exists() and not self.busy
        if deleted:
            self.notify(f"{self._source_name} was deleted.")
        runs = chat_runs() if deleted or self.source is None else []
        if runs:
            self.call_later(self.chat_with, runs[0])
        elif deleted:
            self.call_later(self._set_source, None, None, "")
        self.show_header()

    def on_resize(self) -> None:
        self.show_header()
        self.show_effect(self._effect)

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

    async def chat_with(self, run: RunDir) -> None:
        """Turn to another run; its model is loaded with the first prompt."""
        try:
            source = run_source(run)
        except UserError as problem:
            self.qlora_app.show_error(problem)
            return
        if run == self.run_dir and source == self.source:
            self.query_one(PromptBox).focus()
            return
        await self._set_source(source, run, run.name)
        if not source.adapters:
            self.notify(
                f"{run.name} has saved no adapter, so only the base model answers.", severity="warning"
            )

    async def _set_source(self, source: ChatSource | None, run: RunDir | None, name: str) -> None:
        await self.action_clear()
        before = self.source
        same_base = before is not None and source is not None and before.recipe.model == source.recipe.model
        self.source, self.run_dir, self._source_name = source, run, name
        self.thinking = "auto" if source is None else source.thinking
        self.pair = AdapterPair.of((BASE,) if source is None else source.answer_names)
        self.ready = None
        if not same_base and self.engine.pid is not None:
            # The model loaded before is no longer needed.
            await self.engine.close()
        self.show_effect("")
        self.show_header()
        self.query_one(PromptBox).focus()

    async def on_prompt_box_sent(self, event: PromptBox.Sent) -> None:
        """Send the prompt."""
        if self.busy:
            self.query_one(PromptBox).put(event.text)
            self.notify(f"The model is still answering. Press {key_name('chat.stop')} to stop it.")
            return
        await self.send(event.text)

    async def on_prompt_box_recalled(self) -> None:
        """Up in the empty field: the last prompt again."""
        await self.action_edit_last()

    def action_write(self) -> None:
        """Into the field."""
        if self.source is not None:
            self.query_one(PromptBox).focus()

    async def action_stop(self) -> None:
        """Stop what is under way."""
        for answer in self.answers:
            answer.stop()
        if not self.answers:
            # A model that is loading cannot be interrupted, so its process is ended.
            self.show_header("Stopping")
            await self.engine.close()

    def action_leave_field(self) -> None:
        """Out of the field: keys are commands again."""
        self.set_focus(None)

    def action_toggle_adapter(self) -> None:
        """From the adapter to the base and back."""
        self._choose(self.pair.switched())

    def action_thinking(self) -> None:
        """Turn thinking on or off; say so where the model has no such switch."""
        if self.source is None:
            return
        known = self.ready.thinking if self.ready else None
        default = known.default if known else "off"
        now = default if self.thinking == "auto" else self.thinking
        self.thinking = "off" if now == "on" else "on"
        if known is not None and (effect := known.effect_of(self.thinking)):
            if known.kind != "effort":
                self.thinking = "auto"
            self.notify(effect)
        self.show_header()

    async def action_unfold(self) -> None:
        """Show every thought, or fold each into a line."""
        self.unfolded = not self.unfolded
        for turn in self.turns:
            for answer in turn.answers.values():
                await answer.unfold(self.unfolded)

    def action_split(self) -> None:
        """Two columns, or one."""
        self._choose(self.pair.split())

    def action_next_adapter(self, side: str) -> None:
        """Another of the run's checkpoints."""
        self._choose(self.pair.next(side))

    async def action_retry(self) -> None:
        """Answer the last prompt again with the adapters selected now."""
        if self.turns and not self.busy:
            await self.send((await self._remove_last_turn()).prompt)

    async def action_edit_last(self) -> None:
        """Put the last prompt back into the field, and forget its answers."""
        if self.turns and not self.busy:
            self.query_one(PromptBox).put((await self._remove_last_turn()).prompt)

    def action_settings(self) -> None:
        """Sampling and system prompt."""

        def on_result(given: tuple[Sampling, str] | None) -> None:
            if given is not None:
                self.sampling, self.system_prompt = given
                self.show_header()

        self.app.push_screen(ChatSettingsScreen(self.sampling, self.system_prompt), on_result)

    def action_choose_source(self) -> None:
        """Another run."""
        recipe = self.qlora_app.workbench.recipe

        async def on_result(chosen: RunDir | str | None) -> None:
            if isinstance(chosen, RunDir):
                await self.chat_with(chosen)
            elif chosen is not None:
                name = recipe.model.id.rstrip("/").rpartition("/")[2]
                source = ChatSource(recipe=recipe, thinking=recipe.data.thinking)
                await self._set_source(source, None, name)

        runs = chat_runs()
        if runs or recipe.model.id:
            self.app.push_screen(ChatSourceScreen(runs, recipe.model.id), on_result)
        else:
            self.notify(
                "No run has an adapter and the recipe has no model. "
                f"Press {key_name('go.models')} to select one."
            )

    async def action_clear(self) -> None:
        """Begin a new conversation."""
        for answer in self.answers:
            answer.stop()
        self.turns.clear()
        await self.query(ChatTurn).remove()

    async def action_unload(self) -> None:
        """Unload the model; the next prompt loads it again."""
        await self.engine.close()
        self.ready = None
        self.show_header()

    def action_scroll_conversation(self, by: int) -> None:
        """Up or down by some lines."""
        self.query_one("#conversation", VerticalScroll).scroll_relative(y=3 * by, animate=False)

    async def action_effect(self) -> None:
        """Measure what the adapter changes."""
        if self.pair.single:
            self.notify("This chat has no adapter to measure.")
        elif not self.busy:
            await self.confirm_shared_memory(self.measure)

    def _choose(self, pair: AdapterPair) -> None:
        if pair == self.pair and self.source is not None:
            self.notify("This run has no other adapter or checkpoint.")
        self.pair = pair
        self.show_header()

    async def _remove_last_turn(self) -> ChatTurn:
        turn = self.turns.pop()
        await turn.remove()
        return turn

    def show_effect(self, effect: str | Effect) -> None:
        self._effect = effect
        shown = (
            Content(effect) if isinstance(effect, str) else chat_text.effect_text(effect, self.size.width - 2)
        )
        self.query_one("#effect").display = bool(effect)
        update_if_changed(self.query_one("#effect", Static), shown)

    def show_header(self, doing: str = "") -> None:
        has_source = self.source is not None
        self.query_one("#chat-empty").display = not has_source
        self.query_one("#chat-header").display = has_source
        self.query_one(PromptBox).display = has_source
        if not has_source:
            return
        state = doing or (chat_text.loaded_text(self.ready) if self.ready else "not loaded yet")
        path = transcript.transcript_path(self.run_dir)
        # Not the line's own width, which is known only once it has been shown.
        width = self.size.width - 2
        self.query_one("#session-line", Static).update(
            chat_text.session_line(self._source_name, self.pair, state, width)
        )
        thinking = chat_text.thinking_text(self.thinking, self.ready)
        line = chat_text.sampling_line(
            self.sampling,
            self.system_prompt,
            path if path.exists() else None,
            width,
            thinking,
            chat_text.answering_text(self.pair),
        )
        self.query_one("#sampling-line", Static).update(line)


async def show_chat(app: QloraApp, run: RunDir) -> None:
    """Go to the chat and talk to ``run``."""
    await app.switch_mode("chat")
    await cast("ChatScreen", app.screen).chat_with(run)
