"""LoRA: ``screen`` and its ``commands``.

``module_grid`` is the widget with a check box for each module, over a ``module_table``. ``controls`` has the
settings beside it, ``totals`` what they cost, ``target_input`` parses typed patterns.
"""
