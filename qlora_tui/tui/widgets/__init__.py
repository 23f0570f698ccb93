"""Widgets that two screens or more share, each with the CSS it needs; a screen's own are in its package.

``controls`` has panels, lists, scrolled text, text fields, and drawings that repaint only lines that changed.
``bars`` are the first and last line of every screen; ``recipe_strip`` is on screens that edit the recipe.
``settings_form`` edits declared settings.
"""
