"""Notify that a run ended: toast, terminal title, desktop notification, bell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_tui.tui import escapes

if TYPE_CHECKING:
    from qlora_tui.runs.notify import RunNotification
    from qlora_tui.tui.app import QloraApp


def notify_run_ended(app: QloraApp, notification: RunNotification) -> None:
    """By a line in the app, and by bell, title and desktop notification as the settings want them."""
    wanted = app.settings.notify
    app.notify(notification.text, severity="information" if notification.event == "finished" else "error")
    if wanted.title:
        app.write_escape(escapes.set_title(notification.text))
    if wanted.desktop:
        app.write_escape(escapes.notification(notification.text))
    if wanted.bell:
        app.bell()
