"""Export of a run's result in forms that other programs load.

forms               every form behind one function; export_job is the process of a background export
gguf                GGUF files, written with gguf_file; their types are in catalog/gguf_file_types
base_choice         chooses the base weights that an adapter is merged into
reference, proof    the trained model's answers, and llama.cpp's comparison of a file with them (llama_cpp)
merge               a 16-bit model folder, compared with base and adapter
adapter_folder      a copy of an adapter that vLLM can serve
ollama              a GGUF file with a Modelfile; ollama_template derives its TEMPLATE
hub                 adapter, model or GGUF file on the Hub; hub_upload has the jobs that use the network
model_card          the README.md of models
unfinished_files    files that appear under their names once they are complete
gguf_chat           answers of an exported GGUF file in the chat
"""
