"""One module a screen; ``base`` is what they share. Modals: problem, question, presets, help,
draft_changed (another app edited the recipe)."""
