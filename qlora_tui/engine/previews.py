"""Data as a model will see it: reports on files, and one row at a time. Loads no torch."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from qlora_tui.catalog.local import resolve
from qlora_tui.data.inspect import Report, inspecting, show
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.engine.protocol import DataInspected, DataReport, InspectData, RowShown, ShowRow


class Previews:
    """Keeps the last tokenizer: rows are asked for one after the other."""

    def __init__(self) -> None:
        self._held: tuple[tuple[str, str], ChatTokenizer] | None = None

    def inspect(self, request: InspectData, stop: threading.Event) -> Iterator[DataReport | DataInspected]:
        """Reports that get better, until the last or until nobody wants it any more. Raises Problem."""
        tokenizer = self._tokenizer(request.model, request.template) if request.model else None
        last: Report | None = None
        for last in inspecting(request.source, tokenizer, request.data):
            if last.complete or stop.is_set():
                break
            yield DataReport(report=last)
        yield DataInspected(report=last)

    def show(self, request: ShowRow) -> RowShown:
        """One row. Raises Problem."""
        tokenizer = self._tokenizer(request.model, request.template)
        return RowShown(shown=show(request.source, request.row, tokenizer, request.data))

    def _tokenizer(self, model: str, template: str) -> ChatTokenizer:
        key = (model, template)
        if self._held is None or self._held[0] != key:
            self._held = (key, ChatTokenizer.from_folder(resolve(model).folder, template))
        return self._held[1]
