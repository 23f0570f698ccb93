"""Runs: ``screen``; ``actions`` is what its keys do, ``run_table`` lists runs
(``_COLUMNS``).

``run_order`` sorts them, ``run_preview`` formats what is shown of one. ``compare`` shows up to four runs side
by side; ``export_dialog`` exports one, in a form that ``export_choices`` lists.
"""
