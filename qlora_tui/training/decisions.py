"""Determines whether a run's data trains a decision, and judges the decisions of its base and adapter on
validation rows.

The options are the answers of the training and validation rows together. Options are tokenized exactly as the
answers in these rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from qlora_tui.data.conversation import Conversation, Message, RowRejectedError
from qlora_tui.data.dataset import PreparedDataset
from qlora_tui.data.decisions import MOST_OPTIONS, Decision, decision_of
from qlora_tui.data.formats import RowFormat
from qlora_tui.data.render import RenderOptions, render
from qlora_tui.data.sources import open_file_of
from qlora_tui.data.store import GOOD, Samples
from qlora_tui.data.tokenizer import AnswerDecoder, ChatTokenizer
from qlora_tui.recipe.schema import Recipe, Thinking
from qlora_tui.runs.task_metrics.answer_metrics import Metric, TaskRow, compare_shares
from qlora_tui.runs.task_metrics.decisions import MOST_DECISIONS, Decider, DecisionReport
from qlora_tui.runs.task_metrics.task_evaluation import LossChange
from qlora_tui.training.calibration import calibrate
from qlora_tui.training.compute_device import versions
from qlora_tui.training.option_scores import Choice, Scores
from qlora_tui.training.task_prompts import TaskPrompt, TaskRows, last_answer, task_prompts

_MOST_DISTINCT = 4 * MOST_OPTIONS
"""Maximum number of distinct answers. If the data has more, it is not a decision, and reading stops."""


class DecisionTask(NamedTuple):
    """A decision with its options, and validation rows to decide."""

    decision: Decision
    option_ids: tuple[tuple[int, ...], ...]
    """Token ids of each option, with its turn end."""
    prompts: tuple[TaskPrompt, ...]
    truth: tuple[int, ...]
    """Index of the right option of each prompt."""
    layout: RowFormat
    """How rows of the first source are read."""
    thinking: Thinking

    def choice(self, number: int, most_tokens: int) -> Choice:
        """Return the choice for a prompt. If the prompt is too long, its beginning is cut off."""
        room = max(1, most_tokens - max(map(len, self.option_ids)))
        return Choice(tuple(self.prompts[number].ids[-room:]), self.option_ids)


class Judged(NamedTuple):
    """The quality of both models' decisions on validation rows."""

    decider: Decider
    report: DecisionReport
    metrics: tuple[Metric, ...]
    rows: tuple[TaskRow, ...]
    loss: LossChange


def find_decisions(
    recipe: Recipe, data: PreparedDataset, tokenizer: ChatTokenizer, most: int = MOST_DECISIONS
) -> DecisionTask | None:
    """Return the decision that the answers of a run's data make; None for free text and preferences.

    Args:
        recipe: recipe of the run.
        data: rows of the run.
        tokenizer: tokenizer of the model.
        most: maximum number of validation rows to evaluate. They are spread evenly over the data.
    """
    if recipe.preference_traits is not None:
        return None
    ends = frozenset(tokenizer.turn_end_ids)
    answers: Counter[tuple[int, ...]] = Counter()
    for samples in (data.validation.of_side(GOOD), data.train.of_side(GOOD)):
        for i in range(len(samples)):
            answers[_answer(samples, i, ends)] += 1
            if len(answers) > _MOST_DISTINCT:
                return None
    # The empty key counts rows that were truncated before the end of their answer.
    answers.pop((), None)
    decoder = AnswerDecoder(tokenizer)
    texts = {ids: decoder.answer((), ids) for ids in answers}
    counts: Counter[str] = Counter()
    ids_of: dict[str, tuple[int, ...]] = {}
    for ids, count in answers.most_common():
        counts[texts[ids]] += count
        ids_of.setdefault(texts[ids], ids)
    decision = decision_of(counts)
    if decision is None:
        return None
    decision, option_ids = _with_ids(decision, ids_of, tokenizer, RenderOptions.of(recipe.data))
    numbers = {text: number for number, text in enumerate(decision.options)}
    prompts = task_prompts(data.validation.of_side(GOOD), ends, most)
    truth = tuple(numbers[texts[prompt.reference]] for prompt in prompts)
    layout = open_file_of(recipe.data.sources[0], recipe.data.preferences).detection.layout
    return DecisionTask(decision, option_ids, tuple(prompts), truth, layout, recipe.data.thinking)


