"""Writes a model as a GGUF file, the format of llama.cpp, Ollama and LM Studio, with the ``gguf`` package.

``families`` says how llama.cpp stores each supported family, ``hyperparameters`` reads its sizes from the
config, ``vocabulary`` and ``pre_tokenizer`` convert the tokenizer, ``expert_stacks`` joins the experts of a
layer, ``tensor_types`` picks the type of each tensor, and ``writer`` writes the file one tensor at a time.
``stored_types`` reads what was written.
Format: github.com/ggml-org/ggml, docs/gguf.md.
"""
