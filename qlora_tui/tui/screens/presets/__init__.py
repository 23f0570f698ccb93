"""The window for presets: ``screen`` lists presets, previews what opening a preset would change, and writes
preset files.
"""
