"""Export of a run's result: ``merge``, and its ``model_card``.

``merge_check`` compares a merged model with its base and adapter.
"""
