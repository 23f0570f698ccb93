"""Saying that a run is over to someone who looks at another window."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_tui.tui import escapes

if TYPE_CHECKING:
    from qlora_tui.runs.news import News
    from qlora_tui.tui.app import QloraApp


def announce(app: QloraApp, news: News) -> None:
    """By a line in the app, and by bell, title and desktop notification as the settings want them."""
    wanted = app.settings.notify
    app.notify(news.text, severity="information" if news.event == "finished" else "error")
    if wanted.title:
        app.write_escape(escapes.set_title(news.text))
    if wanted.desktop:
        app.write_escape(escapes.notification(news.text))
    if wanted.bell:
        app.bell()
