"""Memory: ``screen``, with the peak of a training step in ``step_panels``.

``what_fits`` computes and shows what fits, and what would make the recipe fit.
"""
