"""Chat: base and adapter answering the same prompt, from one copy of the model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, cast

from textual.containers import VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Input, Static

from qlora_tui.chat.sources import of_run
from qlora_tui.chat.terms import ADAPTER, BASE, ChatSource, Sampling
from qlora_tui.data.conversation import Message
from qlora_tui.engine.client import Answer, EngineClient
from qlora_tui.engine.protocol import ChatReady, Done, Generate, LoadChat, Stage, Text
from qlora_tui.errors import Problem
from qlora_tui.format import size
from qlora_tui.runs.directory import RunDir
from qlora_tui.tui.commands import Command
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.screens.chat_settings import ChatSettingsScreen
from qlora_tui.tui.screens.chat_source import ChatSourceScreen, runs_to_talk_to
from qlora_tui.tui.screens.question import QuestionScreen
from qlora_tui.tui.transcript import append_exchange
from qlora_tui.tui.widgets.chat_turn import ChatTurn

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp

NOBODY = Content.from_markup(
    "[b]There is nobody to talk to yet.[/b]\n\nA run that has finished, or saved a checkpoint, "
    "can be talked to. Press [b]5[/b] to launch one."
)


def _command(id_: str, key: str, action: str, label: str, help_: str, *, in_footer: bool = True) -> Command:
    return Command(
        id=f"chat.{id_}", key=key, action=action, label=label, help=help_, in_footer=in_footer, verb="chat"
    )


class ChatScreen(WorkScreen):
    """One prompt, one or two voices."""

    MODE = "chat"
    CSS_PATH = "chat.tcss"
    HELP_TEXT = (
        "The base and the adapter answer from one copy of the model. Enter sends, escape stops an answer or "
        "leaves the field; then the keys below work. i goes back to typing."
    )
    ACTIONS: ClassVar[tuple[Command, ...]] = (
        _command("write", "i,enter", "write", "Write", "Type a prompt."),
        _command("stop", "escape", "stop", "Stop", "Stop the answer, or leave the field."),
        _command(
            "voice", "a,ctrl+t", "switch_voice", "Adapter on/off", "Talk to the adapter, or to the base."
        ),
        _command("split", "s", "split", "Split", "Base and adapter side by side, or one alone."),
        _command("checkpoint", "v", "next_adapter", "Checkpoint", "Another checkpoint of this run."),
        _command("retry", "r", "retry", "Retry", "Answer the last prompt again."),
        _command("edit", "e", "edit_last", "Edit", "Change the last prompt.", in_footer=False),
        _command("settings", "g", "settings", "Settings", "Sampling and system prompt."),
        _command("source", "m", "choose", "Whom", "Talk to another run."),
        _command("clear", "x", "clear", "New", "Begin a new conversation.", in_footer=False),
    )

    def __init__(self) -> None:
        super().__init__()
        self._engine = EngineClient()
        self._run: RunDir | None = None
        self._source: ChatSource | None = None
        self._ready: ChatReady | None = None
        self._adapter = ADAPTER
        self._voices: tuple[str, ...] = (BASE, ADAPTER)
        self._turns: list[ChatTurn] = []
        self._answers: list[Answer] = []
        self._sampling = Sampling()
        self._system_prompt = ""
        self._may_share_card = False

    def compose_body(self) -> Iterable[Widget]:
        yield Static(id="who")
        with VerticalScroll(id="talk", can_focus=False):
            yield Static(NOBODY, id="nobody")
        yield Input(placeholder="say something", id="prompt")

    async def on_unmount(self) -> None:
        """The model's memory goes with the screen."""
        await self._engine.close()

    def on_screen_resume(self) -> None:
        """Talk to the newest run, until another is chosen."""
        super().on_screen_resume()
        if self._run is None and (runs := runs_to_talk_to()):
            self.call_later(self.talk_to, runs[0])
        self._show_who()

    async def talk_to(self, run: RunDir) -> None:
        """Turn to another run; its model is loaded with the first prompt."""
        try:
            source = of_run(run)
        except Problem as problem:
            self.workstation.explain(problem)
            return
        await self.action_clear()
        self._run, self._source, self._ready = run, source, None
        adapters = [voice for voice in source.voices if voice != BASE]
        self._adapter = adapters[0] if adapters else BASE
        self._voices = (BASE, self._adapter) if adapters else (BASE,)
        self._show_who()
        self.query_one(Input).focus()

    async def on_input_submitted(self, event: Input.Submitted) -> None:
        """Send the prompt."""
        if event.value.strip():
            event.input.value = ""
            await self._send(event.value.strip())

    def action_write(self) -> None:
        """Into the field."""
        self.query_one(Input).focus()

    def action_stop(self) -> None:
        """Stop every answer; with none growing, leave the field so that keys are commands."""
        if self._answers:
            for answer in self._answers:
                answer.stop()
        else:
            self.set_focus(None)

    def action_switch_voice(self) -> None:
        """From the adapter to the base and back."""
        self._voices = (BASE,) if self._voices == (self._adapter,) else (self._adapter,)
        self._show_who()

    def action_split(self) -> None:
        """Two columns, or one."""
        self._voices = (self._adapter,) if len(self._voices) > 1 else (BASE, self._adapter)
        self._show_who()

    def action_next_adapter(self) -> None:
        """The next of the run's checkpoints."""
        adapters = [voice for voice in self._source.voices if voice != BASE] if self._source else []
        if not adapters:
            return
        before = self._adapter
        self._adapter = (
            adapters[(adapters.index(before) + 1) % len(adapters)] if before in adapters else adapters[0]
        )
        self._voices = tuple(self._adapter if voice == before else voice for voice in self._voices)
        self._show_who()

    async def action_retry(self) -> None:
        """Ask the last prompt again, of the voices chosen now."""
        if self._turns and not self._answers:
            turn = self._turns.pop()
            await turn.remove()
            await self._send(turn.prompt)

    async def action_edit_last(self) -> None:
        """Put the last prompt back into the field, and forget its answers."""
        if self._turns and not self._answers:
            turn = self._turns.pop()
            await turn.remove()
            field = self.query_one(Input)
            field.value = turn.prompt
            field.focus()

    def action_settings(self) -> None:
        """Sampling and system prompt."""

        def answered(given: tuple[Sampling, str] | None) -> None:
            if given is not None:
                self._sampling, self._system_prompt = given
                self._show_who()

        self.app.push_screen(ChatSettingsScreen(self._sampling, self._system_prompt), answered)

    def action_choose(self) -> None:
        """Another run."""

        async def answered(run: RunDir | None) -> None:
            if run is not None:
                await self.talk_to(run)

        self.app.push_screen(ChatSourceScreen(), answered)

    async def action_clear(self) -> None:
        """Begin a new conversation."""
        for answer in self._answers:
            answer.stop()
        self._turns.clear()
        await self.query(ChatTurn).remove()

    async def _send(self, prompt: str) -> None:
        if self._source is None or self._run is None:
            return
        active = self.workstation.pulse.active
        if self._ready is None and active is not None and not self._may_share_card:

            async def answered(yes: bool | None) -> None:
                self._may_share_card = bool(yes)
                if yes:
                    await self._send(prompt)

            question = QuestionScreen(
                "A run is in training",
                f"{active.id} is using the card. With the model beside it, either may run out of memory.",
                yes="Load it all the same",
            )
            self.app.push_screen(question, answered)
            return
        turn = ChatTurn(prompt, self._voices)
        self._turns.append(turn)
        talk = self.query_one("#talk", VerticalScroll)
        await talk.mount(turn)
        talk.anchor()
        self.run_worker(self._answer(turn), group="answers", exit_on_error=True)

    async def _answer(self, turn: ChatTurn) -> None:
        try:
            await self._load()
            await asyncio.gather(*(self._speak(turn, voice) for voice in turn.answers))
        except Problem as problem:
            for answer in turn.answers.values():
                await answer.fail(problem.title)
            self._ready = None
            self._show_who()
            self.workstation.explain(problem)
            return
        if self._run is not None:
            texts = {voice: answer.text for voice, answer in turn.answers.items()}
            append_exchange(self._run, turn.prompt, texts)

    async def _load(self) -> None:
        if self._ready is not None or self._source is None:
            return
        async for reply in self._engine.ask(LoadChat(source=self._source)):
            if isinstance(reply, Stage):
                self._show_who(reply.words)
            elif isinstance(reply, ChatReady):
                self._ready = reply
        self._show_who()

    async def _speak(self, turn: ChatTurn, voice: str) -> None:
        request = Generate(messages=self._conversation(turn, voice), voice=voice, sampling=self._sampling)
        answer = self._engine.ask(request)
        self._answers.append(answer)
        try:
            async for reply in answer:
                if isinstance(reply, Text):
                    await turn.answers[voice].grow(reply.piece)
                elif isinstance(reply, Done):
                    await turn.answers[voice].end(reply.outcome)
        finally:
            self._answers.remove(answer)

    def _conversation(self, turn: ChatTurn, voice: str) -> tuple[Message, ...]:
        """What this voice has heard and said so far; where it was silent, nothing."""
        messages = [Message("system", self._system_prompt)] if self._system_prompt else []
        for earlier in self._turns[: self._turns.index(turn)]:
            said = earlier.answers.get(voice)
            if said is not None and said.text:
                messages += [Message("user", earlier.prompt), Message("assistant", said.text)]
        return (*messages, Message("user", turn.prompt))

    def _show_who(self, doing: str = "") -> None:
        self.query_one("#nobody").display = self._run is None
        self.query_one(Input).display = self._run is not None
        if self._run is None:
            self.query_one("#who", Static).update("")
            return
        state = doing or ("loads with the first prompt" if self._ready is None else _held(self._ready))
        voices = " | ".join(self._voices)
        self.query_one("#who", Static).update(
            Content.assemble((self._run.id, "bold"), f"  {voices}  ", (state, "dim"))
        )


async def show_chat(app: QloraApp, run: RunDir) -> None:
    """Go to the chat and talk to ``run``."""
    await app.switch_mode("chat")
    await cast("ChatScreen", app.screen).talk_to(run)


def _held(ready: ChatReady) -> str:
    return f"{ready.device}, {ready.dtype}, {size(ready.held_bytes)}"
