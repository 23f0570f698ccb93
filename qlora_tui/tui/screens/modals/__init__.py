"""Dialogs that open on top of any screen.

``dialogs`` has confirmations, text prompts, list pickers, errors, and the check of this machine; ``help``
explains the current screen; ``file_picker`` opens data and models.
"""
