"""What the keys of the Chat screen do."""

from __future__ import annotations

from pathlib import Path

from textual.containers import VerticalScroll

from qlora_tui.chat.chat_sources import run_source
from qlora_tui.chat.chat_types import BASE, ChatSource, Sampling
from qlora_tui.errors import UserError
from qlora_tui.runs.directory import RunDir
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.screens.chat.adapter_pair import AdapterPair
from qlora_tui.tui.screens.chat.chat_turn import ChatTurn
from qlora_tui.tui.screens.chat.choice_actions import ChoiceActions
from qlora_tui.tui.screens.chat.conversation_picker import ConversationPicker
from qlora_tui.tui.screens.chat.prompt_box import PromptBox
from qlora_tui.tui.screens.chat.sampling_settings import ChatSettingsScreen
from qlora_tui.tui.screens.chat.saved_conversations import SavedConversation, list_conversations
from qlora_tui.tui.screens.chat.source_picker import ChatSourceScreen, chat_runs
from qlora_tui.tui.screens.modals.dialogs import ask_search
from qlora_tui.tui.ui_state import add_recent, recent


class ChatActions(ChoiceActions):
    """A conversation that keys act on."""

    def __init__(self) -> None:
        super().__init__()
        self.source_name = ""
        self.search = ""
        """The text that exchanges are searched for; empty shows all."""

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
        await self.set_source(source, run, run.name)
        if not source.adapters:
            self.notify(
                f"{run.name} has saved no adapter, so only the base model answers.", severity="warning"
            )

    async def set_source(self, source: ChatSource | None, run: RunDir | None, name: str) -> None:
        await self.action_clear()
        before = self.source
        same_base = before is not None and source is not None and before.recipe.model == source.recipe.model
        self.source, self.run_dir, self.source_name = source, run, name
        self.thinking = "auto" if source is None else source.thinking
        self.pair = AdapterPair.of((BASE,) if source is None else source.answer_names)
        self.ready = None
        if not same_base and self.engine.pid is not None:
            # The model loaded before is no longer needed.
            await self.engine.close()
        self.show_effect("")
        self.show_header()
        self.query_one(PromptBox).focus()

    def action_write(self) -> None:
        """Into the field."""
        if self.source is not None:
            self.query_one(PromptBox).focus()

    async def action_stop(self) -> None:
        """Stop what is under way."""
        for request in self.open_requests:
            request.stop()
        if not self.open_requests:
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
                add_recent("system_prompts", self.system_prompt)
                self.show_header()

        settings = ChatSettingsScreen(self.sampling, self.system_prompt, recent("system_prompts"))
        self.app.push_screen(settings, on_result)

    def action_choose_source(self) -> None:
        """Another run."""
        recipe = self.qlora_app.workbench.recipe

        async def on_result(chosen: RunDir | str | None) -> None:
            if isinstance(chosen, RunDir):
                await self.chat_with(chosen)
            elif chosen is not None:
                name = recipe.model.id.rstrip("/").rpartition("/")[2]
                source = ChatSource(recipe=recipe, thinking=recipe.data.thinking)
                await self.set_source(source, None, name)

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
        for request in self.open_requests:
            request.stop()
        self.turns.clear()
        self.search = ""
        self.conversation_path = None
        await self.query(ChatTurn).remove()
        self.show_header()

    def action_history(self) -> None:
        """Choose a saved conversation to continue."""
        conversations = list_conversations(self.run_dir)
        if not conversations:
            self.notify("No conversation with this run has been saved yet.")
            return

        async def on_result(path: Path | None) -> None:
            if path is not None:
                await self._open_conversation(path, dict(conversations)[path])

        self.app.push_screen(ConversationPicker(conversations), on_result)

    def action_search(self) -> None:
        """Ask for a text that exchanges must contain."""
        ask_search(self.app, "exchanges", self.search, self.search_for)

    def search_for(self, text: str) -> None:
        """Show only exchanges with this text."""
        self.search = text
        for turn in self.turns:
            turn.display = turn.contains(text)
        self.show_header()

    def action_copy(self, side: str) -> None:
        """Copy the last answer of one side."""
        name = self.pair.left if side == "left" else self.pair.right
        answers = [turn.answers[name] for turn in self.turns if name in turn.answers]
        if not answers or not answers[-1].text:
            self.notify(f"There is no answer of {name} to copy yet.")
            return
        self.app.copy_to_clipboard(answers[-1].text.strip())

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

    async def _open_conversation(self, path: Path, saved: SavedConversation) -> None:
        """Show a saved conversation; the next prompt continues it."""
        await self.action_clear()
        self.conversation_path, self.system_prompt = path, saved.system_prompt
        conversation = self.query_one("#conversation", VerticalScroll)
        for exchange in saved.turns:
            turn = ChatTurn(exchange.prompt, tuple(exchange.answers), unfolded=self.unfolded)
            self.turns.append(turn)
            await conversation.mount(turn)
            for name, answer in exchange.answers.items():
                await turn.answers[name].show_saved(answer.text, answer.thought)
        conversation.anchor()
        self.show_header()
        self.query_one(PromptBox).focus()
