"""LoRA: ``screen``, with a check box for each module in its ``module_grid``.

``adapter`` has the settings beside it and what they mean, and what the adapter costs, and what other choices
would.
"""
