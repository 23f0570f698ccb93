"""The engines of the Data screen: one for single rows, so that they appear at once, and one for the whole
file.
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
    """Path, modification time and size of each file. The source is read again if a file has changed."""

    @classmethod
    def of(cls, recipe: Recipe, number: int) -> PreviewRequest:
        """Return the request for source ``number`` of the recipe.

        Settings that do not affect it are left out.
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
    """Two engines, started one after the other since they would slow each other down. Neither loads torch."""

    def __init__(self) -> None:
        self._rows = EngineClient()
        self._reports = EngineClient()
        self._first_row_shown = asyncio.Event()

    async def start(self) -> None:
        """Start the engine for rows before it is needed. Raises UserError."""
        await self._rows.start()

    async def row(
        self, wanted: PreviewRequest, number: int, path: str = ""
    ) -> tuple[Shown, UserError | None]:
        """Return the row as the model sees it.

        Without a tokenizer, return it as it is in the file, with the reason.
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
            # If the error is in the file itself, this raises it again.
            plain = msgspec.structs.replace(request, model="", template="")
            return await self._rows.ask(plain).result(), problem
        finally:
            self._first_row_shown.set()

    async def reports(self, wanted: PreviewRequest) -> AsyncIterator[Report]:
        """Yield reports on the whole source as it is read. Without a tokenizer, lengths are in characters.

        Waits until the first row has been shown.
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
        """Return the columns of a file in an unknown format, each with an example value; empty if no row can
        be read.
        """
        try:
            return await self._rows.ask(ShowFields(source=source)).result()
        except UserError:  # the file already caused this error
            return {}

    async def formats(self, source: Source, preferences: str) -> tuple[FormatChoice, ...]:
        """Return how many rows of a source's first file each format can read.

        Raises UserError if the file cannot be read.
        """
        return await self._rows.ask(ShowFormats(source=source, preferences=preferences)).result()

    async def kill(self) -> None:
        """Kill both engines at once."""
        await asyncio.gather(self._rows.kill(), self._reports.kill())

    async def _inspect(self, request: InspectData) -> AsyncIterator[Report]:
        async for reply in self._reports.ask(request):
            if isinstance(reply, Report):
                yield reply
