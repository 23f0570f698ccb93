"""Windows over any screen.

``confirm`` asks yes or no, ``text_prompt`` for a text; ``error``, ``help`` and ``too_small`` inform,
``draft_changed`` asks whose recipe stays when another app has changed it, ``assume_gpu`` asks for a GPU's
size, and ``machine_report`` tests this machine. ``list_picker`` is the base of dialogs that select from a
list.
"""
