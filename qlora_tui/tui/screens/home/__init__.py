"""Home: ``screen`` and its ``commands``; ``reader`` gathers what it shows, ``text`` formats it.

``next_step`` decides what to suggest, ``first_steps`` leads new users.
"""
