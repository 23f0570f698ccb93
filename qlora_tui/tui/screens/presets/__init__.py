"""Presets: ``screen`` lists them, ``commands`` are its keys, of which ``preset_actions`` changes files.

``preset_files`` imports, exports and edits them. ``preset_preview`` says what opening one would change.
"""
