"""Makes torch deterministic in a trainer; Python imports this at its start from a folder on its path."""

import sys

if "qlora_tui.training" in sys.orig_argv:
    import torch

    # bitsandbytes and the library's own loss have operations that warn, although they are deterministic.
    torch.use_deterministic_algorithms(True, warn_only=True)
