from __future__ import annotations

from textual.app import App, ComposeResult

from qlora_tui.tui.screens.train.log_tail import LogEntry, LogTail
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until


class Bare(App[None]):
    CSS = "LogTail { height: 1fr; }"

    def compose(self) -> ComposeResult:
        yield LogTail("Nothing yet.")


async def test_a_long_logs_scrollbar_covers_no_text() -> None:
    app = Bare()
    async with app.run_test(size=(30, 5)) as pilot:
        entries = [LogEntry(None, "info", "short")]
        log = app.query_one(LogTail)
        log.show(entries)
        await wait_for_text(pilot, "short")
        entries += [LogEntry(None, "info", f"line {n} fills all of its place") for n in range(10, 20)]
        log.show(entries)
        # The whole of the last line, which has gone on to a second.
        await wait_until(pilot, lambda: text_of(app).rstrip().endswith("place"))
