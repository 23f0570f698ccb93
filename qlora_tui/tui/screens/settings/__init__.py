"""The settings window: ``screen`` is a form for :class:`qlora_tui.settings.Settings`."""
