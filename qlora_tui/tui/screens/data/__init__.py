"""Data: ``screen`` shows a sample, lengths and problems; ``commands`` are its keys.

``actions`` is what they do to the recipe, ``row_actions`` goes from row to row (by ``row_navigation``).
``previews`` asks the engines for rows and reports, ``text`` formats them, ``histogram`` and ``length_table``
show lengths. ``file_picker`` and ``column_mapping`` are windows of this screen.
"""
