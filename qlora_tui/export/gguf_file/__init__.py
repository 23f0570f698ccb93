"""Writes a model as a GGUF file, the format of llama.cpp, Ollama and LM Studio, with the ``gguf`` package.

content        the content of the file of a base with a merged adapter
parameters     sizes and constants
vocabulary     the tokenizer
writer         writes the file one tensor at a time, and reads the types in a written file

How llama.cpp stores tensors: :mod:`qlora_tui.gguf_format`. Format: github.com/ggml-org/ggml,
docs/gguf.md.
"""
