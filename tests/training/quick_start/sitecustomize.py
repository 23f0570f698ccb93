"""First on the path of a runner: a forked trainer does the work of this process.

It ends as the trainer does, by the same signal if by one.
"""

import os
import sys

if "qlora_tui.training" in sys.orig_argv:
    import json
    import signal
    import socket

    client = socket.socket(socket.AF_UNIX)
    client.connect(os.environ["TRAINER_FORKSERVER"])
    arguments = sys.orig_argv[sys.orig_argv.index("qlora_tui.training") + 1 :]
    request = {"arguments": arguments, "environment": dict(os.environ)}
    client.sendall(json.dumps(request).encode() + b"\n")
    answers = client.makefile()
    answers.readline()
    code = int(answers.readline())
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