def _answer(samples: Samples, i: int, ends: frozenset[int]) -> tuple[int, ...]:
    """Return the token ids of a sample's last answer; empty if it was truncated."""
    ids = samples.token_ids(i)
    bounds = last_answer(ids, samples.loss_mask(i), ends)
    return tuple(ids[bounds[0] : bounds[1]]) if bounds is not None else ()


def _with_ids(
    decision: Decision,
    known: dict[str, tuple[int, ...]],
    tokenizer: ChatTokenizer,
    options: RenderOptions,
) -> tuple[Decision, tuple[tuple[int, ...], ...]]:
    """Return the decision with the token ids of each option.

    Options that no row has are rendered. They are dropped if rendering does not reproduce the tokens that
    rows have for the first option.
    """
    every = {text: known.get(text) or rendered_answer(text, tokenizer, options) for text in decision.options}
    first = decision.options[0]
    if len(known) < len(every) and rendered_answer(first, tokenizer, options) != known[first]:
        every = {text: known.get(text, ()) for text in decision.options}
    kept = tuple(text for text, ids in every.items() if ids)
    return (
        Decision(options=kept, fields=decision.fields),
        tuple(every[text] for text in kept),
    )


def rendered_answer(text: str, tokenizer: ChatTokenizer, options: RenderOptions) -> tuple[int, ...]:
    """Return the token ids of an answer with its turn end, as in training; empty if there are none."""
    conversation = Conversation((Message("user", "?"), Message("assistant", text)))
    prompt = answer_prompt(conversation, tokenizer, options)
    return prompt[1] if prompt is not None else ()


def answer_prompt(
    conversation: Conversation, tokenizer: ChatTokenizer, options: RenderOptions
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the token ids before a conversation's last answer, and those of the answer; None if there is no
    answer.
    """
    try:
        sample = render(conversation, tokenizer, options)[-1]
    except RowRejectedError:
        return None
    bounds = last_answer(sample.token_ids, sample.loss_mask, frozenset(tokenizer.turn_end_ids))
    if bounds is None:
        return None
    return tuple(sample.token_ids[: bounds[0]]), tuple(sample.token_ids[bounds[0] : bounds[1]])


def judge(
    task: DecisionTask,
    numbers: Sequence[int],
    base: Sequence[Scores],
    adapter: Sequence[Scores],
    texts: TaskRows,
) -> Judged:
    """Fit a calibration to the adapter's scores, and judge the decisions of both models.

    Args:
        task: the decision.
        numbers: indices of the prompts that were scored.
        base: the base's scores of the options, for each of these prompts.
        adapter: the adapter's scores, in the same order.
        texts: converts prompts and answers to text.
    """
    truth = [task.truth[number] for number in numbers]
    report, decided = calibrate(task.decision, base, adapter, truth)
    base_decided = [max(range(len(scores)), key=scores.__getitem__) for scores in base]
    rows = tuple(
        texts.row(task.prompts[number], task.option_ids[first], task.option_ids[second])
        for number, first, second in zip(numbers, base_decided, decided, strict=True)
    )
    right = [
        [one == wanted for one, wanted in zip(chosen, truth, strict=True)]
        for chosen in (base_decided, decided)
    ]
    before, after = (
        [-scores[wanted] for scores, wanted in zip(side, truth, strict=True)] for side in (base, adapter)
    )
    tokens = [len(task.option_ids[wanted]) for wanted in truth]
    return Judged(
        decider=Decider(
            decision=task.decision,
            option_ids=task.option_ids,
            calibration=report.calibration,
            layout=task.layout,
            thinking=task.thinking,
            versions=versions(),
        ),
        report=report,
        metrics=(compare_shares("accuracy", *right),),
        rows=rows,
        loss=LossChange.of(before, after, tokens),
    )
