"""Dialogs that may open over any screen.

``dialogs`` has confirmations, text prompts, list pickers, errors, and the check of this machine; ``help``
explains the current screen; ``file_picker`` asks for the path of data or of a model.
"""
