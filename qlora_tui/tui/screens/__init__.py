"""A package for each screen: its class is in the module ``screen`` there, its keys in ``commands``.

``base`` is what all screens share, ``registry`` finds a screen by its mode, ``static_update`` replaces text
only where it differs, ``train_checks`` checks what a run needs. ``modals`` has the windows that any screen
may open.
"""
