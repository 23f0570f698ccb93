"""Home: ``screen`` and its ``commands``; ``reader`` gathers what it shows, ``next_step`` what to suggest."""
