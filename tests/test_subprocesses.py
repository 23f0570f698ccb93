from __future__ import annotations

import subprocess
import sys

import pytest

from qlora_tui.runs.process import process_identity
from qlora_tui.subprocesses import subprocess_env
from tests.support.polling import wait_for

CHILD = """
import signal
from qlora_tui.subprocesses import end_with_parent
end_with_parent()
print("ready", flush=True)
signal.pause()
"""
PARENT = f"""
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
child.stdout.readline()
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has prctl")
def test_a_child_ends_with_its_killed_parent() -> None:
    parent = subprocess.run(
        [sys.executable, "-c", PARENT], env=subprocess_env(), capture_output=True, text=True, check=False
    )

    def has_ended() -> bool:
        try:
            return not process_identity(int(parent.stdout)).is_alive()
        except ProcessLookupError:
            return True

    assert wait_for(has_ended, seconds=20)
