"""Data: ``screen`` has the sources, the keys, and what changes the recipe.

``row_engines`` asks the engine for rows and reports. ``sample`` shows a row with its tokens styled,
``report`` a whole source: totals, lengths and problems. ``dialogs`` select how files are read, and list rows
by what a run learned from them.
"""
