"""A conversation with a model: loads the model in the engine, sends requests to it, and shows each prompt and
its answers as a turn.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import msgspec
import psutil
from textual import message, work
from textual.containers import VerticalScroll
from textual.widget import Widget
from textual.worker import Worker, WorkerError

from qlora_tui.chat.chat_sources import chat_bytes, run_bytes
from qlora_tui.chat.chat_types import BASE, ChatSource, Effect, GenerationResult, Sampling
from qlora_tui.data.conversation import Message
from qlora_tui.data.thought_splitter import TextChunk
from qlora_tui.engine.client import EngineClient, EngineClosedError, ReplyStream
from qlora_tui.engine.protocol import ChatReady, Decide, Generate, LoadChat, MeasureEffect
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_bytes
from qlora_tui.memory.budget import budget_for
from qlora_tui.recipe.schema import Thinking
from qlora_tui.runs.chat_choices import ChoiceKind, Provenance, add_choice, count_choices
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import STEP_PHASES
from qlora_tui.runs.status import ACTIVE, Status, read_status
from qlora_tui.tui import clock
from qlora_tui.tui.key_names import key_name, name_keys
from qlora_tui.tui.screens.base import OnQloraApp
from qlora_tui.tui.screens.chat.saved import (
    SavedConversation,
    append_exchange,
    new_conversation_path,
    save_conversation,
)
from qlora_tui.tui.screens.chat.turn import AdapterAnswer, ChatTurn
from qlora_tui.tui.screens.modals.dialogs import ConfirmScreen
from qlora_tui.tui.system_status import SystemStatus
from qlora_tui.worker import Progress

_UNLOADED = "the model was unloaded"
_WARNING_S = 20.0


@dataclass(frozen=True)
class AdapterPair:
    """The two adapters that are selected in a chat, left and right, and which of them answer prompts.

    The base model counts as an adapter.
    """

    adapter_names: tuple[str, ...]
    left: str
    right: str
    shown: str = "both"
    """Which adapters answer: ``both``, ``left`` or ``right``."""

    @classmethod
    def of(cls, adapter_names: tuple[str, ...], proposed: str = BASE) -> AdapterPair:
        """Return the pair of the base model (left) and the ``proposed`` adapter (right). If ``proposed`` is
        the base model, because the run has no adapter, the base model answers alone.

        ``adapter_names``: names of everything that can answer, as in :attr:`ChatSource.answer_names`.
        """
        return cls(adapter_names, BASE, proposed, "left" if proposed == BASE else "both")

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that answer the next prompt."""
        both = (self.left, self.right)
        return {"both": both, "left": both[:1], "right": both[1:]}[self.shown]

    @property
    def single(self) -> bool:
        """Whether both sides have the same adapter, so that there is nothing to compare."""
        return self.left == self.right

    def next_answers(self) -> AdapterPair:
        """Return the pair with the next choice of which adapters answer: after both, only the right-hand one;
        then only the left-hand one; then both again. A :attr:`single` pair does not change.
        """
        following = {"both": "right", "right": "left", "left": "both"}
        return self if self.single else replace(self, shown=following[self.shown])

    def next(self, side: str) -> AdapterPair:
        """Select the run's next adapter on this side, ``left`` or ``right``, and return the resulting pair.
        The adapter of the other side is skipped. If there is no further adapter, the pair does not change.
        """
        own, other = (self.left, self.right) if side == "left" else (self.right, self.left)
        free = [adapter_name for adapter_name in self.adapter_names if adapter_name != other]
        if len(free) < 2:
            return self
        following = free[(free.index(own) + 1) % len(free)]
        return replace(self, left=following) if side == "left" else replace(self, right=following)


