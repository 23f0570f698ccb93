"""llama.cpp, from the optional package ``llama-cpp-py-sync`` (``pip install "qlora-tui[export]"``).

It runs in a process of its own, and loads no torch: ``client`` starts ``worker`` and says whether the package
is there; only ``bindings`` uses it.
"""
