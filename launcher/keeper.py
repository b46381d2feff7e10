"""What the fork server keeps for the launcher that comes after this one, and how that one gets it.

The fork server is the parent of all other processes of a machine, so a machine can go on without a launcher
as long as it lives. The launcher deposits here what the next one needs: descriptors, and its state
(launcher/deposit.py), which nobody looks into here. A launcher that leaves does that then; one whose machine
is to outlive it does it at every change.

Records (memory_node/wire.py) at `keeper.sock` in the run directory, for processes of the same user:
  {"op": "who"}     -> {"op": "here", pid, launcher, file, text, nodes: [[node, pid], ...]}
  {"op": "attach", version, protocol}
                    -> {"op": "busy", launcher} if there is one: it is to leave; then, or at once:
                       {"op": "processes", pid, live: [[node, pid], ...], ended: [[node, pid, status], ...]}
                       + the lock, their pidfds; {"op": "deposit"} + its descriptors
  {"op": "end"}     -> {"op": "ended"} where there is no launcher: and all end
  what can't be     -> {"op": "refused", error}
The connection of who has attached is its connection to the fork server from then on. When it ends, the
machine ends, unless somebody waits here to go on, or it is to outlive its launcher.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.process_unsafe import die_with_parent, outlive_parent
from memory_node import wire

SOCKET = "keeper.sock"
VERSION = 1  # of these records and of the deposit
UCRED = struct.Struct("iII")  # pid, uid, gid [unix(7), SO_PEERCRED]

Live = Mapping[int, tuple[int, str]]  # pidfd -> pid, node


class Keeper:
    """Inside the fork server, whose loop waits on `descriptors`. `launcher`: the present one's connection."""

    def __init__(self, launcher: socket.socket, pid: int, protocol: int) -> None:
        self.launcher: socket.socket | None = launcher
        self._launcher_pid: int | None = pid
        self._parent = pid  # the only launcher whose end the kernel tells us by a signal
        self._protocol = protocol
        self._about: dict[str, Any] = {}
        self._lock: list[int] = []
        self._outlive = False
        self._deposit: list[int] | None = None
        self._ended: dict[str, tuple[int, int, int]] = {}  # by node, the last: pidfd, pid, status
        self._listener: socket.socket | None = None
        self._clients: dict[int, socket.socket] = {}
        self._waiting: socket.socket | None = None

    @property
    def _goes_on(self) -> bool:
        """Without a launcher."""
        return self._outlive and self._deposit is not None

    def descriptors(self) -> list[int]:
        """Those of who may have something to say."""
        sockets = [self.launcher, self._listener, *self._clients.values()]
        return [sock.fileno() for sock in sockets if sock is not None]

    # ---- of the launcher

    def obey(self, record: dict[str, Any], fds: Sequence[int]) -> None:
        """What the launcher says: "listen" + the lock of the run directory, or "deposit"."""
        if record["op"] == "listen":
            self._lock, self._outlive = list(fds), bool(record["outlive"])
            self._about = {name: record[name] for name in ("file", "text")}
            if self._listener is None:
                self._listener = wire.listen(Path(record["path"]))
        elif record["op"] == "deposit":
            old, self._deposit = self._deposit or (), list(fds)
            for fd in old:
                os.close(fd)
        self._depend_on_parent()

    def ended(self, node: str, pid: int, pidfd: int, status: int) -> None:
        """A process has ended; its pidfd is ours now."""
        if self.launcher is not None:
            with contextlib.suppress(OSError):
                wire.send_record(
                    self.launcher, {"op": "exited", "node": node, "pid": pid, "status": status}
                )
        if node in self._ended:
            os.close(self._ended[node][0])
        self._ended[node] = pidfd, pid, status

    def left(self, live: Live) -> bool:
        """The launcher has ended or left. Whether to go on without it."""
        if self.launcher is not None:
            self.launcher.close()
        self.launcher = self._launcher_pid = None
        if self._waiting is not None:
            client, self._waiting = self._waiting, None
            del self._clients[client.fileno()]
            return self._hand_over(client, live) or self._goes_on
        return self._goes_on

    # ---- of those who come

    def turn(self, fd: int, live: Live) -> bool:
        """One of the other descriptors is readable. False: all is to end."""
        if self._listener is not None and fd == self._listener.fileno():
            client, _ = self._listener.accept()
            credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
            if UCRED.unpack(credentials)[1] == os.getuid():
                self._clients[client.fileno()] = client
            else:
                client.close()
            return True
        client = self._clients[fd]
        record = _record(client)
        if record is None or not (op := record.get("op")) or client is self._waiting:
            self._drop(client)
            return True
        match op:
            case "who":
                nodes = [[node, pid] for pid, node in live.values()]
                here = {"op": "here", "pid": os.getpid(), "launcher": self._launcher_pid, "nodes": nodes}
                _send(client, here | self._about)
            case "end" if self.launcher is None:
                _send(client, {"op": "ended"})
                return False
            case "attach":
                return self._attach(client, record, live)
            case _:
                _send(client, {"op": "refused", "error": f"this is not the time for {op!r}"})
        return True

    def _attach(self, client: socket.socket, record: dict[str, Any], live: Live) -> bool:
        theirs, ours = (record.get("version"), record.get("protocol")), (VERSION, self._protocol)
        if theirs != ours:
            versions = f"keeper {ours[0]}, bus protocol {ours[1]}"
            error = f"it was started by another version of Backplane ({versions})"
            _send(client, {"op": "refused", "error": error})
        elif self._waiting is not None:
            _send(client, {"op": "refused", "error": "another launcher is taking over"})
        elif self.launcher is not None:
            self._waiting = client
            self._depend_on_parent()
            _send(client, {"op": "busy", "launcher": self._launcher_pid})
        else:
            del self._clients[client.fileno()]
            return self._hand_over(client, live) or self._goes_on
        return True

    def _hand_over(self, client: socket.socket, live: Live) -> bool:
        """Make it the launcher; False where that isn't possible."""
        if self._deposit is None:
            _send(client, {"op": "refused", "error": "its launcher has ended and left nothing to go on from"})
            client.close()
            return False
        ended = [(pidfd, node, pid, status) for node, (pidfd, pid, status) in self._ended.items()]
        processes = {
            "op": "processes",
            "pid": os.getpid(),
            "live": [[node, pid] for pid, node in live.values()],
            "ended": [entry[1:] for entry in ended],
        }
        try:
            wire.send_record(client, processes, [*self._lock, *live, *(entry[0] for entry in ended)])
            wire.send_record(client, {"op": "deposit"}, self._deposit)
        except OSError:  # it has ended meanwhile
            client.close()
            return False
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
        self.launcher, self._launcher_pid = client, UCRED.unpack(credentials)[0]
        return True

    def _drop(self, client: socket.socket) -> None:
        del self._clients[client.fileno()]
        client.close()
        if client is self._waiting:
            self._waiting = None
            self._depend_on_parent()

    def _depend_on_parent(self) -> None:
        """Whether the kernel ends us with the launcher that we are a child of."""
        if self._launcher_pid != self._parent:
            return
        if self._waiting is not None or self._goes_on:
            outlive_parent()
        else:
            die_with_parent(self._parent)


def _record(client: socket.socket) -> dict[str, Any] | None:
    try:
        received = wire.receive_record(client)
    except (OSError, wire.BadRecord):
        return None
    if received is None:
        return None
    for fd in received[1]:
        os.close(fd)
    return received[0]


def _send(client: socket.socket, record: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        wire.send_record(client, record)
