"""Memory: ``screen`` and its ``commands``; ``stacked_bar`` and ``text`` format the estimate."""
