"""The Data screen. ``screen`` shows the selected source and carries out the commands for its rows;
``source_actions`` has the commands that add, remove and change sources.

``row_engines`` requests rows and reports from engine processes. ``sample`` draws rows with styled tokens.
``report`` draws the totals, lengths and problems of a whole source. ``dialogs`` has the dialogs for columns,
formats, preferences, and the losses of rows in a run.
"""
