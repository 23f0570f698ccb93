"""LoRA: ``screen`` has the panels and keys, ``module_grid`` a check box for each module.

``adapter`` has the settings next to the grid with their explanations, and the costs of the adapter and of
other choices.
"""
