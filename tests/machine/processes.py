"""What is left of machines on this host: processes below this one, orphans included.

Orphans become children of the test process (a subreaper), so nothing can hide by losing its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
END_S = 30.0  # for the kernel to finish what was killed; a bound on hanging, not an expectation


def adopt_orphans() -> None:
    """From now on what loses its parent below this process becomes its child."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(root: int) -> set[int]:
    """Pids of all living processes below `root`; zombies don't count."""
    children: dict[int, set[int]] = {}
    for pid in _pids():
        with contextlib.suppress(OSError, IndexError):
            state, parent = _stat(pid)
            if state != "Z":
                children.setdefault(parent, set()).add(pid)
    found: set[int] = set()
    todo = [root]
    while todo:
        below = children.get(todo.pop(), set()) - found
        found |= below
        todo += below
    return found


def titles(machine: str) -> dict[str, int]:
    """node -> pid of the living processes below this one that `ps` shows as "backplane MACHINE: NODE"."""
    prefix = f"backplane {machine}: "
    found = {}
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0")
            if title.startswith(prefix):
                found[title.removeprefix(prefix)] = pid
    return found


def assert_gone(before: set[int]) -> None:
    """No process below this one but those in `before`."""
    deadline = time.monotonic() + END_S
    while left := descendants(os.getpid()) - before:
        if time.monotonic() > deadline:
            raise AssertionError("alive after the end: " + "; ".join(map(describe, sorted(left))))
        time.sleep(0.02)


def kill(pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def describe(pid: int) -> str:
    try:
        title = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").strip()
        return f"{pid} ({_stat(pid)[0]}) {title}"
    except OSError:
        return f"{pid} (gone)"


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _stat(pid: int) -> tuple[str, int]:
    """State letter and parent [proc(5)]."""
    words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return words[0], int(words[1])


def left_behind(runtime: Path) -> list[str]:
    """Names of what machines have left in the runtime directory, but for what led to a crash."""
    return sorted(path.name for path in runtime.glob("*") if not path.match("*.crash-*.bptrace"))
