"""Settings of the app: ``screen`` is a form over :class:`qlora_tui.settings.Settings`."""
