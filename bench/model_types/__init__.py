"""Every type of model that transformers builds, tried on a tiny random one: ``python -m bench.model_types``.

* ``tiny_config``: a config of any type, made from the defaults of its class and shrunk by rule.
* ``walk``: trains, resumes, merges and asks one model, each compared with the libraries.
* ``estimates``: compares the instant estimate of its memory with a traced step.
* ``processes``: walks many. ``outcome``: what came of it, for the docs.
"""
