"""The conversation with the engine: which model it has loaded, requests, and where the answers go."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
from textual import work
from textual.containers import VerticalScroll

from qlora_tui.chat.chat_sources import chat_fits
from qlora_tui.chat.chat_types import BASE, ChatSource, Effect, Sampling
from qlora_tui.data.conversation import Message
from qlora_tui.engine.client import EngineClient, EngineClosedError, ReplyStream
from qlora_tui.engine.protocol import (
    ChatReady,
    EffectMeasured,
    Generate,
    GenerationDone,
    LoadChat,
    MeasureEffect,
    StatusUpdate,
    Text,
)
from qlora_tui.errors import UserError
from qlora_tui.memory.budget import budget_for
from qlora_tui.recipe.schema import Thinking
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import STEP_PHASES
from qlora_tui.runs.status import ACTIVE, Status, read_status
from qlora_tui.tui.key_names import name_keys
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.screens.chat import text as chat_text
from qlora_tui.tui.screens.chat import transcript
from qlora_tui.tui.screens.chat.adapter_pair import AdapterPair
from qlora_tui.tui.screens.chat.chat_turn import ChatTurn
from qlora_tui.tui.screens.chat.prompt_box import PromptBox
from qlora_tui.tui.screens.chat.saved_conversations import new_conversation_path, save_conversation
from qlora_tui.tui.screens.modals.dialogs import ConfirmScreen
from qlora_tui.tui.system_status import SystemStatus

_WARNING_S = 20.0


class ConversationScreen(WorkScreen):
    """The base of the Chat screen: a conversation with the engine, answered by one or two adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = EngineClient()
        self.source: ChatSource | None = None
        self.run_dir: RunDir | None = None
        """None where the source is a model without a run."""
        self.pair = AdapterPair.of((BASE,))
        self.ready: ChatReady | None = None
        """The model that the engine has loaded; None while none is."""
        self.turns: list[ChatTurn] = []
        self.open_requests: list[ReplyStream] = []
        """Those that the engine has not finished."""
        self.busy = False
        self.sampling = Sampling()
        self.system_prompt = ""
        self.thinking: Thinking = "auto"
        """The thinking mode of requests; ``auto`` is the one of the run and the chat template."""
        self.unfolded = False
        """Whether thoughts are shown."""
        self.conversation_path: Path | None = None
        """Where the conversation is saved; None before its first answer."""
        self._last_warning = ""
        self.shares_with: set[str] = set()
        """Runs that the user allowed to share memory with the chat."""

    def on_mount(self) -> None:
        self.qlora_app.system_status_changed.subscribe(self, self._yield_memory_to_run, immediate=True)

    async def on_unmount(self) -> None:
        """The model's memory goes with the screen."""
        # Those who wait for answers have no screen any more to say anything on.
        self.workers.cancel_node(self)
        await self.engine.close()

    def show_header(self, doing: str = "") -> None:
        """Show the model, its adapters, and the current state."""

    def show_effect(self, effect: str | Effect) -> None:
        """Say what the adapter changes, or how far that has come."""

    async def send(self, prompt: str) -> None:
        if self.source is not None:
            await self.confirm_shared_memory(
                lambda: self._answer(prompt), lambda: self.query_one(PromptBox).put(prompt)
            )

    async def confirm_shared_memory(
        self, proceed: Callable[[], object], cancel: Callable[[], object] = lambda: None
    ) -> None:
        """Call ``proceed``; ask first where the chat may not fit beside a run, with ``cancel`` for no."""
        active = self.qlora_app.system_status.active
        if (
            self.ready is not None
            or active is None
            or active.id in self.shares_with
            # What the app last saw may be a second old.
            or (status := read_status(active)).state not in ACTIVE
        ):
            proceed()
            return
        if await self._fits_beside(status):
            self.shares_with.add(active.id)
            proceed()
            return

        def on_result(yes: bool | None) -> None:
            if yes:
                self.shares_with.add(active.id)
                proceed()
            else:
                cancel()

        text = (
            f"{active.id} is training on this machine, and the free memory may not be enough for the chat's "
            "model. If you load it, either may run out of memory. If you do not, nothing is sent, and your "
            "message stays in the field."
        )
        self.app.push_screen(
            ConfirmScreen(
                "A run is training",
                text,
                yes="Load anyway",
                no="Not now",
                is_outdated=lambda: read_status(active).state not in ACTIVE,
            ),
            on_result,
        )

    async def _fits_beside(self, status: Status) -> bool:
        """Whether the chat fits beside the active run, which must have reached the memory it needs."""
        source, machine = self.source, self.qlora_app.system_status
        llama_cpp = source is not None and not source.gguf_files.keys().isdisjoint(self.pair.active)
        if source is None or llama_cpp or status.phase not in STEP_PHASES:
            return False
        free_bytes = machine.free_bytes if machine.gpu else psutil.virtual_memory().available
        return free_bytes is not None and await asyncio.to_thread(
            chat_fits, source.recipe, budget_for(machine.gpu).device, free_bytes
        )

    def _yield_memory_to_run(self, system_status: SystemStatus) -> None:
        """A run that begins gets the memory that the chat holds."""
        active = system_status.active
        if self.ready is not None and active is not None and active.id not in self.shares_with:
            self.ready = None
            self._unload_for(active.id)

    @work
    async def _unload_for(self, run_id: str) -> None:
        await self.engine.close()
        self.show_header()
        self.notify(f"Unloaded the chat model to free memory for {run_id}. The next prompt loads it again.")

    @work(group="answers")
    async def _answer(self, prompt: str) -> None:
        turn = ChatTurn(prompt, self.pair.active, unfolded=self.unfolded)
        if self.turns:
            self.turns[-1].show_question(False)
        self.turns.append(turn)
        conversation = self.query_one("#conversation", VerticalScroll)
        await conversation.mount(turn)
        conversation.anchor()
        self.show_header()
        self._set_busy()
        sampling = self.sampling
        if sampling.seed is None:
            # The same seed for both, so that two answers differ by the adapter only.
            sampling = msgspec.structs.replace(sampling, seed=random.randrange(1 << 32))
        try:
            await self._load()
            await asyncio.gather(
                *(self._generate(turn, adapter_name, sampling) for adapter_name in turn.answers)
            )
        except EngineClosedError:
            for answer in turn.answers.values():
                await answer.stop(name_keys(chat_text.STOPPED_LOADING))
        except UserError as problem:
            for answer in turn.answers.values():
                await answer.fail(problem)
        turn.show_question(True)
        self._save_transcript(turn, sampling)
        self._set_idle()

    async def _load(self) -> None:
        if self.ready is not None or self.source is None:
            return
        self.show_header("Starting the engine")
        async for reply in self.engine.ask(LoadChat(source=self.source)):
            if isinstance(reply, StatusUpdate):
                self.show_header(reply.words)
            elif isinstance(reply, ChatReady):
                self.ready = reply
                if effect := reply.thinking.effect_of(self.thinking):
                    self.notify(effect)
        self.show_header()

    async def _generate(self, turn: ChatTurn, adapter_name: str, sampling: Sampling) -> None:
        """Stream one adapter's answer; an error is shown in its place."""
        request = self.engine.ask(
            Generate(
                messages=self._conversation(turn, adapter_name),
                adapter_name=adapter_name,
                sampling=sampling,
                thinking=self.thinking,
            )
        )
        self.open_requests.append(request)
        try:
            async for reply in request:
                if isinstance(reply, Text):
                    await turn.answers[adapter_name].append_text(reply.chunk)
                    if turn.answers[adapter_name].notice_loop():
                        request.stop()
                elif isinstance(reply, GenerationDone):
                    await turn.answers[adapter_name].end(reply.outcome)
                    self._warn(reply.outcome.warning)
        except EngineClosedError:
            await turn.answers[adapter_name].stop(name_keys(chat_text.UNLOADED))
        except UserError as problem:
            await turn.answers[adapter_name].fail(problem)
        finally:
            self.open_requests.remove(request)

    def _warn(self, warning: str) -> None:
        """Show the session's warnings once."""
        if warning and warning != self._last_warning:
            self._last_warning = warning
            self.app.notify(warning, severity="warning", timeout=_WARNING_S)

    @work(group="answers")
    async def measure(self) -> None:
        self._set_busy()
        try:
            await self._load()
            request = self.engine.ask(MeasureEffect(adapter_name=self.pair.right))
            self.open_requests.append(request)
            try:
                async for reply in request:
                    if isinstance(reply, StatusUpdate):
                        self.show_effect(f"{reply.words}…")
                    elif isinstance(reply, EffectMeasured):
                        self.show_effect(reply.effect)
            finally:
                self.open_requests.remove(request)
        except EngineClosedError:
            self.show_effect(name_keys(chat_text.NOT_MEASURED))
        except UserError as problem:
            self.show_effect("")
            self.qlora_app.show_error(problem)
        self._set_idle()

    def _set_busy(self) -> None:
        self.busy = True
        self.refresh_bindings()

    def _set_idle(self) -> None:
        """Nothing is under way any more."""
        self.busy = False
        if self.engine.pid is None:
            self.ready = None
        self.show_header()
        self.refresh_bindings()

    def _save_transcript(self, turn: ChatTurn, sampling: Sampling) -> None:
        answered = {name: answer for name, answer in turn.answers.items() if answer.text or answer.thought}
        texts = {adapter_name: answer.text for adapter_name, answer in answered.items()}
        thoughts = {adapter_name: answer.thought for adapter_name, answer in answered.items()}
        if not texts or turn not in self.turns:
            return
        try:
            transcript.append_exchange(
                self.run_dir, turn.prompt, texts, sampling, self.system_prompt, thoughts
            )
            self.conversation_path = self.conversation_path or new_conversation_path(self.run_dir)
            save_conversation(self.conversation_path, self.turns, self.system_prompt)
        except OSError as error:
            self.notify(f"Could not write the transcript: {error.strerror}.", severity="warning")

    def _conversation(self, turn: ChatTurn, adapter_name: str) -> tuple[Message, ...]:
        """The messages that this adapter has seen so far; turns without its answer are left out."""
        messages = [Message("system", self.system_prompt)] if self.system_prompt else []
        earlier = self.turns[: self.turns.index(turn)] if turn in self.turns else []
        for before in earlier:
            answer = before.answers.get(adapter_name)
            if answer is not None and answer.text:
                reply = Message("assistant", answer.text, reasoning=answer.thought)
                messages += [Message("user", before.prompt), reply]
        return (*messages, Message("user", turn.prompt))
