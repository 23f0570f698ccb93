"""``python -m qlora_tui`` is ``qlora-tui``."""

import sys

from qlora_tui.cli.main import main

sys.exit(main())
