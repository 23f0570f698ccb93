"""How llama.cpp stores the tensors of a model in a GGUF file, for exports and for bases that are GGUF files.

conventions    llama.cpp's architecture of each model type, and what it has of its own
computed_keys  keys of its file that are not a setting of the config as it stands
rewrites       tensors that llama.cpp stores otherwise
tensors        names, shapes and values of the tensors of a file
inverse        the way back, by what the functions of ``conventions`` do to a few tensors
"""
