"""The available models and their architectures.

* ``architecture_types``: ``Architecture`` and its linear modules, embeddings, head and other parameters.
* ``config_parser``: ``parse_architecture``, from a ``config.json`` to those types. Pure Python, no weights.
  ``config_fields``: typed and bounded reading of it.
* ``described``: exact architectures, which a process reads from transformers' classes, kept on disk.
  ``outline``: approximate ones, from the keys that configs share; ``library_types``: what the installed
  transformers knows of a type, from its source.
* ``local_models``: the models on this machine, finding one by name, and architectures without weights.
  ``model_validation``: whether a model can be trained. ``adapters``: LoRA adapters.
* ``gguf``: the header of GGUF files. ``gguf_config``: the model that one describes, or why it is refused;
  ``gguf_architectures``, ``gguf_metadata``: what is read of each architecture. ``gguf_tokenizers``: how each
  of their tokenizers splits text.
* ``hub``: search the Hub, read its responses within bounds, translate its errors. ``download``: a model.
* ``optional_kernels``: packages without which the layers of some models are slow on a GPU.
* ``starter_models``: good first models, kept in ``starter_models.toml``.

Read by the memory estimate, the LoRA and Model screens, and the trainer.
"""
