"""Widgets that two screens or more share, each with the CSS it needs; a screen's own are in its package.

``panel`` is the frame of everything on a screen; ``bars`` are its first and last line. ``recipe_strip`` is
on screens that edit the recipe. ``settings_form`` edits declared settings. ``controls`` has lists, scrolled
text and text fields; ``line_widgets`` paint lines of text, and repaint only cells that changed.
"""
