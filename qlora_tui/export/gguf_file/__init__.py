"""Writes a model as a GGUF file, the format of llama.cpp, Ollama and LM Studio, with the ``gguf`` package.

content        what the file of a base with a merged adapter holds
architectures  llama.cpp's architecture of each model type, and how its tensors differ from transformers'
tensors        names, shapes and values of the tensors
parameters     sizes and constants
vocabulary     the tokenizer
writer         writes the file one tensor at a time, and reads which types were written

Format: github.com/ggml-org/ggml, docs/gguf.md.
"""
