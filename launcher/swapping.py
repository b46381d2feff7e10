"""A device's process replaced by another while the guest runs: the protocol between launcher and processes.

Each process of a device has a control socket (memory_node/wire.py). The new one is started beside the old:

  new -> {"op": "standing-by"}         its class is loaded, the state fits; else {"op": "refused", error}
  old <- {"op": "retire", number}      it ends its step and lets its sockets and disks go:
  old -> {"op": "retired", number, ns}
  new <- {"op": "take-over"}           it goes on from the journal:
  new -> {"op": "live"}                else {"op": "refused", error}
  new -> {"op": "connected", ns}       the CPU's connection has been answered
  old <- {"op": "end"}                 or {"op": "resume"}, when the new one is not live

Whatever goes wrong before `live`, the old process goes on. docs/live-swap.md has the pictures.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from launcher.errors import EXIT_DIED, EXIT_INPUT
from launcher.forkserver import Child, ChildSpec
from memory_node import wire

STANDBY_S, RETIRE_S, LIVE_S, CONNECTED_S = 20.0, 10.0, 10.0, 2.0

ForkDevice = Callable[[ChildSpec], tuple[Child, socket.socket]]


class SwapRefused(RuntimeError):
    """The old process goes on; one line says why. `exit_status`: of the command that asked for it."""

    def __init__(self, line: str, exit_status: int = EXIT_INPUT) -> None:
        super().__init__(line)
        self.exit_status = exit_status


@dataclass(frozen=True, slots=True)
class Swapped:
    """A swap that was done."""

    child: Child
    control: socket.socket
    pause_ns: int | None  # from the end of the old one's last step until the CPU was connected to the new one


def swap(
    node: str,
    old: Child,
    old_control: socket.socket,
    spec: ChildSpec,
    fork: ForkDevice,
    on_live: Callable[[], object],
) -> Swapped:
    """Replace the process; SwapRefused. Blocks its caller, not the machine.

    `on_live`: the CPU is to be told that it must look for a new process.
    """
    child, control = fork(replace(spec, config={**spec.config, "standby": True}))
    try:
        _expect(node, "standing-by", control, child, STANDBY_S)
        number = time.monotonic_ns()
        _send(old_control, "retire", number=number)
        retired = _answer(old_control, old, RETIRE_S, "retired", number)
        if retired is None:
            _send(old_control, "resume")
            why = f"its process (pid {old.pid}) has ended, or not ended its step in {RETIRE_S:g} s"
            raise SwapRefused(f"{node}: {why}", EXIT_DIED)
        try:
            _send(control, "take-over")
            _expect(node, "live", control, child, LIVE_S)
        except SwapRefused:
            _end(child)
            _send(old_control, "resume")
            raise
    except SwapRefused:
        _end(child)
        os.close(child.pidfd)
        control.close()
        raise
    on_live()
    connected = _answer(control, child, CONNECTED_S, "connected")
    _send(old_control, "end")
    pause_ns = connected["ns"] - retired["ns"] if connected is not None else None
    return Swapped(child, control, pause_ns)


def _expect(node: str, op: str, control: socket.socket, child: Child, timeout_s: float) -> None:
    answer = _answer(control, child, timeout_s)
    if answer is None:
        ended = f"ended, or took longer than {timeout_s:g} s"
        raise SwapRefused(f"{node}: the new process (pid {child.pid}) {ended}")
    if answer["op"] != op:
        raise SwapRefused(f"{node}: {answer.get('error', answer['op'])}")


def _send(control: socket.socket, op: str, **fields: Any) -> None:
    with contextlib.suppress(OSError):
        wire.send_record(control, {"op": op, **fields})


def _answer(
    control: socket.socket, child: Child, timeout_s: float, op: str = "", number: int | None = None
) -> dict[str, Any] | None:
    """The next record; None when the process has ended, or the time is over.

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
            if op in ("", record["op"]) and record.get("number") == number:
                return record
        elif readable:
            return None
    return None


def _end(child: Child) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
    select.select([child.pidfd], [], [], LIVE_S)
