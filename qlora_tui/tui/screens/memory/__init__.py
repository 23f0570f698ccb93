"""Memory: ``screen`` and its ``commands``.

``solution`` computes what fits and what would make it fit; ``stacked_bar`` and ``text`` format the estimate.
"""
