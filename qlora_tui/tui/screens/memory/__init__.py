"""Memory: ``screen``, with a bar for each precision and the items of one in ``peak_panel``.

``what_fits`` computes and shows what fits, and what would make it fit. ``quality`` measures what quantization
changes in the predictions. ``timeline_graph`` shows the memory
over a training step.
"""
