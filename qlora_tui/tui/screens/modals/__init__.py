"""Windows over any screen.

``dialogs`` asks yes or no, for a text or for a line of a list, shows errors, and tests this machine; ``help``
lists keys.
"""
