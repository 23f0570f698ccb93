"""No process is left behind by a program with a deadline, whatever sessions its children start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.polling import wait_for

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SLOW_CHECK = """
import subprocess, sys, time
from pathlib import Path
endless = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
middle = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], start_new_session=True, stdout=2).pid)"
# Its parent ends at once, so that it is an orphan in a session of its own: as a runner and its trainer are.
pid = subprocess.check_output([sys.executable, "-c", middle, sys.executable, "-c", endless], text=True)
draft = Path(sys.argv[1] + ".draft")
draft.write_text(pid)
draft.rename(sys.argv[1])
if sys.argv[2] == "slow":
    time.sleep(10**6)
"""
BENCH = """
import sys
from pathlib import Path
from bench.support.child_processes import adopt_orphans, end_descendants_on_sigterm, run_within
adopt_orphans()
end_descendants_on_sigterm()
folder = Path(sys.argv[1])
command = [sys.executable, str(folder / "check.py"), str(folder / "pid"), sys.argv[3]]
print(run_within(float(sys.argv[2]), command, log=folder / "log"))
"""


def bench(folder: Path, seconds: float, check: str = "slow") -> subprocess.Popen[str]:
    (folder / "check.py").write_text(SLOW_CHECK)
    command = [sys.executable, "-c", BENCH, str(folder), str(seconds), check]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ)


def orphan(folder: Path) -> int:
    """Process id of the orphan of a check."""
    wait_for((folder / "pid").exists)
    return int((folder / "pid").read_text())


def test_a_slow_check_ends_at_its_deadline_with_orphans(tmp_path: Path) -> None:
    process = bench(tmp_path, 5)
    output, _ = process.communicate()
    assert output == "None\n" and not psutil.pid_exists(orphan(tmp_path))


def test_orphans_of_a_check_that_ended_are_ended(tmp_path: Path) -> None:
    process = bench(tmp_path, 600, "quick")
    output, _ = process.communicate()
    assert output == "0\n" and not psutil.pid_exists(orphan(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_killed_bench_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    process = bench(tmp_path, 600)
    pid = orphan(tmp_path)
    process.send_signal(number)
    assert process.wait() == 128 + number
    assert not psutil.pid_exists(pid)
