"""One module a screen; ``base`` is what they share. Modals: error, confirm, presets, help,
draft_changed (another app edited the recipe)."""
