"""Windows over any screen.

``dialogs`` ask yes or no, for a text or for a line of a list, show errors, and test this machine;
``help`` explains the screen in front.
``file_picker`` opens data and models.
"""
