"""Presets: ``screen`` lists them and previews a change; ``preset_files`` writes their files."""
