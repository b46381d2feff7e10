"""The control socket of a running machine: what `launcher ps` and `launcher down` talk to.

One record (memory_node/wire.py) asks, one answers: {"op": "ps"} or {"op": "stats"} -> {"rows": [...]}, those
of stats with all counters; {"op": "metrics"} -> {"text": the same for Prometheus}; {"op": "timing-on"},
"timing-off", "pause", "resume" or "down" -> {};
{"op": "snapshot", "file": absolute path} -> {"size", "stood_ns"}; {"op": "swap", "device", "type",
"settings", "folder"} -> {"type", "old", "new", "pause_ns", "parts_ns"}; {"op": "kill", "device"} -> {"pid"};
{"op": "leave", "by": pid of another launcher} -> {}; {"op": "trace", "on": true, false, or null to leave it}
-> {"meta": tracing/meta.py, "pid"} and the rings' descriptors. What can't be done: {"error": one line}, where
bad input is the reason with "status", the exit status that goes with it.
An answer may come later than the request; the connection stays open until then.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from launcher.errors import EXIT_DIED, LauncherError
from launcher.keeper import SOCKET as KEEPER
from memory_node import wire

OPERATIONS = (
    "ps", "stats", "metrics", "timing-on", "timing-off", "pause", "resume", "snapshot", "swap", "kill",
    "leave", "trace", "down",
)  # fmt: skip
ANSWER_S = 10.0
NO_LAUNCHER = "it has no launcher; `launcher up` with its machine file re-attaches"
SNAPSHOT_S = 3600.0  # 3 GiB to a slow disk
DOWN_MS = 30_000  # longer than the supervisor is polite


class NoAnswer(LauncherError):
    """A launcher that is running does not answer, or not with what it was asked for."""

    def __init__(self, line: str, exit_status: int = EXIT_DIED) -> None:
        super().__init__(line)
        self.exit_status = exit_status


class ControlServer:
    """The launcher's side; its loop waits on `descriptors` and calls `readable`."""

    def __init__(self, path: Path) -> None:
        self._listener = wire.listen(path)
        self._clients: dict[int, socket.socket] = {}

    def descriptors(self) -> list[int]:
        return [self._listener.fileno(), *self._clients]

    def readable(self, fd: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """(client, request) for each request that has arrived there; its "op" is one of OPERATIONS."""
        if fd == self._listener.fileno():
            client, _ = self._listener.accept()
            client.setblocking(False)
            self._clients[client.fileno()] = client
        elif fd in self._clients:
            request = self._request(self._clients[fd])
            if request is None:
                self._drop(fd)
            elif (op := request.get("op")) in OPERATIONS:
                yield fd, request
            else:
                self.answer(fd, {"error": f"no operation {str(op)!r}, there are: {', '.join(OPERATIONS)}"})

    def answer(self, client: int, reply: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send the reply and hang up; a client that is gone by now gets none."""
        if client in self._clients:
            with contextlib.suppress(OSError):
                wire.send_record(self._clients[client], reply, fds)
            self._drop(client)

    def answer_later(self, client: int) -> Callable[[dict[str, Any]], None]:
        """`answer` for one who may be gone by then, and another be there under the same number."""
        sock = self._clients.get(client)

        def answer(reply: dict[str, Any]) -> None:
            if self._clients.get(client) is sock:
                self.answer(client, reply)

        return answer

    def close(self) -> None:
        self._listener.close()
        for client in list(self._clients):
            self._drop(client)

    def _drop(self, client: int) -> None:
        self._clients.pop(client).close()

    @staticmethod
    def _request(client: socket.socket) -> dict[str, Any] | None:
        try:
            received = wire.receive_record(client)
        except (OSError, wire.BadRecord):
            return None
        if received is None:
            return None
        request, fds = received
        for fd in fds:
            os.close(fd)
        return request


def ask(path: Path, op: str, machine: str, timeout_s: float = ANSWER_S, **arguments: Any) -> dict[str, Any]:
    """One request to a running machine's launcher; NoAnswer when it is stuck or ends meanwhile."""
    return ask_with_descriptors(path, op, machine, timeout_s, **arguments)[0]


def ask_with_descriptors(
    path: Path, op: str, machine: str, timeout_s: float = ANSWER_S, **arguments: Any
) -> tuple[dict[str, Any], list[int]]:
    """As ask(), and the descriptors that come with the answer, the caller's from now on."""
    try:
        with contextlib.closing(wire.connect(path, timeout_s)) as sock:
            wire.send_record(sock, {"op": op, **arguments})
            received = wire.receive_record(sock)
    except (ConnectionRefusedError, FileNotFoundError) as e:
        if path.with_name(KEEPER).exists():
            raise NoAnswer(f"{machine}: {NO_LAUNCHER}") from e
        raise NoAnswer(f"{machine}: its launcher does not answer: {e}") from e
    except (OSError, wire.BadRecord) as e:
        raise NoAnswer(f"{machine}: its launcher does not answer: {e}") from e
    if received is None:
        raise NoAnswer(f"{machine}: its launcher has ended")
    if "error" in received[0]:
        raise NoAnswer(f"{machine}: {received[0]['error']}", received[0].get("status", EXIT_DIED))
    return received


def down(path: Path, machine: str, pid: int | None) -> None:
    """End a machine; returns when its launcher, `pid`, has ended, and with it all that was the machine's."""
    try:
        pidfd = os.pidfd_open(pid) if pid is not None else None
    except ProcessLookupError:
        return
    ask(path, "down", machine)
    if pidfd is None:
        return
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    ended = poll.poll(DOWN_MS)
    os.close(pidfd)
    if not ended:
        raise NoAnswer(
            f"{machine}: its launcher (pid {pid}) is still ending; `kill -9 {pid}` ends it at once"
        )
