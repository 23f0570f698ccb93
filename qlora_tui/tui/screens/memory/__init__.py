"""Memory: ``screen``, with a bar for each precision and the items of one in ``peak_panel``.

``what_fits`` computes and shows what fits, and what would make it fit. ``timeline_graph`` shows the memory
over a training step.
"""
