"""Every model type that transformers builds, tested with a tiny random model: ``python -m
bench.model_types``.

* ``tiny_config``: a config of any type, made from the defaults of its class and shrunk by rules.
* ``walk``: trains, resumes, merges and queries one model, each compared with the libraries.
* ``estimates``: compares the instant estimate of its memory with a traced step.
* ``processes``: tests many types. ``outcome``: the results, for the docs.
"""
