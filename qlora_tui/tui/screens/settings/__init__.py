"""The window for the settings of the app: ``screen`` is a form for :class:`qlora_tui.settings.Settings`."""
