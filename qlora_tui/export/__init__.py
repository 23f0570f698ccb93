"""Export of a run's result in forms that other programs load.

``merge`` writes a 16-bit model folder, which ``merge_check`` compares with base and adapter, with a
``model_card``; the arithmetic of every merge is ``apply_to`` of ``chat.adapter_deltas``. ``gguf_export``,
checked beforehand by ``gguf_plan``, and ``lora_export`` write GGUF files with ``gguf_file``:
``merged_weights`` yields the weights, on the base that ``base_choice`` picks (``requantize`` rounds it as in
training), and ``proof`` compares each GGUF file with the trained model's answers through ``llama_cpp``.
``reference`` chooses the validation rows and their positions; ``answer_files`` computes the answers.
``ollama_export`` adds a Modelfile, whose TEMPLATE ``ollama_template`` writes and ``go_template`` renders.
``adapter_folder`` copies an adapter that vLLM can serve. ``hub_export`` uploads what ``upload_files`` writes
(adapter, model or GGUF file) in the process ``hub_upload``.
``unfinished_files`` names files once they are complete; until then a ``journal`` of what is, under an
``export_key`` of all that it depends on, lets an interrupted export continue (``merged_files`` for a merge).
``forms`` puts every form behind one function, for ``export_job``, the process of a background export.
``gguf_chat`` lets a written file answer in the chat.
"""
