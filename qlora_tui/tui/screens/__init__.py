"""A package for each screen: its class is in the module ``screen`` there.

Every ``action_…`` method of a screen is in ``screen``, or in the ``…actions`` modules of its package. Those
have a base class of the screen, ``…Actions``: it calls what the screen implements, and a package with several
modules stacks them (``DataScreen``, ``DataActions``, ``RowActions``, ``WorkScreen``).
``base`` is what all screens share. ``modals`` has the dialogs that any
screen may open. ``answer_measuring`` lets Runs and Train measure answers.
"""
