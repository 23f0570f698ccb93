"""Which models there are, and what each is made of.

* ``facts``: the records: an ``Architecture`` and its linear modules, embeddings, head, other parameters.
* ``architecture``: ``read_architecture``: from a ``config.json`` to those records. Pure Python, no weights.
* ``families/``: what each model family is built of, as tables; ``template`` and ``config_fields`` read them.
* ``local``, ``model_folder``, ``gguf``: the models on this machine; why one is refused; finding one by name.
* ``code_keys``: keys of configs that would choose which code runs, refused or left out.
* ``lookup``: an architecture by the model's name, weights or not.
* ``context``: samples longer than the model has seen any.
* ``hub``, ``hub_files``, ``download``, ``hub_errors``: search the hub, plan a download, fetch it; what goes
  wrong.

Read by the memory estimate, the LoRA and Model screens, and the trainer.
"""
