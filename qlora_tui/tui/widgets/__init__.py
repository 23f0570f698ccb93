"""Widgets that two or more screens share, each with its CSS. Widgets of a single screen are in that screen's
package.

``controls`` has panels, lists, scrolled text, text fields, and drawings that repaint only lines that changed.
``column`` has the layouts of panels in columns and rows. ``bars`` are the first and last line of every
screen; ``recipe_strip`` is on screens that edit the recipe. ``settings_form`` edits declared settings.
"""
