"""First on the path of a test's child processes: a process with its imports behind it does their work.

Where this process runs by ``-m`` one of the modules in ``FORK_SERVERS``, or one of the jobs, or is a confined
child of one of them, the fork server of that module gets its arguments, environment, folder, and standard
streams. This process ends as the forked one does, by the same signal if by one. See
:mod:`tests.support.forkserver`.
"""

import os
import sys


def _module_and_arguments() -> tuple[str, list[str]]:
    """Of this interpreter; an ``-m`` behind a script, such as torchrun, is the script's."""
    for at, argument in enumerate(sys.orig_argv[1:-1], start=1):
        if argument == "-m":
            return sys.orig_argv[at + 1], sys.orig_argv[at + 2 :]
        if not argument.startswith("-"):
            break
    return "", []


_module, _arguments = _module_and_arguments()
_confined = _module == "qlora_tui.data.confined"
# Jobs and the modules of confined children are named by their arguments.
_served = _arguments[1] if _confined else _arguments[0] if _module == "qlora_tui.worker" else _module
_servers = os.environ.get("FORK_SERVERS", "")
if f'"{_served}"' in _servers:
    import json
    import signal

    from fork_request import ForkRequest  # type: ignore[import-not-found]  # beside this file, on the path

    _streams = [0, 1, 2]
    if _confined:
        # Its socket, from which it gets the calls.
        _streams.append(int(_arguments[0]))
        _arguments[0] = "3"
    _request = ForkRequest(json.loads(_servers)[_served], _module, _arguments, _streams)
    if _module in ("qlora_tui.training", "torch.distributed.run"):
        # As Slurm and torchrun do, which do not see the forked process.
        signal.signal(signal.SIGTERM, lambda number, _: os.kill(_request.pid, number))
    code = _request.wait()
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
