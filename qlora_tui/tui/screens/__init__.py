"""A package for each screen. The module ``screen`` of a package has the class of the screen and its actions.

The keys of all screens, with their texts for help and palette, are in ``tui/commands.toml``. A key's action
is the method ``action_…`` of the screen. ``base`` has the base classes of the screens, ``modals`` the dialogs
that any screen may open, and ``runs_and_train_commands`` the commands that Runs and Train have in common.
"""
