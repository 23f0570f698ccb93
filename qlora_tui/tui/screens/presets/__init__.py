"""Presets: ``screen`` lists them, ``preset_files`` saves, imports, exports and edits their files.

``preset_preview`` shows what opening one would change.
"""
