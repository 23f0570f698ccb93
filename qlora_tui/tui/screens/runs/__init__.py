"""Runs: ``screen`` with its ``run_table``, and ``run_preview``, which formats what is shown of one.

``compare`` shows up to four runs side by side. ``export_dialog`` writes one for other programs.
"""
