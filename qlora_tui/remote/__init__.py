"""Work on another machine, a box: the app and commands run here, and runs train there, over the user's ssh.

ssh       finds ssh and the program on the box, opens channels through one connection, sends files
messages  the lines that app and box exchange, and how values of this program become JSON
mirror    a copy of the box's runs on this machine, which all readers of runs use
calls     marks the functions that are called on the box
link      the connection of an app: keeps the mirror up to date, and calls functions on the box
uploads   sends data files, which are identified by their hash

The box's side is the command ``store`` (:mod:`qlora_tui.cli.store`), which needs no port and no daemon: ssh
starts it, and it ends with the connection. Runs do not depend on it.
"""
