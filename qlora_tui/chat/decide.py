"""Decisions of a loaded model: how probable each option is as the answer to a conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from qlora_tui.chat.chat_types import ADAPTER, Decided, OptionProbability
from qlora_tui.chat.session import ChatSession
from qlora_tui.data.conversation import Conversation, Message
from qlora_tui.data.render import RenderOptions
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.runs.task_metrics.decisions import Calibration, Decider, read_decider
from qlora_tui.training.decisions import answer_prompt, choice_of


def decider_of(session: ChatSession) -> Decider:
    """Return what the session's final adapter decides. Raises UserError where it decides nothing."""
    folder = session.source.adapters.get(ADAPTER, "")
    decider = read_decider(Path(folder)) if folder else None
    if decider is None:
        raise UserError(
            "No decisions",
            what="This adapter has no decision.json, which names the options and calibrates them.",
            why="It is written where the answers of a run are labels or objects of enumerated fields, and "
            "it has validation rows.",
            fix="Measure it with `qlora-tui evaluate RUN --again`, or choose another run.",
            exit_code=EXIT_USAGE,
        )
    return decider


def decide(
    session: ChatSession,
    decider: Decider,
    conversations: Sequence[Conversation],
    adapter_name: str = ADAPTER,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Decided | None]:
    """Return the decision on each conversation; None where the chat template rejects it.

    Only the final adapter's probabilities are calibrated.

    Args:
        session: with the model.
        decider: of its final adapter.
        conversations: each ends before the answer.
        adapter_name: who decides.
        progress: called with the number of conversations done.

    Raises:
        UserError: The adapter cannot be loaded, or the memory is full.
    """
    options = RenderOptions.of(session.source.recipe.data)
    answer = Message("assistant", decider.decision.options[0])
    prompts = [
        answer_prompt(Conversation((*each.messages, answer), each.tools), session.tokenizer, options)
        for each in conversations
    ]
    choices = [
        choice_of(prompt[0], decider.option_ids, session.context_length)
        for prompt in prompts
        if prompt is not None
    ]
    scores = iter(session.score_options(adapter_name, choices, progress))
    calibration = decider.calibration if adapter_name == ADAPTER else Calibration()
    return [
        None if prompt is None else decided(decider, calibration.probabilities(next(scores)), calibration)
        for prompt in prompts
    ]


def decided(decider: Decider, probabilities: Sequence[float], calibration: Calibration) -> Decided:
    """Return a decision with its probabilities, for an object those of each field too."""
    decision = decider.decision
    fields = {
        field: _ranked(
            {
                value: sum(probabilities[number] for number in numbers)
                for value, numbers in decision.values(field).items()
            }
        )
        for field in decision.fields
    }
    return Decided(
        options=_ranked(dict(zip(decision.options, probabilities, strict=True))),
        fields=fields,
        is_calibrated=calibration.rows > 0,
    )


def _ranked(probabilities: dict[str, float]) -> tuple[OptionProbability, ...]:
    ordered = sorted(probabilities.items(), key=lambda item: -item[1])
    return tuple(OptionProbability(option, probability) for option, probability in ordered)
