"""Dialogs that open on top of any screen.

``dialogs`` asks yes or no, for a text, or for an item of a list, shows errors, and tests this machine;
``help`` explains the current screen; ``file_picker`` opens data and models.
"""
