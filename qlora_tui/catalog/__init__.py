"""Which models there are, and what each is made of.

* ``facts``: the records: an ``Architecture`` and its linear modules, embeddings, head, other parameters.
* ``architecture``: ``read_architecture``: from a ``config.json`` to those records. Pure Python, no weights.
* ``families/``: what each model family is built of, as tables; ``template`` and ``config_fields`` read them.
* ``local``, ``gguf``: the models on this machine; ``resolve`` finds one by name.
* ``hub``, ``download``: search and fetch, through ``huggingface_hub``.

Read by the memory estimate, the LoRA and Models screens, and the trainer.
"""
