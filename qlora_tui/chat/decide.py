"""Decisions of a loaded model: the probability of each option as the answer to a conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from qlora_tui.chat.chat_types import ChatSource, Decided, OptionProbability
from qlora_tui.chat.session import ChatSession
from qlora_tui.data.conversation import Conversation, Message
from qlora_tui.data.render import RenderOptions
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.runs.directory import RunDir, run_of
from qlora_tui.runs.task_metrics.decisions import Calibration, Decider, read_decider
from qlora_tui.training.decisions import answer_prompt
from qlora_tui.training.option_scores import Choice


def decider_of(source: ChatSource, adapter_name: str) -> Decider | None:
    """Return the options that an adapter was trained to choose from; None if they are unknown.

    A checkpoint has the options of its run's final adapter. The base has the options of its adapters, if all
    of them agree. Probabilities are calibrated only for the adapter that was measured.
    """
    folder = source.adapters.get(adapter_name, "")
    if folder and (own := read_decider(Path(folder))) is not None:
        return own
    run = _run_of(source, adapter_name)
    folders = [run.adapter_dir] if run is not None else [Path(each) for each in source.adapters.values()]
    found = [decider for each in folders if (decider := read_decider(each)) is not None]
    if len({decider.option_ids for decider in found}) != 1:
        return None
    return msgspec.structs.replace(found[0], calibration=Calibration())


def _run_of(source: ChatSource, adapter_name: str) -> RunDir | None:
    """Return the run of an adapter; None for the base, or an adapter of no run."""
    folder = source.adapters.get(adapter_name)
    return run_of(Path(folder)) if folder else None


def decide_one(session: ChatSession, adapter_name: str, messages: Sequence[Message]) -> Decided:
    """Return the decision of an adapter on one conversation.

    Raises UserError if the adapter has no options or cannot be loaded, if the chat template rejects the
    conversation or it exceeds the model's context, or if the memory is full.
    """
    decider = decider_of(session.source, adapter_name)
    if decider is None:
        run = _run_of(session.source, adapter_name)
        raise UserError(
            "No decisions",
            what=f"No decisions have been measured for {run.id if run else 'this model'}.",
            why="Decisions are measured only if the answers in the run's data are labels or objects with "
            "enumerated fields, and the run has validation rows.",
            fix=f"Measure the decisions with `qlora-tui evaluate {run.id if run else 'RUN'} --again`, or "
            "choose another run.",
            exit_code=EXIT_USAGE,
        )
    (decision,) = decide(session, decider, adapter_name, [Conversation(tuple(messages))])
    if isinstance(decision, UserError):
        raise decision
    return decision


def decide(
    session: ChatSession,
    decider: Decider,
    adapter_name: str,
    conversations: Sequence[Conversation],
    progress: Callable[[int], None] = lambda done: None,
) -> list[Decided | UserError]:
    """Return the decision on each conversation, or the error that prevents it.

    A conversation has no decision if the chat template rejects it, or if it exceeds the model's context.

    Args:
        session: The loaded model.
        decider: The options and calibration of the adapter.
        adapter_name: The adapter that decides.
        conversations: Each ends before the answer.
        progress: Called with the number of conversations done.

    Raises:
        UserError: The adapter cannot be loaded, or the memory is full.
    """
    asked = [_choice(session, decider, each) for each in conversations]
    choices = [each for each in asked if isinstance(each, Choice)]
    scores = iter(session.score_options(adapter_name, choices, progress))
    return [
        each
        if isinstance(each, UserError)
        else decided(decider, decider.calibration.probabilities(next(scores)))
        for each in asked
    ]


def _choice(session: ChatSession, decider: Decider, conversation: Conversation) -> Choice | UserError:
    answer = Message("assistant", decider.decision.options[0])
    whole = Conversation((*conversation.messages, answer), conversation.tools)
    text = "\n".join(message.content for message in conversation.messages)
    try:
        if len(text) > session.context_length:
            # Tokenizing all of a text that is far too long would take long.
            session.tokenize(text, session.tokenizer.encode)
        prompt = answer_prompt(whole, session.tokenizer, RenderOptions(thinking=decider.thinking))
        if prompt is None:
            raise UserError(
                "The chat template refuses this conversation",
                what="The conversation ends with an answer, or has a turn that the template does not "
                "support.",
                fix="End the conversation with the user's turn, or omit the system prompt.",
                exit_code=EXIT_USAGE,
            )
        choice = Choice(prompt[0], decider.option_ids)
        session.check_length(choice.tokens)
    except UserError as problem:
        return problem
    return choice


def decided(decider: Decider, probabilities: Sequence[float]) -> Decided:
    """Return the decision that follows from the options' probabilities, including fields of objects."""
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
        is_calibrated=decider.calibration.rows > 0,
    )


def _ranked(probabilities: dict[str, float]) -> tuple[OptionProbability, ...]:
    ordered = sorted(probabilities.items(), key=lambda item: -item[1])
    return tuple(OptionProbability(option, probability) for option, probability in ordered)
