"""Makes torch deterministic in a trainer. Python imports it at its start from a folder on its path."""

import sys

if "qlora_tui.training" in sys.orig_argv:
    import torch

    # Operations of bitsandbytes and of the library's own loss cause warnings, although they are
    # deterministic.
    torch.use_deterministic_algorithms(True, warn_only=True)
