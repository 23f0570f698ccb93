"""A run's result as other programs load it: ``merge`` (with ``weight_files``), and its model ``card``."""
