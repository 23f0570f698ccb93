"""The available models and their architectures.

* ``architecture_types``: ``Architecture`` and its linear modules, embeddings, head and other parameters.
* ``config_parser``: converts a ``config.json`` to these types, in pure Python and without the weights.
  ``config_fields``: typed reading of a config with bounds.
* ``described``: exact architectures, which a separate process reads from transformers' classes, and which are
  cached on disk. ``outline``: approximate architectures, from the keys that configs share; ``library_types``:
  facts about a model type from the source of the installed transformers.
* ``local_models``: lists the models on this machine, finds one by name, and reads architectures without
  needing weights.
  ``model_validation``: whether a model can be trained. ``adapters``: LoRA adapters.
* ``gguf``: the header of GGUF files. ``gguf_config``: the model that a file describes, or why the file is
  refused; ``gguf_architectures``, ``gguf_metadata``: the fields that are read for each architecture.
  ``gguf_tokenizers``: how the tokenizers of GGUF files split text. ``gguf_file_types``: the types of exported
  GGUF files, such as Q4_K_M.
* ``hub``: searches the Hub, limits the size of its responses, and translates its errors. ``download``:
  downloads a model.
* ``optional_kernels``: packages without which the layers of some models are slow on a GPU.
* ``starter_models``: good first models, kept in ``starter_models.toml``.

The memory estimate, the LoRA and Model screens, and the trainer use this package.
"""
