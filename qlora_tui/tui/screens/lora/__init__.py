"""LoRA: ``screen``.

``module_grid`` is the widget with a check box for each module, over a ``module_table``; ``custom_value`` asks
for their own rank. ``settings_list`` has the settings beside it, ``controls`` their words and
``term_panel`` what they mean, ``totals`` what they cost, ``choice_table`` what others would, ``target_input``
parses typed patterns.
"""
