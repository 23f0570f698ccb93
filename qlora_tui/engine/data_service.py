"""Data as a model will see it: reports on files, and single rows. Loads no torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator
from itertools import islice
from pathlib import Path

from qlora_tui.catalog.local_models import find_files, stored_config
from qlora_tui.data.conversation import Conversation, RowRejectedError
from qlora_tui.data.dataset import count_samples
from qlora_tui.data.dataset_report import Piece, Report, Shown
from qlora_tui.data.formats import SNIFFED_ROWS
from qlora_tui.data.inspection import inspecting, row_of, show
from qlora_tui.data.problems import shorten
from qlora_tui.data.read import rows
from qlora_tui.data.sources import FormatChoice, conversation_of, format_choices, paths_of
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.engine.protocol import InspectData, ShowFields, ShowFormats, ShowRow
from qlora_tui.errors import UserError
from qlora_tui.recipe.fields import source_fields
from qlora_tui.recipe.schema import Recipe
from qlora_tui.worker import Report as Progress

_NICENESS = 10


class DataService:
    """Reads data for the app. Caches the last tokenizer, because rows are requested one after another."""

    def __init__(self) -> None:
        self._cached: tuple[tuple[str, str], ChatTokenizer] | None = None

    def inspect(self, request: InspectData, stop: threading.Event) -> Generator[Report, None, Report | None]:
        """Yield increasingly complete reports, and return the last one. Raises UserError."""
        tokenizer = self._tokenizer(request.model, request.template) if request.model else None
        last: Report | None = None
        for last in inspecting(request.source, tokenizer, request.data):
            if last.complete or stop.is_set():
                break
            yield last
        return last

    def show(self, request: ShowRow) -> Shown:
        """Return one row. Raises UserError."""
        if not request.model:
            return _as_read(request)
        tokenizer = self._tokenizer(request.model, request.template)
        return show(request.source, request.row, tokenizer, request.data, request.path)

    def fields(self, request: ShowFields) -> dict[str, str]:
        """Return the columns of the first rows, each with the beginning of a value. Raises UserError."""
        path = paths_of(request.source)[0][0]
        first_values: dict[str, str] = {}
        for row in islice(rows(path), SNIFFED_ROWS):
            columns = row.value if isinstance(row.value, dict) else {}
            for name, value in columns.items():
                first_values.setdefault(str(name), shorten(str(value)))
        return first_values

    def formats(self, request: ShowFormats) -> tuple[FormatChoice, ...]:
        """Return what each format reads from the first rows. Raises UserError."""
        path = paths_of(request.source)[0][0]
        formats = source_fields()["format"].choices
        return format_choices(path, request.source, formats, request.preferences)

    def _tokenizer(self, model: str, template: str) -> ChatTokenizer:
        key = (model, template)
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, ChatTokenizer.from_folder(tokenizer_folder(model), template))
        return self._cached[1]


def count_data(recipe: Recipe, report: Progress) -> bool:
    """Count the samples of a recipe, as a job for :mod:`qlora_tui.runs.expected_time`. Raises UserError."""
    os.nice(_NICENESS)  # a run may be training
    tokenizer = ChatTokenizer.from_folder(tokenizer_folder(recipe.model.id), recipe.model.chat_template)
    count_samples(
        recipe,
        find_files(recipe.model.id),
        tokenizer,
        lambda progress: report(round(progress.share * 100), 100),
    )
    return True


def tokenizer_folder(model: str) -> Path:
    """Return a folder with a model's tokenizer; for a GGUF file, the tokenizer is read from its header.

    Weights are not needed. Raises UserError if the tokenizer is not on this machine.
    """
    try:
        files = find_files(model)
    except UserError as problem:
        own_folder = Path(model).expanduser()
        if (own_folder / "tokenizer.json").is_file():
            return own_folder
        if (own_folder / "config.json").is_file() or stored_config(model) is not None:
            name = model.rstrip("/").rpartition("/")[2]
            raise UserError(
                "No tokenizer yet",
                what=f"{name} is selected for estimates only: its tokenizer is not on this machine.",
                why="Without a tokenizer, tokens cannot be counted and the chat template cannot be applied.",
                fix="Download the whole model, or select one that can be trained.",
            ) from problem
        raise
    if files.gguf_file is None:
        return files.folder
    # This takes a third of the engine's import time, and few models need it.
    from qlora_tui.training.gguf_conversion import tokenizer_folder as of_gguf

    return of_gguf(files.folder / files.gguf_file)


def _as_read(request: ShowRow) -> Shown:
    """Return a row without tokenizing it: its turns, with the answers marked as trained."""
    file, row = row_of(request.source, request.row, request.data, request.path)
    one = conversation_of(row, file)
    if isinstance(one, RowRejectedError):
        return Shown(row.number, (), (), (), refused=one.reason, path=str(file.path))
    return Shown(row.number, (tuple(_turns(one)),), (), (), path=str(file.path))


def _turns(conversation: Conversation) -> Iterator[Piece]:
    if conversation.text:
        yield Piece(conversation.text, True, False)
    for message in conversation.messages:
        in_loss = message.role == "assistant" and message.train
        yield Piece(f" {message.role} ", False, True)
        text = "\n".join(filter(None, (message.reasoning, message.content)))
        calls = "".join(f"\n{call.name}({call.arguments})" for call in message.tool_calls)
        yield Piece("\n", False, False)
        yield Piece(f"{text}{calls}".strip("\n") or "(empty)", in_loss, False)
        yield Piece("\n\n", False, False)
