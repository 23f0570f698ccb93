"""Data: ``screen`` has the sources, the keys, and the changes to the recipe.

``row_engines`` asks the engine for rows and reports. ``sample`` shows a row with its tokens styled,
``report`` a whole source: totals, lengths and problems. ``dialogs`` select how files are read, and list rows
by how their loss changed in a run.
"""
