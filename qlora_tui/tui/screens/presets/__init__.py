"""Presets: ``screen`` lists them, previews a change, and writes their files."""
