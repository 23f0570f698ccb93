"""Presets: ``screen`` lists them, ``commands`` are its keys, ``preset_preview`` says what one would change.

``preset_files`` imports, exports and edits preset files.
"""
