"""Home: ``screen`` has the panels, ``reader`` reads their contents, ``panel_lines`` formats them, and
``next_step`` suggests what to do.
"""
