"""A package for each screen. Its module ``screen`` has the screen's class and actions.

The keys of every screen, with their texts for help and palette, are in ``tui/commands.toml``; a key's action
is the method ``action_…`` of its screen. ``base`` is shared by all screens. ``modals`` has the dialogs that
any screen may open. ``answer_measuring`` lets Runs and Train measure answers.
"""
