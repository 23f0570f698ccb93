"""The whole workflow on a small real model: ``qlora-tui demo``.

``conversations``  the training data (``conversations.jsonl``), held-out prompts, and the voice to learn
``demo_model``     the model's folder: downloaded from the package index and converted once, then cached
``demo_run``       from the data to answers of base and adapter side by side
"""
