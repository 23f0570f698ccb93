"""Memory: ``screen``.

``solution`` computes what fits and what would make it fit. Its panels: ``peak_panel`` with a
``stacked_bar`` for each precision, ``items_panel``, ``fit_panel`` with the changes that make it fit,
``timeline_graph`` with the memory over a training step. ``settings_table`` formats each setting with its
largest value and the effect of its key. ``text`` has the words of titles.
"""
