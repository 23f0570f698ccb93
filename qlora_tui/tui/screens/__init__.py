"""A package for each screen: its class is in the module ``screen`` there, with its actions.

The keys of every screen, and what help and palette say of them, are in ``tui/commands.toml``; the action of a
key is the method ``action_…`` of its screen. ``base`` is what all screens share. ``modals`` has the dialogs
that any screen may open. ``answer_measuring`` lets Runs and Train measure answers.
"""
