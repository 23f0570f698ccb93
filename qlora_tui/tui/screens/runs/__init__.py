"""The Runs screen. ``screen`` carries out the commands, ``run_list`` has the list of runs and the preview of
the run under the cursor.

``compare`` shows two to four runs side by side, ``sweep`` shows a sweep, and ``export_dialog`` exports a run
for other programs, in one of the formats of ``export_formats``.
"""
