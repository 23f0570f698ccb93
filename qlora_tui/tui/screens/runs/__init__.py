"""Runs: ``screen`` and its ``commands``; ``run_table`` lists runs, ``actions`` act on one.

``compare`` shows up to four runs side by side.
"""
