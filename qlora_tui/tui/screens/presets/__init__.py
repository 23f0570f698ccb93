"""Presets: ``screen`` lists presets, previews the changes that opening one makes, and writes their files."""
