"""Home: ``screen``; ``reader`` gathers what it shows, and ``panel_lines`` formats it.

``next_step`` suggests what to do.
"""
