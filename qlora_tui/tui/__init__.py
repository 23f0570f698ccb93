"""The terminal app. Textual lives here, and only here.

app.py        the frame: screens, themes, keys, what every screen shares
workbench.py  the recipe being edited, and what follows from it (architecture, estimate)
system_monitor.py  polls the GPU and the runs, once a second
draft.py      the file it is kept in, which several apps may share
disk_faults.py  what is said of a disk that cannot be written
visible_lines.py  the text layer: no line reaches the terminal with a control character
commands.py   how a command is declared; each screen declares its own
screens/      one module and one .tcss a screen
widgets/      pieces that more than one screen shows, and graphs
"""
