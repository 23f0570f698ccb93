"""Home: ``screen``, its ``commands`` and ``actions``; ``reader`` gathers what it shows, ``text`` formats it.
The layout in narrow windows is in the CSS of ``screen``.

``next_step`` decides what to suggest, ``first_steps`` leads new users, to whom ``starters`` offers models.
``recent_runs`` is the list of earlier runs.
"""
