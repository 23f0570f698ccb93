"""Writes the samples of a recipe as JSONL for other trainers.

In supervised training, each line has the token ids and labels that the recipe trains on, so that another
trainer needs no loss mask of its own. Preference trainers read texts. Therefore, with a preference method,
each line has the turns in the form that the chat template receives. The training and validation splits are
those of a run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct

from qlora_tui.data.conversation import Conversation, RowRejectedError
from qlora_tui.data.dataset import PreparedDataset
from qlora_tui.data.sources import conversations, every_source, open_source
from qlora_tui.data.store import Samples
from qlora_tui.data.template_capabilities import (
    TemplateCapabilities,
    adapt_conversation,
    resolve_thinking,
    variables,
)
from qlora_tui.recipe.schema import Recipe

TRAIN, VALIDATION = "train.jsonl", "validation.jsonl"
_IGNORED = -100
"""Label of a token that is not learned."""


class WrittenRows(Struct, frozen=True):
    """The number of lines in each file."""

    train: int
    validation: int
    """Number of lines; 0 if there is no file."""
    weighted: bool
    """Whether rows give their answers weights in the loss. The lines cannot express weights."""


def write_rows(
    recipe: Recipe, prepared: PreparedDataset, traits: TemplateCapabilities, folder: Path
) -> WrittenRows:
    """Write ``train.jsonl`` and, if there are validation rows, ``validation.jsonl``. Raises OSError."""
    counts = {}
    for name, samples in ((TRAIN, prepared.train), (VALIDATION, prepared.validation)):
        lines = (
            _tokens(samples) if recipe.preference_method is None else _comparisons(recipe, samples, traits)
        )
        counts[name] = _write(folder / name, lines) if len(samples) else 0
    return WrittenRows(counts[TRAIN], counts[VALIDATION], prepared.train.weighted)


def _write(path: Path, lines: Iterable[dict[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", errors="surrogatepass") as file:
        for count, line in enumerate(lines, start=1):  # noqa: B007
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return count


def _tokens(samples: Samples) -> Iterator[dict[str, Any]]:
    for i in range(len(samples)):
        ids = list(samples.token_ids(i))
        mask = samples.weights(i) or samples.loss_mask(i)
        labels = [token if learned else _IGNORED for token, learned in zip(ids, mask, strict=True)]
        yield {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _comparisons(recipe: Recipe, samples: Samples, traits: TemplateCapabilities) -> Iterator[dict[str, Any]]:
    """Yield the lines for the rows that ``samples`` were made from: pairs of answers, or rated answers."""
    origins = {(*samples.origin(i), samples.file_name(i)) for i in range(len(samples))}
    for index, source in enumerate(every_source(recipe.data)):
        for file in open_source(source, recipe.data.preferences, index)[0]:
            for row, found in conversations(file):
                if (index, row.number, file.name) in origins and not isinstance(found, RowRejectedError):
                    yield from _compared(found, recipe, traits)


def _compared(
    conversation: Conversation, recipe: Recipe, traits: TemplateCapabilities
) -> Iterator[dict[str, Any]]:
    turns, _, tools, _ = adapt_conversation(conversation, traits)
    line: dict[str, Any] = {"prompt": turns[:-1]}
    if tools:
        line["tools"] = json.dumps(tools, ensure_ascii=False)
    thinking = resolve_thinking(recipe.data.thinking, traits.switch, conversation)
    if given := variables(traits.switch, thinking):
        line["chat_template_kwargs"] = given
    rejected = [adapt_conversation(other, traits)[0][-1:] for other in conversation.rejected]
    rates = recipe.preference_traits is not None and recipe.preference_traits.rates_answers
    if not rates:
        yield from (line | {"chosen": turns[-1:], "rejected": answer} for answer in rejected)
        return
    yield line | {"completion": turns[-1:], "label": conversation.rated_good is not False}
    yield from (line | {"completion": answer, "label": False} for answer in rejected)
