"""A run's result in a form that other programs load: ``merge``, with a model card."""
