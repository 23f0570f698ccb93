"""Run ``qlora-tui`` as ``python -m qlora_tui``."""

import sys

from qlora_tui.cli.main import main

sys.exit(main())
