"""Presets: ``screen`` lists them, ``preset_actions`` changes files.

``preset_files`` imports, exports and edits them. ``preset_preview`` says what opening one would change.
"""
