"""Memory: ``screen``, with a bar for each precision in its ``peak_panel`` and one of them in ``items_panel``.

``what_fits`` computes and shows what fits, and what would make it fit. ``timeline_graph`` shows the memory
over a training step.
"""
