"""One line for each running download."""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content

from qlora_tui.formatting import format_bytes, format_duration
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.render.charts import bar
from qlora_tui.tui.screens.models.downloads import Download

LINES = 3


def download_lines(downloads: Sequence[Download], width: int) -> Content:
    """The newest downloads with progress, speed and remaining time."""
    return Content("\n").join([_line(download, width) for download in downloads[-LINES:]])


def _line(download: Download, width: int) -> Content:
    head = f"↓ {download.name} "
    stop = (f"  {key_name('models.cancel')} stop", "$text-muted")
    if download.status_text:
        return Content.assemble((head, "bold"), f"{download.status_text}…", stop).truncate(
            width, ellipsis=True
        )
    speed, left = download.bytes_per_s, download.seconds_left
    figures = f" {format_bytes(download.done_bytes)} of {format_bytes(download.total_bytes)}"
    if speed is not None and left is not None:
        figures += f", {format_bytes(round(speed))}/s, {format_duration(left)} left"
    width_left = min(30, width - len(head) - len(figures) - 9)
    share = download.done_bytes / download.total_bytes if download.total_bytes else 0.0
    drawn = bar(share, width_left) if width_left >= 6 else ""
    return Content.assemble((head, "bold"), (drawn, "$primary"), figures, stop)
