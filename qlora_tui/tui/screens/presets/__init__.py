"""Presets: ``screen`` lists them, ``preset_preview`` says what one would change.

``preset_files`` imports, exports and edits preset files.
"""
