"""The LoRA screen. ``screen`` has its panels and commands, ``module_grid`` the grid with a check box for each
module.

``adapter`` has the settings next to the grid with their explanations, and the costs of the adapter and of
adapters with other settings.
"""
