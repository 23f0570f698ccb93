"""llama.cpp, from the optional package ``llama-cpp-py-sync`` (``pip install "qlora-tui[export]"``).

It runs in a separate process that does not load torch. ``client`` starts ``worker`` and reports whether the
package is installed. Only ``bindings`` imports the package.
"""
