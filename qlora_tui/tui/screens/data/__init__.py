"""Data: ``screen`` shows a sample, lengths and problems; ``commands`` are its keys.

``actions`` is what they do. ``previews`` asks the engines for rows and reports, ``row_navigation`` goes
from row to row, ``text`` formats them, ``histogram`` and ``length_table`` show lengths. ``file_picker`` and
``column_mapping`` are windows of this screen.
"""
