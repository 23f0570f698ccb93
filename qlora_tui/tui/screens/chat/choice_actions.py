"""Keys of the Chat screen that judge answers: which is better, how it should read, and a run on both."""

from __future__ import annotations

from typing import Any

import msgspec

from qlora_tui.errors import UserError
from qlora_tui.formatting import pluralize
from qlora_tui.runs.chat_choices import (
    ENOUGH,
    ChoiceKind,
    Provenance,
    add_edit,
    add_pair,
    count_choices,
    recipe_on_choices,
)
from qlora_tui.tui import clock
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.screens.chat.answer_editor import AnswerEditor
from qlora_tui.tui.screens.chat.chat_turn import AdapterAnswer, ChatTurn
from qlora_tui.tui.screens.chat.conversation_screen import ConversationScreen
from qlora_tui.tui.screens.train.screen import prepare_run

_KINDS: dict[ChoiceKind, str] = {"pairs": "choice", "edits": "edit"}
_FIRST_TRAINED: tuple[ChoiceKind, ...] = ("edits", "pairs")


class ChoiceActions(ConversationScreen):
    """A conversation whose answers can be judged."""

    def action_prefer(self, side: str) -> None:
        """Record that the left or right one of the last two answers is better."""
        turn = self._last_answered(2)
        if turn is None:
            self.notify(
                "There are no two answers to choose from. Side by side, base and adapter both answer."
            )
            return
        left, right = list(turn.answers.values())[:2]
        chosen, rejected = (left, right) if side == "left" else (right, left)
        if chosen.text.strip() == rejected.text.strip():
            self.notify("Both answers are the same: there is nothing to choose.")
            return
        if chosen.was_cut:
            self.notify(
                f"The better answer was cut off: a model trained on it would stop there too. "
                f"{key_name('chat.settings')} raises the limit and {key_name('chat.retry')} asks again, or "
                f"{key_name('chat.edit_answer')} edits it.",
                severity="warning",
            )
            return
        provenance = self._provenance(
            turn, {"chosen": chosen.adapter_name, "rejected": rejected.adapter_name}
        )
        prompt = self._conversation(turn, chosen.adapter_name)
        try:
            count = add_pair(prompt, chosen.text.strip(), rejected.text.strip(), provenance)
        except UserError as problem:
            self.qlora_app.show_error(problem)
            return
        turn.show_question(False)
        chosen.show_judgment("better")
        rejected.show_judgment("")
        self._report("pairs", count, f"The answer of {chosen.adapter_name} is better")

    def action_edit_answer(self) -> None:
        """Edit the last answer of the adapter, and record how it should read."""
        turn = self._last_answered(1)
        if turn is None:
            self.notify("There is no answer to edit yet.")
            return
        answer = [each for each in turn.answers.values() if each.text.strip()][-1]

        def on_result(text: str | None) -> None:
            if text is not None:
                self._record_edit(turn, answer, text)

        self.app.push_screen(AnswerEditor(answer.adapter_name, answer.text.strip()), on_result)

    async def action_train_on_choices(self) -> None:
        """Prepare a run on the edits or choices, whichever there are enough of."""
        if self.source is None:
            return
        recipe = self.source.recipe
        counts = {kind: count_choices(recipe.model.id, kind) for kind in _KINDS}
        kind = next((kind for kind in _FIRST_TRAINED if counts[kind] >= ENOUGH), None)
        if kind is None:
            so_far = ", ".join(pluralize(counts[kind], word) for kind, word in _KINDS.items())
            self.notify(
                f"{so_far} so far; {ENOUGH} of a kind are enough to train on. "
                f"{key_name('chat.prefer_right')} and {key_name('chat.prefer_left')} choose, "
                f"{key_name('chat.edit_answer')} edits."
            )
            return
        run_id = self.run_dir.id if self.run_dir is not None and self.source.adapters else ""
        if self.qlora_app.load_recipe(recipe_on_choices(recipe, kind, run_id)):
            start = f", from the adapter of {run_id}" if run_id else ""
            self.notify(f"Prepared a run on your {kind}{start}. Press {key_name('app.undo')} to undo.")
        await prepare_run(self.qlora_app)

    def _record_edit(self, turn: ChatTurn, answer: AdapterAnswer, text: str) -> None:
        provenance = self._provenance(turn, {"edited": answer.adapter_name}, original=answer.text)
        try:
            count = add_edit(self._conversation(turn, answer.adapter_name), text, provenance)
        except UserError as problem:
            self.qlora_app.show_error(problem)
            return
        answer.show_judgment("edited")
        self._report("edits", count, "The edited answer is kept")

    def _report(self, kind: ChoiceKind, count: int, happened: str) -> None:
        number = pluralize(count, _KINDS[kind])
        if count < ENOUGH:
            self.notify(f"{happened}: {number}, of {ENOUGH} to train on.")
        else:
            self.notify(f"{happened}: {number}. Press {key_name('chat.train_choices')} to train on them.")

    def _last_answered(self, answers: int) -> ChatTurn | None:
        """The last turn if so many of its answers are complete."""
        if not self.turns or self.busy:
            return None
        complete = [answer for answer in self.turns[-1].answers.values() if answer.text.strip()]
        return self.turns[-1] if len(complete) >= answers else None

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
