"""The available models and their architectures.

* ``architecture_types``: ``Architecture`` and its linear modules, embeddings, head and other parameters.
* ``config_parser``: ``parse_architecture``, from a ``config.json`` to those types. Pure Python, no weights.
* ``families/``: the structure of each model family, as tables, with which modules are quantized;
  ``family_spec`` and ``config_fields`` read them.
* ``local_models``, ``model_validation``, ``gguf_header``: the models on this machine, whether each can be
  trained, and finding one by name; ``gguf_support``: what of a GGUF file would be lost.
* ``gguf_file_types``: types of GGUF files that can be exported, with their sizes.
* ``safetensors_header``: shapes and offsets of the tensors in a weights file, and whether it is complete.
* ``adapter_config``: a LoRA adapter's config, checked before peft reads it.
* ``adapter_fit``: whether an adapter can be trained further with a recipe.
* ``code_keys``: keys of configs that would choose which code runs, rejected or removed.
* ``lookup``: an architecture by the model's name, with or without its weights; ``config_cache`` stores for
  it the configs from the Hub.
* ``starter_models``: models worth starting with, offered to a user who has none.
* ``context_length``: the warning for samples longer than the model's context.
* ``hub``, ``hub_files``, ``download``, ``hub_errors``, ``hub_responses``: search the Hub, plan a download,
  run it, translate its errors, and read its responses within bounds.

Read by the memory estimate, the LoRA and Model screens, and the trainer.
"""
