"""A run's result as other programs load it: ``merge`` (with ``weight_files``), and its model ``card``.

``verify`` compares a merged model with its base and adapter.
"""
