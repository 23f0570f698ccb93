"""llama.cpp from the optional package ``llama-cpp-py-sync``: K-quants, and the check of written files.

``jobs`` are run by ``llama_worker`` in its own process, because an assertion in llama.cpp ends the process;
``llama_process`` starts it. Only ``bindings`` uses the package; ``availability`` says whether it is there.
``stored_answers`` reads what files are compared with.
"""
