"""The processes of one machine: forked, watched, and those of devices replaced.

A device whose process ends gets a new one, at once or after a wait (launcher/restarts.py), which goes on from
its journal (devices/journal.py). What the end of any other means is the supervisor's to say.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bus.endpoint import Endpoint
from bus.frames import Attend
from bus.link import listen
from devices.journal import Journal as DeviceJournal
from launcher import report
from launcher.affinity import pin
from launcher.errors import EXIT_DIED
from launcher.forkserver import Child, ChildSpec, ForkServer
from launcher.launch import Launch
from launcher.names import CPU
from launcher.restarts import Restarts
from launcher.rings import with_rings
from launcher.swapping import SwapRefused, swap

SECOND_NS = 1_000_000_000
LAST_WORDS_S = 0.2  # for what a process sent, and what is said of it, before it ended


@dataclass(slots=True)
class Process:
    """A process of the machine as `ps` and the one-line obituary describe it."""

    child: Child
    log: Path
    ready: bool = False  # has been, and was not started anew since
    was_ready: bool = False
    swaps: int = 0
    restarts: Restarts = field(default_factory=Restarts)
    control: socket.socket | None = None  # a device's, see launcher/swapping.py
    last_words: str = ""  # why it is about to end, in its own words
    last_frame: str = ""
    last_frame_ns: int = 0


class Processes:
    """By node, in the order in which `ps` shows them."""

    def __init__(
        self,
        launch: Launch,
        forkserver: ForkServer,
        endpoint: Endpoint,
        clock: Callable[[], dict[str, Any]],
    ) -> None:
        """`clock`: what a node that starts now is told of the machine's time."""
        *devices, cpu = launch.others
        self._journals = {spec.node: DeviceJournal.make(spec.node) for spec in devices}
        self._listening = {spec.node: listen(launch.run_dir, spec.node) for spec in devices}
        devices = [
            replace(spec, fds={"journal": self._journals[spec.node], "listen": self._listening[spec.node]})
            for spec in devices
        ]
        rim = launch.rim
        if rim is not None:
            rim, devices = with_rings(rim, devices)
        self.launch = replace(launch, others=(*devices, cpu), rim=rim)  # as it is now, swaps included
        self.by_node: dict[str, Process] = {}
        self._forkserver, self._endpoint, self._clock = forkserver, endpoint, clock

    @property
    def devices(self) -> list[str]:
        return list(self._journals)

    def fork(self, spec: ChildSpec) -> None:
        """Start a node's first process."""
        control: socket.socket | None = None
        if spec.node in self._journals:
            child, control = self._fork_device(spec)
        else:
            child = self._forkserver.fork(self._timed(spec) if spec.node == CPU else spec)
        self.by_node[spec.node] = process = Process(child, spec.log, control=control)
        process.restarts.started(time.monotonic())
        self._endpoint.connect(spec.node)

    def show_last(self, node: str) -> None:
        """Where `ps` shows it."""
        self.by_node[node] = self.by_node.pop(node)

    def pin(self, node: str | None = None) -> None:
        """Let each, or this one, run on the cores that it is meant for."""
        for spec in self.launch.others:
            if node in (None, spec.node):
                pin(self.by_node[spec.node].child.pid, spec.host_cpus)

    def pidfds(self) -> dict[int, str]:
        """Of all that run, with their nodes."""
        return {p.child.pidfd: node for node, p in self.by_node.items() if p.restarts.due_s is None}

    def close(self) -> None:
        """When the fork server has ended, and they with it."""
        for fd in (*self._journals.values(), *self._listening.values()):
            os.close(fd)
        for pidfd in self.pidfds():
            report.wait_for_end(pidfd)
            os.close(pidfd)

    # ---- deaths and restarts -------------------------------------------------------------------

    def obituary(self, node: str) -> str:
        """One line about one that has ended."""
        return self._obituary(node, self.by_node[node])

    def restarts(self, node: str) -> bool:
        """Whether another process can go on for one that ends now."""
        return node in self._journals and self.by_node[node].was_ready

    def bury(self, node: str) -> str:
        """Have one that has ended restarted, see `restart_due`; what to tell of it."""
        process = self.by_node[node]
        ended = replace(process)
        wait_s = process.restarts.ended(time.monotonic())
        process.ready = False
        process.last_words = ""
        self.restart_due()  # before anything else: the guest waits
        line = self._obituary(node, ended)
        os.close(ended.child.pidfd)
        if ended.control is not None:
            ended.control.close()
        return f"{line}; it is restarted {f'in {wait_s:.1f} s' if wait_s else 'at once'}"

    def next_due_ns(self) -> int | None:
        """When `restart_due` has something to do, on CLOCK_MONOTONIC."""
        due = [p.restarts.due_s for p in self.by_node.values() if p.restarts.due_s is not None]
        return int(min(due) * SECOND_NS) if due else None

    def restart_due(self) -> None:
        """Fork the devices whose time has come."""
        now_s = time.monotonic()
        for spec in self.launch.others:
            process = self.by_node.get(spec.node)
            if process is not None and process.restarts.due_s is not None and process.restarts.due_s <= now_s:
                process.child, process.control = self._fork_device(spec)
                process.restarts.started(now_s)

    # ---- asked for by the user -----------------------------------------------------------------

    def kill(self, node: str) -> int:
        """kill -9 of a device's process; its pid. SwapRefused when there is none."""
        _, process = self._device(node)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process.child.pidfd, signal.SIGKILL)
        return process.child.pid

    def swap(self, node: str, with_type: str | None, settings: dict[str, Any]) -> dict[str, Any]:
        """Replace a device's process; what was done. SwapRefused: the old one goes on."""
        spec, process = self._device(node)
        control, old = process.control, process.child
        assert control is not None
        _check_disks(spec, settings)
        with_type = with_type or str(spec.config["type"])
        settings = {**spec.config["settings"], **settings}
        new = replace(spec, config={**spec.config, "type": with_type, "settings": settings})
        tell_cpu = partial(self._endpoint.send, CPU, Attend(node))
        done = swap(node, old, control, new, self._fork_device, tell_cpu)
        process.child, process.control = done.child, done.control
        process.swaps += 1
        process.restarts.started(time.monotonic())
        self.pin(node)
        report.wait_for_end(old.pidfd)
        os.close(old.pidfd)
        control.close()
        others = tuple(new if s.node == node else s for s in self.launch.others)
        self.launch = replace(self.launch, others=others)
        return {"type": with_type, "old": old.pid, "new": done.child.pid, "pause_ns": done.pause_ns,
                "parts_ns": done.parts_ns}

    def _device(self, node: str) -> tuple[ChildSpec, Process]:
        spec = next((s for s in self.launch.others if s.node == node and node in self._journals), None)
        if spec is None:
            these = ", ".join(self._journals)
            raise SwapRefused(f"{node!r} is no device of this machine; these are: {these}")
        if not self.by_node[node].ready:
            raise SwapRefused(f"{node}: it has no process at the moment", EXIT_DIED)
        return spec, self.by_node[node]

    # ---- inside --------------------------------------------------------------------------------

    def _obituary(self, node: str, process: Process) -> str:
        return report.obituary(node, process, self._forkserver.wait_status(process.child, LAST_WORDS_S))

    def _timed(self, spec: ChildSpec) -> ChildSpec:
        return replace(spec, config={**spec.config, **self._clock()})

    def _fork_device(self, spec: ChildSpec) -> tuple[Child, socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        spec = replace(self._timed(spec), fds={**spec.fds, "control": theirs.fileno()})
        try:
            return self._forkserver.fork(spec), ours
        finally:
            theirs.close()


def _check_disks(spec: ChildSpec, settings: dict[str, Any]) -> None:
    """A restored machine's writes are in an overlay, which belongs to the file beneath."""
    if spec.config.get("overlays") and settings:
        raise SwapRefused(f"{spec.node}: its disk is that of a snapshot, whose settings cannot be changed")
