"""The Data screen. ``screen`` shows the selected source and carries out the commands for its rows;
``source_actions`` has the commands that add, remove and change sources.

``row_engines`` asks the engine for rows and reports. ``sample`` draws rows with their tokens styled, and
``report`` draws totals, lengths and problems of a whole source. ``dialogs`` has the dialogs for columns,
formats, preferences, and the losses of rows in a run.
"""
