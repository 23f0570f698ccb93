"""Data previews by the engine, a separate process that does not load torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from qlora_tui.data.dataset_report import Report, Shown
from qlora_tui.engine.client import EngineClient
from qlora_tui.engine.protocol import InspectData, ShowFields, ShowRow
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Data, Source
from qlora_tui.training.gguf_conversion import tokenizer_folder
from tests.support.tiny_gguf import write_tiny_gguf
from tests.tui.sample_data import readable_model, ticket, tickets, write_rows

pytestmark = pytest.mark.usefixtures("quick_workers")


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[EngineClient]:
    async with EngineClient() as client:
        yield client


@pytest.fixture
def model(private_home: Path) -> str:
    return readable_model(private_home)


async def row(engine: EngineClient, path: Path, number: int, model: str = "") -> Shown:
    ask = ShowRow(source=Source(path=str(path)), row=number, data=Data(), model=model)
    return await engine.ask(ask).result()


async def reports(engine: EngineClient, path: Path, model: str = "") -> list[Report]:
    ask = InspectData(source=Source(path=str(path)), data=Data(), model=model)
    replies = [reply async for reply in engine.ask(ask)]
    return [reply for reply in replies if isinstance(reply, Report)]


def loaded_ml_libraries(engine: EngineClient) -> list[str]:
    assert engine.pid is not None
    mapped = {Path(m.path).name for m in psutil.Process(engine.pid).memory_maps()}
    return [name for name in mapped if "torch" in name or "_multiarray_umath" in name]


@pytest.mark.slow
async def test_a_row_comes_as_the_model_sees_it(engine: EngineClient, tmp_path: Path, model: str) -> None:
    shown = await row(engine, tickets(tmp_path / "t.jsonl"), 2, model)
    (pieces,) = shown.samples
    assert "".join(p.text for p in pieces if p.in_loss) == "Parcel 2 is on its way.<|im_end|>\n"
    assert {p.text for p in pieces if p.special} == {"<|im_start|>", "<|im_end|>"}
    assert shown.trained_counts < shown.token_counts


async def test_without_a_model_a_row_is_shown_as_stored(engine: EngineClient, tmp_path: Path) -> None:
    shown = await row(engine, tickets(tmp_path / "t.jsonl"), 2)
    assert shown.token_counts == ()
    assert [p.text for p in shown.samples[0] if p.in_loss] == ["Parcel 2 is on its way."]


async def test_a_broken_row_is_refused_with_its_reason(engine: EngineClient, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [ticket(1), "{oops", ticket(3)])
    assert "Line 2 is not valid JSON" in (await row(engine, path, 2)).refused


async def test_what_columns_hold_is_told_where_no_format_fits(engine: EngineClient, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"frage": "Wo?", "n": 1}, {"antwort": "x" * 500}])
    with pytest.raises(UserError, match="No known format fits"):
        await row(engine, path, 1)
    fields = await engine.ask(ShowFields(source=Source(path=str(path)))).result()
    assert list(fields) == ["frage", "n", "antwort"]
    assert (fields["frage"], len(fields["antwort"])) == ("Wo?", 200)


@pytest.mark.slow
async def test_reports_get_better_until_every_row_is_counted(
    engine: EngineClient, tmp_path: Path, model: str
) -> None:
    last = (await reports(engine, tickets(tmp_path / "t.jsonl"), model))[-1]
    assert (last.complete, last.counts.rows, last.counts.samples) == (True, 40, 39)
    assert last.lengths.unit == "tokens"
    plain = (await reports(engine, tmp_path / "t.jsonl"))[-1]
    assert (plain.counts.rows, plain.lengths.unit) == (40, "characters")


@pytest.mark.slow
async def test_whoever_stops_listening_stops_the_reading(
    engine: EngineClient, tmp_path: Path, model: str
) -> None:
    path = write_rows(tmp_path / "t.jsonl", [ticket(n % 50) for n in range(20_000)])
    first = asyncio.Event()

    async def listen() -> None:
        ask = InspectData(source=Source(path=str(path)), data=Data(), model=model)
        async for _ in engine.ask(ask):
            first.set()

    task = asyncio.create_task(listen())
    await first.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # The next question is answered without the rest of the file being read first.
    async with asyncio.timeout(15):
        assert (await row(engine, path, 3, model)).row == 3


@pytest.mark.slow
async def test_no_machine_learning_library_is_loaded(
    engine: EngineClient, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not a forked engine: this is about its imports.
    monkeypatch.setenv("FORK_SERVERS", "")
    await row(engine, tickets(tmp_path / "t.jsonl"), 1, model)
    assert loaded_ml_libraries(engine) == []
    assert engine.pid is not None
    assert psutil.Process(engine.pid).memory_info().rss < 150 << 20


async def test_a_gguf_file_shows_its_tokens_before_a_conversion(
    engine: EngineClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    path = tickets(tmp_path / "t.jsonl")
    monkeypatch.setenv("FORK_SERVERS", "")
    (pieces,) = (await row(engine, path, 2, str(file))).samples
    assert "".join(p.text for p in pieces if p.in_loss) == "Parcel 2 is on its way.<|im_end|>\n"
    assert loaded_ml_libraries(engine) == []
    assert tokenizer_folder(file).parent.name == "gguf-tokenizers"
