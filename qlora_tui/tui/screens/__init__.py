"""A package for each screen: its class is in the module ``screen`` there, its keys in ``commands``.

Every ``action_…`` method of a screen is in ``screen``, or in ``actions`` where its package has that module.
``base`` is what all screens share, ``registry`` declares every screen. ``modals`` has the dialogs that any
screen may open.
"""
