"""Windows over any screen.

``dialogs`` asks yes or no, for a text or for a choice, and shows errors; ``help`` lists keys, and
``machine_report`` tests this machine. ``list_picker`` is the base of dialogs that select from a list.
"""
