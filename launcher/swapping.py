"""A process replaced by another while the guest runs: the protocol between launcher and processes.

Each process but the CPU's has a control socket (memory_node/wire.py). The new one is started beside the old:

  new -> {"op": "standing-by"}             its class is loaded, the state fits; else {"op": "refused", error}
  old <- {"op": "retire", number} + a pipe it ends its step and lets its sockets and disks go:
  old -> a byte into the pipe, to `new`    which goes on from the journal
  old -> {"op": "retired", number, ns, left_ns}  when its last step had ended, and when it had let go
  new -> {"op": "live", began_ns, ns}      else {"op": "refused", error}
  new -> {"op": "connected", ns}           the CPU's connection has been answered
  old <- {"op": "end"}                     or {"op": "resume"}, when the new one is not live and has ended

The memory node and `consoles` have no CPU connected, and say "connected" at once. They have no pipe:
descriptors that a process has had the launcher keep (launcher/keeping.py) go along with take-over and resume.

  any  -> {"op": "keep", name} + fd        at any time; the last one of a name counts
  any  -> {"op": "let-go", name}
  new  <- {"op": "take-over", fds} + fds   when the old one has retired

Whatever goes wrong before `live`, the old process goes on. docs/live-swap.md has the pictures.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from launcher.errors import EXIT_DIED, EXIT_INPUT
from launcher.forkserver import Child, ChildSpec
from launcher.keeping import Kept
from memory_node import wire

STANDBY_S, RETIRE_S, LIVE_S, CONNECTED_S = 20.0, 10.0, 10.0, 2.0

ForkDevice = Callable[[ChildSpec], tuple[Child, socket.socket]]


class SwapRefused(RuntimeError):
    """The old process goes on; one line says why. `exit_status`: of the command that asked for it."""

    def __init__(self, line: str, exit_status: int = EXIT_INPUT) -> None:
        super().__init__(line)
        self.exit_status = exit_status


class Swapped(msgspec.Struct, frozen=True):
    """A swap that was done. Times on CLOCK_MONOTONIC in ns."""

    child: Child
    control: socket.socket
    retired_ns: int  # the old one's last step had ended
    live_ns: int
    pause_ns: int | None  # until the CPU was connected to the new one
    parts_ns: dict[str, int]  # of the pause, in their order

    def connected(self, at_ns: int) -> Swapped:
        """When the CPU has been."""
        parts = {**self.parts_ns, "the CPU connects": at_ns - self.live_ns}
        return replace(self, pause_ns=at_ns - self.retired_ns, parts_ns=parts)


class Standby:
    """A new process beside the old one. It gets ready in its own time: nobody need wait for that."""

    def __init__(self, node: str, spec: ChildSpec, fork: ForkDevice, kept: Kept | None = None) -> None:
        """`kept`: what is kept for a node that is no device."""
        self.node, self._kept = node, kept
        self._deadline_s = time.monotonic() + STANDBY_S
        end, self._beginning = os.pipe()
        try:
            config, fds = {**spec.config, "standby": True}, dict(spec.fds)
            if kept is None:
                fds["baton"] = end
            self.child, self.control = fork(replace(spec, config=config, fds=fds))
        except BaseException:
            os.close(self._beginning)
            raise
        finally:
            os.close(end)

    def descriptors(self) -> list[int]:
        """`stands_by` has something to say when one is readable, and at `deadline_ns`."""
        return [self.control.fileno(), self.child.pidfd]

    def deadline_ns(self) -> int:
        return int(self._deadline_s * 1e9)

    def stands_by(self, wait: bool = False) -> bool:
        """Whether it can take over by now. SwapRefused when it never will; it has ended then."""
        left_s = max(0.0, self._deadline_s - time.monotonic())
        if not select.select(self.descriptors(), [], [], left_s if wait else 0)[0] and left_s > 0:
            return False
        try:
            _expect(self.node, "standing-by", self.control, self.child, left_s, self._kept)
        except SwapRefused:
            self.close()
            raise
        return True

    def take_over(
        self, old: Child, old_control: socket.socket, on_live: Callable[[], object], connected_s: float
    ) -> Swapped:
        """From the old process; SwapRefused: that goes on, and this one has ended. Some milliseconds.

        `on_live`: the CPU is to be told that it must look for a new process. `connected_s`: how long to wait
        until it is connected. It may not come before others go on that are to be started meanwhile.
        """
        child, control, kept = self.child, self.control, self._kept
        number = time.monotonic_ns()
        _send(old_control, "retire", (self._beginning,) if kept is None else (), number=number)
        retired = _answer(old_control, old, RETIRE_S, kept, "retired", number)
        try:
            if retired is None:
                why = f"its process (pid {old.pid}) has ended, or not ended its step in {RETIRE_S:g} s"
                raise SwapRefused(f"{self.node}: {why}", EXIT_DIED)
            if kept is not None:
                _give(control, "take-over", kept)
            live = _expect(self.node, "live", control, child, LIVE_S, kept)
        except SwapRefused:
            _end(child)  # before the old one goes on: it may be about to take over
            if kept is not None:
                kept.drain(control)
            _give(old_control, "resume", kept)
            self.close()
            raise
        on_live()
        connected = _answer(control, child, connected_s, kept, "connected") if connected_s else None
        _send(old_control, "end")
        os.close(self._beginning)
        times = {
            "the old one lets go": (retired["ns"], retired["left_ns"]),
            "the new one hears of it": (retired["left_ns"], live["began_ns"]),
            "takes over": (live["began_ns"], live["ns"]),
        }
        parts = {name: end - begin for name, (begin, end) in times.items()}
        done = Swapped(child, control, retired["ns"], live["ns"], None, parts)
        return done if connected is None else done.connected(connected["ns"])

    def close(self) -> None:
        """End it."""
        _end(self.child)
        os.close(self.child.pidfd)
        self.control.close()
        os.close(self._beginning)


def swap(
    node: str,
    old: Child,
    old_control: socket.socket,
    spec: ChildSpec,
    fork: ForkDevice,
    on_live: Callable[[], object],
    kept: Kept | None = None,
) -> Swapped:
    """Replace the process; SwapRefused. Blocks its caller, not the machine. See Standby."""
    standby = Standby(node, spec, fork, kept)
    standby.stands_by(wait=True)
    return standby.take_over(old, old_control, on_live, CONNECTED_S)


def _expect(
    node: str, op: str, control: socket.socket, child: Child, timeout_s: float, kept: Kept | None
) -> dict[str, Any]:
    answer = _answer(control, child, timeout_s, kept)
    if answer is None:
        ended = f"ended, or took longer than {timeout_s:g} s"
        raise SwapRefused(f"{node}: the new process (pid {child.pid}) {ended}")
    if answer["op"] != op:
        raise SwapRefused(f"{node}: {answer.get('error', answer['op'])}")
    return answer


def _send(control: socket.socket, op: str, fds: Sequence[int] = (), **fields: Any) -> None:
    with contextlib.suppress(OSError):
        wire.send_record(control, {"op": op, **fields}, fds)


def _give(control: socket.socket, op: str, kept: Kept | None) -> None:
    fds = {} if kept is None else kept.fds
    with contextlib.suppress(OSError):
        wire.send_record(control, {"op": op, "fds": list(fds)}, tuple(fds.values()))


def _answer(
    control: socket.socket,
    child: Child,
    timeout_s: float,
    kept: Kept | None,
    op: str = "",
    number: int | None = None,
) -> dict[str, Any] | None:
    """The next record that isn't for `kept`; None when the process has ended, or the time is over.

    `op`, `number`: the next of those. What an earlier swap left is passed over: taken for this one's
    "retired" it would make two processes write one journal.
    """
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        readable = select.select([control.fileno(), child.pidfd], [], [], left)[0]
        if control.fileno() in readable:
            try:
                received = wire.receive_record(control)
            except OSError:
                return None
            if received is None:
                return None
            record: dict[str, Any] = received[0]
            if kept is not None and kept.take(*received):
                continue
            if op in ("", record["op"]) and record.get("number") == number:
                return record
        elif readable:
            return None
    return None


def _end(child: Child) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
    select.select([child.pidfd], [], [], LIVE_S)
