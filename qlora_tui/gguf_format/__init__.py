"""How llama.cpp stores the tensors of a model in a GGUF file, for exports and for bases that are GGUF files.

conventions    llama.cpp's architecture for each model type, and the conventions of each architecture
computed_keys  keys that are computed from several settings of a config
rewrites       rules for tensors that llama.cpp stores in another form than transformers
tensors        names, shapes and values of the tensors of a file
inverse        the conversion back to weight files, found by probing the functions in ``conventions``
"""
