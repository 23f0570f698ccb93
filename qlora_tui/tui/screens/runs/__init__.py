"""Runs: ``screen`` has the keys, ``run_list`` the list of runs and the preview of the run under the cursor.

``compare`` shows up to four runs side by side. ``export_dialog`` exports a run for other programs.
"""
