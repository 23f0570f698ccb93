"""LoRA: ``screen``, with a check box for each module in its ``module_grid``.

``adapter_settings`` are the settings beside it and what they mean; ``adapter_costs`` is what the adapter
costs, and what other choices would.
"""
