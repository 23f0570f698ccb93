"""Runs: ``screen`` with its ``run_list`` and the preview of the run under its cursor.

``compare`` shows up to four runs side by side. ``export_dialog`` exports a run for other programs.
"""
