"""The memory of a snapshot, unpacked by a process of its own while the launcher imports.

It is forked first of all, while the launcher has one thread, and ends when the memory is complete, or with
the launcher. Records from it: {"op": "memory"} + its descriptor, then {"op": "filled"}; or {"op": "failed",
error}, where `error` has what ConfigError takes.
"""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

from launcher.errors import ConfigError, MachineDied
from launcher.forkserver import close_other_descriptors, run_and_exit, set_title
from launcher.process_unsafe import die_with_parent
from memory_node import wire


class Unpacking:
    """The launcher's handle. `close` in the end."""

    def __init__(self, file: Path) -> None:
        """Fork it. The caller must have one thread."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            run_and_exit(lambda: _unpack(file, theirs, parent))
        theirs.close()
        self._file, self._sock = file, ours
        self._memory: int | None = None

    def memory(self) -> int:
        """The descriptor of the memory, which is being filled. Raises ConfigError, MachineDied."""
        if self._memory is None:
            (self._memory,) = self._hear("memory")
        return self._memory

    def wait(self) -> None:
        """Until the memory is complete. Raises ConfigError, MachineDied."""
        self._hear("filled")

    def close(self) -> None:
        os.kill(self._pid, signal.SIGKILL)  # not waited for yet, so it is the same process
        os.waitpid(self._pid, 0)
        self._sock.close()
        if self._memory is not None:
            os.close(self._memory)

    def _hear(self, op: str) -> list[int]:
        received = wire.receive_record(self._sock)
        if received is None:
            raise MachineDied(f"the process (pid {self._pid}) that unpacks {self._file} has ended")
        record, fds = received
        if record["op"] != op:
            raise ConfigError(*record["error"])
        return fds


def _unpack(file: Path, sock: socket.socket, launcher: int) -> None:
    die_with_parent(launcher)
    close_other_descriptors(sock.fileno())
    os.setsid()  # a Ctrl-C at the terminal is for the launcher to act on
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_title(f"backplane: unpacks {file.name}", "unpack")
    try:
        _fill(file, sock)
    except ConfigError as e:
        _say(sock, {"op": "failed", "error": [e.file, e.key, e.problem, e.remedy]})
    except OSError as e:
        problem = f"its memory cannot be unpacked ({e.strerror})"
        _say(sock, {"op": "failed", "error": [str(file), "", problem, "see that there is enough memory"]})


def _fill(file: Path, sock: socket.socket) -> None:
    from launcher.snapshot import Snapshot
    from memory_node.store import open_memfd

    snapshot = Snapshot(file)
    memory = open_memfd("restored-ram", snapshot.index.memory_size)
    _say(sock, {"op": "memory"}, [memory])
    snapshot.fill(memory)
    _say(sock, {"op": "filled"})


def _say(sock: socket.socket, record: dict[str, Any], fds: list[int] | None = None) -> None:
    wire.send_record(sock, record, fds or [])
