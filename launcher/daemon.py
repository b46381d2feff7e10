"""`up --detach`: the launcher goes on in the background, the command returns when the machine runs.

Until then the two share their fate: what the background process prints is seen, its exit status is the
command's, and Ctrl-C at the command ends both.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from launcher.errors import ending
from launcher.forkserver import redirect_standard, run_and_exit
from launcher.process_unsafe import die_with_parent, outlive_parent

PATH_MAX = 4096  # [limits.h]
OnReady = Callable[[Path], None]  # the file that takes what would have gone to the terminal


def run_in_background(body: Callable[[OnReady], int]) -> int | Path:
    """Run `body` in a process of its own session; what it has called with what it is given, or its exit
    status if it ends before."""
    ours, theirs = socket.socketpair()
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        ours.close()
        run_and_exit(lambda: _background(body, theirs, parent))
    theirs.close()
    log = ours.recv(PATH_MAX)
    ours.close()
    if log:
        return Path(os.fsdecode(log))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code


def _background(body: Callable[[OnReady], int], command: socket.socket, parent: int) -> None:
    os.setsid()
    die_with_parent(parent, signal.SIGTERM)

    def on_ready(log: Path) -> None:
        log.unlink(missing_ok=True)  # of an earlier machine of this name
        redirect_standard(log)
        outlive_parent()
        command.send(os.fsencode(log))
        command.close()

    raise SystemExit(ending(lambda: body(on_ready)))
