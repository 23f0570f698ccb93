"""The LoRA screen. ``screen`` has the panels and commands. ``module_grid`` has the grid, with a check box for
each kind of module.

``adapter`` has the settings next to the grid, with explanations, and the costs of the adapter and of adapters
with other settings.
"""
