"""The two engines of the Data screen: one for single rows, and one for reports on whole sources. With
separate engines, rows appear at once instead of waiting for a report.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec

from qlora_tui.data.dataset_report import Report, Shown
from qlora_tui.data.sources import FormatChoice, source_stamps
from qlora_tui.engine.client import EngineClient
from qlora_tui.engine.protocol import InspectData, ShowFields, ShowFormats, ShowRow
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Data, Recipe, Source


@dataclass(frozen=True)
class PreviewRequest:
    """A source, and the settings that affect how the model sees its rows."""

    source: Source
    data: Data
    model: str
    template: str
    stamps: tuple[tuple[str, int, int], ...]
    """(path, modification time, size) of each file. A request for a changed file is not equal to an earlier
    request.
    """

    @classmethod
    def of(cls, recipe: Recipe, number: int) -> PreviewRequest:
        """Return the request for the source at index ``number`` in the recipe.

        In the request, settings that do not affect the rows have default values. Requests that differ only in
        such settings are therefore equal.
        """
        data = Data(
            max_length=recipe.data.max_length,
            overflow=recipe.data.overflow,
            preferences=recipe.data.preferences,
            bad_rows=recipe.data.bad_rows,
            train_on=recipe.data.train_on,
            thinking=recipe.data.thinking,
            reasoning_in_loss=recipe.data.reasoning_in_loss,
        )
        source = recipe.data.sources[number]
        return cls(source, data, recipe.model.id, recipe.model.chat_template, source_stamps(source))


class DataPreviews:
    """Two engine processes: one for single rows and one for reports. Two engines that start at the same time
    would slow each other down, so the engine for reports starts after the first row was returned. Neither
    engine loads torch.
    """

    def __init__(self) -> None:
        self._rows = EngineClient()
        self._reports = EngineClient()
        self._first_row_shown = asyncio.Event()

    async def start(self) -> None:
        """Start the engine for single rows before a row is needed. Raises UserError if it cannot be
        started.
        """
        await self._rows.start()

    async def row(
        self, wanted: PreviewRequest, number: int, path: str = ""
    ) -> tuple[Shown, UserError | None]:
        """Return (row, error). Usually, the row is as the model sees it, and the error is None.

        If the row cannot be rendered for the model, the row is as it is in the file, and the error says why.
        Without a model, the row is as it is in the file, and the error is None.

        Args:
            wanted: The source, and the settings for its rows.
            number: Number of the row in its file, from 1.
            path: The row's file; empty for the source's first file.

        Raises:
            UserError: The row cannot be read.
        """
        request = ShowRow(
            source=wanted.source,
            row=number,
            path=path,
            data=wanted.data,
            model=wanted.model,
            template=wanted.template,
        )
        try:
            return await self._rows.ask(request).result(), None
        except UserError as problem:
            if not wanted.model:
                raise
            # If the error was caused by the file rather than by the model, this request fails with the same
            # error.
            plain = msgspec.structs.replace(request, model="", template="")
            return await self._rows.ask(plain).result(), problem
        finally:
            self._first_row_shown.set()

    async def reports(self, wanted: PreviewRequest) -> AsyncIterator[Report]:
        """Yield reports on the whole source while it is being read. If the source cannot be rendered for the
        model, lengths are in characters.

        Reading starts after the first call of :meth:`row` has ended. Raises UserError if the source cannot be
        read.
        """
        await self._first_row_shown.wait()
        request = InspectData(
            source=wanted.source, data=wanted.data, model=wanted.model, template=wanted.template
        )
        try:
            async for report in self._inspect(request):
                yield report
        except UserError:
            if not wanted.model:
                raise
            async for report in self._inspect(msgspec.structs.replace(request, model="", template="")):
                yield report

    async def fields(self, source: Source) -> dict[str, str]:
        """Return an example value for each column of a file in an unknown format, by the column's name; empty
        if no row can be read.
        """
        try:
            return await self._rows.ask(ShowFields(source=source)).result()
        except UserError:  # :meth:`row` has already raised this error
            return {}

    async def formats(self, source: Source, preferences: str) -> tuple[FormatChoice, ...]:
        """Return, for each format, how many rows of the source's first file can be read in this format.
        ``preferences``: the recipe's ``data.preferences``.

        Raises UserError if the file cannot be read.
        """
        return await self._rows.ask(ShowFormats(source=source, preferences=preferences)).result()

    async def kill(self) -> None:
        """Kill the engine processes for rows and for reports."""
        await asyncio.gather(self._rows.kill(), self._reports.kill())

    async def _inspect(self, request: InspectData) -> AsyncIterator[Report]:
        async for reply in self._reports.ask(request):
            if isinstance(reply, Report):
                yield reply