class Conversation(VerticalScroll, OnQloraApp):
    """The turns of a conversation, each answered by one or two adapters. Owns the engine."""

    @dataclass
    class Changed(message.Message):
        """Posted when the model, its activity, or the turns have changed."""

        doing: str = ""
        """The activity to show, such as loading the model; empty if none is to be shown."""

    @dataclass
    class EffectChanged(message.Message):
        """Posted when the measurement of the adapter's effect has made progress or has ended."""

        effect: str | Effect

    def __init__(self, *children: Widget) -> None:
        super().__init__(*children, id="conversation", can_focus=False)
        self.engine = EngineClient()
        self.source: ChatSource | None = None
        self.run_dir: RunDir | None = None
        """The run whose adapters answer; None for a model without a run."""
        self.pair = AdapterPair.of((BASE,))
        self.ready: ChatReady | None = None
        """The model that the engine has loaded; None while no model is loaded."""
        self.turns: list[ChatTurn] = []
        self.sampling = Sampling()
        self.system_prompt = ""
        self.thinking: Thinking = "auto"
        """The thinking mode of requests; ``auto`` uses the default of the run and the chat template."""
        self.unfolded = False
        """Whether thoughts are shown in full."""
        self.path: Path | None = None
        """File in which the conversation is saved; None before the first answer."""
        self._asking: Worker[None] | None = None
        """The worker that answers prompts or measures the effect, running or finished; None before the first
        such worker. Only this worker adds turns and writes into them.
        """
        self._open_requests: list[ReplyStream[Any, Any]] = []
        """Requests that the engine has not finished."""
        self._last_warning = ""
        self._shares_with: set[str] = set()
        """Ids of runs and addresses of servers that are allowed to share the memory with the chat's model,
        because there is room for both or because the user agreed.
        """
        self.unloaded_because = ""
        """Why the model was unloaded; empty while the model is loaded, and if the user unloaded it."""
        self.choice_counts: dict[ChoiceKind, int] = {}
        """Number of judgments of this model's answers, by kind."""

    def on_mount(self) -> None:
        # The end stays in view, after a resize too, unless the user scrolls up.
        self.anchor()
        self.app.system_status_changed.subscribe(self, self._yield_memory_to_run, immediate=True)

    async def on_unmount(self) -> None:
        """When the screen is removed, end the engine. This frees the model's memory."""
        # Cancel the workers that wait for answers, since they would write into widgets that no longer exist.
        self.workers.cancel_node(self)
        await self.engine.kill()

    @property
    def busy(self) -> bool:
        """Whether a prompt is being answered or a measurement is running."""
        return self._asking is not None and not self._asking.is_finished

    @property
    def is_new(self) -> bool:
        """Whether there is a source to chat with, and no message has been sent yet."""
        return self.source is not None and not self.turns and not self.busy

    async def set_source(
        self, source: ChatSource | None, run: RunDir | None = None, adapter_name: str = BASE
    ) -> None:
        """Switch to another run or model, and start a new conversation. The model is loaded when the first
        prompt is sent.

        Args:
            source: None if there is nothing to chat with.
            run: None for a model without a run.
            adapter_name: The adapter that answers next to the base model; ``BASE`` if the base model answers
                alone.
        """
        before = self.source
        same_base = before is not None and source is not None and before.recipe.model == source.recipe.model
        self.source, self.run_dir = source, run
        self.thinking = "auto" if source is None else source.thinking
        self.pair = AdapterPair.of((BASE,) if source is None else source.answer_names, adapter_name)
        self.ready, self.unloaded_because = None, ""
        self.choice_counts = {} if source is None else await asyncio.to_thread(_choice_counts, source)
        await self.clear()
        if not same_base and self.engine.pid is not None:
            # The loaded model is not the base of the new source, so free its memory.
            await self.engine.close()

    async def clear(self) -> None:
        """Stop any activity, remove all turns, and start a new conversation."""
        turns, self.turns, self.path = self.turns, [], None
        for request in self._open_requests:
            request.stop()
        for worker in self.workers.cancel_group(self, "answers"):
            # Wait for the worker to end, because it writes into the turns.
            with suppress(WorkerError):
                await worker.wait()
        await self.remove_children(turns)
        self.anchor()
        self.post_message(self.Changed())

    async def open_saved(self, path: Path, saved: SavedConversation) -> None:
        """Show the saved conversation in file ``path``. The next prompt continues the conversation."""
        await self.clear()
        self.path, self.system_prompt = path, saved.system_prompt
        for exchange in saved.turns:
            turn = await self._add_turn(exchange.prompt, tuple(exchange.answers))
            for name, answer in exchange.answers.items():
                await turn.answers[name].show_saved(answer.text, answer.thought)
        self.anchor()
        self.post_message(self.Changed())

    async def remove_last_turn(self) -> ChatTurn:
        """Remove the last turn, and return it. There must be at least one turn."""
        turn = self.turns.pop()
        await turn.remove()
        return turn

    async def unfold(self, unfolded: bool) -> None:
        """If ``unfolded``, show all thoughts in full; otherwise, fold each thought into one line."""
        self.unfolded = unfolded
        for turn in self.turns:
            for answer in turn.answers.values():
                await answer.unfold(unfolded)

    def send(self, prompt: str, cancel: Callable[[], object] = lambda: None) -> None:
        """Start answering a prompt, if there is a model. ``cancel`` is called if the user decides not to load
        the model.
        """
        if self.source is not None:
            self._asking = self._answer(prompt, cancel)
            self.post_message(self.Changed())

    def measure(self) -> None:
        """Start to measure the effect of the right-hand adapter."""
        self._asking = self._measure()
        self.post_message(self.Changed())

    def on_worker_state_changed(self, event: Worker.StateChanged) -> None:
        """When the worker that answers or measures has ended, post ``Changed``."""
        if event.worker is self._asking and event.worker.is_finished:
            if self.engine.pid is None:
                self.ready = None
            self.post_message(self.Changed())

    async def stop(self) -> None:
        """Stop the current activity. Answers keep the text generated so far."""
        for request in self._open_requests:
            request.stop()
        if not self._open_requests:
            # Loading a model cannot be interrupted, so the engine's process is ended instead.
            self.post_message(self.Changed("Stopping"))
            await self.engine.close()

    async def unload(self) -> None:
        """Unload the model. The next prompt loads it again."""
        # Reset this first: while the model counts as loaded, a request would start the engine again.
        self.ready = None
        await self.engine.close()
        self.post_message(self.Changed())

    def last_answered(self, answers: int) -> ChatTurn | None:
        """Return the last turn if it has at least ``answers`` answers with text; otherwise, and during an
        activity, return None.
        """
        if not self.turns or self.busy:
            return None
        complete = [answer for answer in self.turns[-1].answers.values() if answer.text.strip()]
        return self.turns[-1] if len(complete) >= answers else None

    def record_choice(self, turn: ChatTurn, chosen: AdapterAnswer, rejected: AdapterAnswer) -> None:
        """Save the user's choice between two answers of a turn, and count the choice. Raises UserError if the
        choice cannot be saved.
        """
        names = {"chosen": chosen.adapter_name, "rejected": rejected.adapter_name}
        prompt = self.messages(turn, chosen.adapter_name)
        answers = {"chosen": chosen.text.strip(), "rejected": rejected.text.strip()}
        self.choice_counts["pairs"] = add_choice("pairs", prompt, answers, self._provenance(turn, names))

    def record_edit(self, turn: ChatTurn, answer: AdapterAnswer, text: str) -> None:
        """Save the user's corrected ``text`` of an answer, and count the edit. Raises UserError if the edit
        cannot be saved.
        """
        provenance = self._provenance(turn, {"edited": answer.adapter_name}, original=answer.text)
        prompt = self.messages(turn, answer.adapter_name)
        self.choice_counts["edits"] = add_choice("edits", prompt, {"completion": text}, provenance)

    def messages(self, turn: ChatTurn, adapter_name: str) -> tuple[Message, ...]:
        """Return the messages for answering a turn with this adapter: system prompt, earlier turns, and the
        prompt.

        Earlier turns that the adapter did not answer are left out.
        """
        messages = [Message("system", self.system_prompt)] if self.system_prompt else []
        earlier = self.turns[: self.turns.index(turn)] if turn in self.turns else []
        for before in earlier:
            answer = before.answers.get(adapter_name)
            if answer is not None and answer.text:
                reply = Message("assistant", answer.text, reasoning=answer.thought)
                messages += [Message("user", before.prompt), reply]
        return (*messages, Message("user", turn.prompt))

    def _provenance(self, turn: ChatTurn, answers: dict[str, str], original: str = "") -> Provenance:
        assert self.source is not None
        sampling: dict[str, Any] = msgspec.to_builtins(self.sampling)
        run_id = self.run_dir.id if self.run_dir is not None else ""
        return Provenance(
            id=turn.key,
            at=clock.now(),
            base=self.source.recipe.model.id,
            run=run_id,
            answers=answers,
            sampling=sampling,
            original=original,
        )

    async def _may_load(self) -> bool:
        """Return whether to load the model. If a run or server might not leave enough memory for the model,
        ask the user.
        """
        if self.ready is not None:
            return True
        active, loaded = self.app.system_status.active, self.app.system_status.loaded_server
        # Read the status again, since the app's last poll may be a second old.
        if active is not None and (status := read_status(active)).state in ACTIVE:
            may_load = await self._may_share(
                active.id,
                status,
                title="A run is training",
                what=f"{active.id} is training on this machine",
                is_over=lambda: read_status(active).state not in ACTIVE,
            )
            if not may_load:
                return False
        if loaded is not None and loaded.process.is_alive():
            return await self._may_share(
                loaded.address,
                None,
                title="A server holds a model",
                what=f"The server on port {loaded.port} holds {loaded.base} in memory "
                f"({format_bytes(loaded.memory_bytes)}; {key_name('chat.serve')} stops it)",
                is_over=lambda: not loaded.process.is_alive(),
            )
        return True

    async def _may_share(
        self, who: str, status: Status | None, *, title: str, what: str, is_over: Callable[[], bool]
    ) -> bool:
        """Return whether the chat's model is allowed to share the memory with a run or a server. If there
        might not be room for both, ask the user. If the user agrees, do not ask again.

        Args:
            who: Id of the run, or address of the server.
            status: Status of the run; None for a server, which has already allocated its memory.
            title: Title of the question.
            what: The reason for the question, as the beginning of a sentence.
            is_over: Returns whether the run or server has ended, so that the question can be closed.
        """
        if who in self._shares_with:
            return True
        text = (
            f"{what}, and there may not be enough free memory for the chat's model too. If you load the "
            f"model, the chat or the other process may run out of memory. Otherwise nothing is sent, and "
            f"your message stays in the field."
        )
        question = ConfirmScreen(title, text, yes="Load anyway", no="Not now", is_outdated=is_over)
        if not await self._fits_beside(status) and not await self.app.push_screen_wait(question):
            return False
        self._shares_with.add(who)
        return True

    async def _fits_beside(self, status: Status | None, *, is_loaded: bool = False) -> bool:
        """Return whether there is enough free memory for everything that the chat and the active run still
        have to allocate.

        Args:
            status: Status of the run; None without a run. A run that has begun its first step has already
                allocated its memory.
            is_loaded: Whether the chat's model is already in memory.
        """
        source, machine = self.source, self.app.system_status
        active, device = machine.active, budget_for(machine.gpu).device
        if source is None or not source.gguf_files.keys().isdisjoint(self.pair.active):
            return False

        def missing() -> list[int | None]:
            of_chat = [] if is_loaded else [chat_bytes(source.recipe, device)]
            if status is None or active is None or status.phase in STEP_PHASES:
                return of_chat
            return [*of_chat, run_bytes(active.recipe(), device)]

        free_bytes = machine.free_bytes
        if machine.gpu is None:
            of_box = machine.host if machine.box else None
            free_bytes = of_box.available_bytes if of_box else psutil.virtual_memory().available
        try:
            sizes = await asyncio.to_thread(missing)
        except UserError:  # a recipe that cannot be read
            return False
        return free_bytes is not None and None not in sizes and sum(filter(None, sizes)) <= free_bytes

    def _yield_memory_to_run(self, system_status: SystemStatus) -> None:
        """If a run has become active, and there is not enough memory for the run and the model, unload the
        model.
        """
        active = system_status.active
        if self.ready is not None and active is not None and active.id not in self._shares_with:
            self._shares_with.add(active.id)  # until _unload_for knows whether there is room for both
            self._unload_for(active)

    @work
    async def _unload_for(self, run: RunDir) -> None:
        """Unload the model to make room for a run that is starting, unless there is room for both."""
        if not await self._fits_beside(read_status(run), is_loaded=True):
            self._shares_with.discard(run.id)
            self.unloaded_because = f"{run.id} started and needed the memory"
            await self.unload()

    async def _add_turn(self, prompt: str, adapter_names: tuple[str, ...]) -> ChatTurn:
        turn = ChatTurn(prompt, adapter_names, unfolded=self.unfolded)
        self.turns.append(turn)
        await self.mount(turn)
        return turn

    @work(group="answers")
    async def _answer(self, prompt: str, cancel: Callable[[], object]) -> None:
        if not await self._may_load():
            cancel()
            return
        if self.turns:
            self.turns[-1].show_question(False)
        turn = await self._add_turn(prompt, self.pair.active)
        self.anchor()
        sampling = self.sampling
        if sampling.seed is None:
            # Use the same seed for both adapters, so that their answers differ only because of the adapters.
            sampling = msgspec.structs.replace(sampling, seed=random.randrange(1 << 32))
        try:
            await self._load()
            await asyncio.gather(*(self._generate(turn, name, sampling) for name in turn.answers))
        except EngineClosedError:
            for answer in turn.answers.values():
                await answer.stop(self._stopped("loading the model"))
        except UserError as problem:
            for answer in turn.answers.values():
                await answer.fail(problem)
        turn.show_question(True)
        self._save(turn, sampling)

    async def _load(self) -> None:
        if self.source is None or (self.ready is not None and self.engine.pid is not None):
            return
        self.post_message(self.Changed("Starting the engine"))
        try:
            async for reply in self.engine.ask(LoadChat(source=self.source)):
                if isinstance(reply, Progress):
                    self.post_message(self.Changed(reply.text))
                else:
                    self.ready, self.unloaded_because = reply, ""
                    if effect := reply.thinking.effect_of(self.thinking):
                        self.notify(effect)
        except asyncio.CancelledError:
            # Otherwise, the engine would keep a model in memory that is no longer needed.
            await self.engine.close()
            raise
        self.post_message(self.Changed())

    async def _generate(self, turn: ChatTurn, adapter_name: str, sampling: Sampling) -> None:
        """Stream one adapter's answer into the turn. If there is an error, show it in place of the answer."""
        request = self.engine.ask(
            Generate(
                messages=self.messages(turn, adapter_name),
                adapter_name=adapter_name,
                sampling=sampling,
                thinking=self.thinking,
            )
        )
        answer = turn.answers[adapter_name]
        self._open_requests.append(request)
        try:
            async for reply in request:
                if isinstance(reply, TextChunk):
                    await answer.append_text(reply)
                    if answer.notice_loop():
                        request.stop()
                elif isinstance(reply, GenerationResult):
                    await answer.end(reply)
                    if self.ready is not None and self.ready.decides and reply.ending != "stopped":
                        await self._decide(turn, answer)
                    warning = reply.warning
                    if warning and warning != self._last_warning:
                        self._last_warning = warning
                        self.notify(warning, severity="warning", timeout=_WARNING_S)
        except EngineClosedError:
            await answer.stop(self._stopped(f"because {_UNLOADED}"))
        except UserError as problem:
            await answer.fail(problem)
        finally:
            self._open_requests.remove(request)

    async def _decide(self, turn: ChatTurn, answer: AdapterAnswer) -> None:
        """Below the answer, show the probability of each label. For adapters in GGUF files, do nothing."""
        name = answer.adapter_name
        if self.source is None or name not in self.source.adapter_names:
            return  # llama.cpp computes the answers of this adapter, without probabilities of labels
        asked = Decide(messages=self.messages(turn, name), adapter_name=name)
        answer.show_decision(await self.engine.ask(asked).result())

    @work(group="answers")
    async def _measure(self) -> None:
        if not await self._may_load():
            return
        try:
            await self._load()
            request = self.engine.ask(MeasureEffect(adapter_name=self.pair.right))
            self._open_requests.append(request)
            try:
                async for reply in request:
                    shown = f"{reply.text}…" if isinstance(reply, Progress) else reply
                    self.post_message(self.EffectChanged(shown))
            finally:
                self._open_requests.remove(request)
        except asyncio.CancelledError:
            self.post_message(self.EffectChanged(""))
            raise
        except EngineClosedError:
            reason = self.unloaded_because or _UNLOADED
            retry = name_keys("Press {chat.effect} to load the model and measure the effect.")
            self.post_message(self.EffectChanged(f"Not measured: {reason}. {retry}"))
        except UserError as problem:
            self.post_message(self.EffectChanged(""))
            self.app.show_error(problem)

    def _stopped(self, what: str) -> str:
        """Return the note for a stopped answer. It begins with ``Stopped``, followed by the reason why the
        model was unloaded. If no such reason is known, ``what`` follows instead: ``Stopped loading the
        model``.
        """
        happened = f": {self.unloaded_because}" if self.unloaded_because else f" {what}"
        return f"Stopped{happened}. " + name_keys("Press {chat.leave}, then {chat.retry}, to try again.")

    def _save(self, turn: ChatTurn, sampling: Sampling) -> None:
        answered = {name: answer for name, answer in turn.answers.items() if answer.text or answer.thought}
        if not answered or turn not in self.turns:
            return
        texts = {name: answer.text for name, answer in answered.items()}
        thoughts = {name: answer.thought for name, answer in answered.items()}
        try:
            append_exchange(self.run_dir, turn.prompt, texts, sampling, self.system_prompt, thoughts)
            self.path = self.path or new_conversation_path(self.run_dir)
            save_conversation(self.path, self.turns, self.system_prompt)
        except OSError as error:
            self.notify(f"Could not write the transcript: {error.strerror}.", severity="warning")


def _choice_counts(source: ChatSource) -> dict[ChoiceKind, int]:
    """Return the number of saved judgments of this model's answers, by kind."""
    kinds: tuple[ChoiceKind, ...] = get_args(ChoiceKind)
    return {kind: count_choices(source.recipe.model.id, kind) for kind in kinds}
