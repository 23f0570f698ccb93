"""The Home screen. ``screen`` has its panels and commands, ``reader`` reads the contents of the panels,
``panel_lines`` and ``first_lines`` format the contents, and ``next_step`` suggests what to do next.
"""
