"""Runs: ``screen`` with its ``run_list`` and what is shown of the run under its cursor.

``compare`` shows up to four runs side by side. ``export_dialog`` writes one for other programs.
"""
