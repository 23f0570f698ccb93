"""LoRA: ``screen``, with a check box for each module in its ``module_grid``.

``adapter`` has the settings next to the grid with their explanations, and the costs of the adapter and of
other choices.
"""
