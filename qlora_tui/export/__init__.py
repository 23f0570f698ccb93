"""Export of a run's result in forms that other programs load.

``forms`` puts every form behind one function, for ``export_job``, the process of a background export.
``merge`` writes a 16-bit model folder, which ``merge_check`` compares with base and adapter, with a
``model_card``. ``gguf_export``, checked beforehand by ``gguf_plan``, writes GGUF files with ``gguf_file``, on
the base weights that ``base_choice`` picks, and ``proof`` compares each with the trained model's answers
through ``llama_cpp``. ``reference`` chooses the validation rows and has these answers. ``ollama_export`` adds
a Modelfile, whose TEMPLATE ``ollama_template`` writes and ``go_template`` renders. ``adapter_folder`` copies
an adapter that vLLM can serve. ``hub`` uploads an adapter, model or GGUF file with the jobs of
``hub_upload``. ``unfinished_files`` names files once they are complete. ``gguf_chat``
lets a written file answer in the chat.
"""
