"""Windows over any screen.

``dialogs`` ask yes or no, for a text or for a line of a list, show errors, test this machine, and list keys.
``file_picker`` opens data and models.
"""
