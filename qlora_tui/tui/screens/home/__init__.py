"""Home: ``screen`` and ``actions``; ``reader`` gathers what it shows, ``text`` formats it.
The layout in narrow windows is in the CSS of ``screen``.

``next_step`` decides what Enter does; the key of the guide follows ``tui.first_steps``. ``starters`` offers
models to new users. ``recent_runs`` is the list of earlier runs.
"""
