"""The processes of one machine: forked, watched, and all but the CPU's replaced.

A node whose process ends gets a new one, at once or after a wait (launcher/restarts.py): a device's goes on
from its journal (devices/journal.py), the memory node's with the memory that is held here, that of `consoles`
with the rings and the sockets that are kept here. What the end of the CPU's means is the supervisor's to say.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from bus.endpoint import Endpoint
from bus.frames import Attend
from bus.link import listen
from devices.journal import Journal as DeviceJournal
from devices.rim import NODE as RIM
from launcher import report
from launcher.affinity import pin
from launcher.deposit import DepositedProcess
from launcher.errors import EXIT_DIED
from launcher.forkserver import Child, ChildSpec, ForkServer
from launcher.keeping import Kept
from launcher.launch import Launch
from launcher.memory import with_memory
from launcher.names import CPU
from launcher.recording import CrashTraces, rings, with_traces
from launcher.restarts import Restarts
from launcher.rings import Row, changed, with_rings
from launcher.spans import Span, Spans
from launcher.swapping import CONNECTED_S, Standby, Swapped, SwapRefused
from memory_node import wire

if TYPE_CHECKING:
    from launcher.reattach import Inherited

SECOND_NS = 1_000_000_000
RIM_S = 10.0  # for the rim to close a console whose clients don't read
REPLACED = 64  # how many are remembered
LAST_WORDS_S = 0.2  # for what a process sent, and what is said of it, before it ended


class Process(msgspec.Struct):
    """A process of the machine as `ps` and the one-line obituary describe it."""

    child: Child
    log: Path
    ready: bool = False  # has been, and was not started anew since
    was_ready: bool = False
    ended_ns: int = 0  # when its last process was found to have ended
    killed: bool = False  # by `launcher kill`: no crash
    swaps: int = 0
    restarts: Restarts = msgspec.field(default_factory=Restarts)
    control: socket.socket | None = None  # of all but the CPU, see launcher/swapping.py
    replaces: list[int] = []  # pids of its device that ended; the CPU isn't back yet
    replaced: deque[tuple[int, int]] = msgspec.field(default_factory=lambda: deque(maxlen=REPLACED))  # when
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
        inherited: bool = False,
    ) -> None:
        """`clock`: what a node that starts now is told of the machine's time. `inherited`: the machine runs,
        and `launch` has all its descriptors: see `adopt`."""
        memory = launch.memory if inherited else with_memory(launch.memory)
        self._opened = [fd for name, fd in memory.fds.items() if inherited or name not in launch.memory.fds]
        *devices, cpu = launch.others
        rim = launch.rim
        if not inherited:
            launch = with_traces(launch)
            rim, (*devices, cpu) = launch.rim, launch.others
            devices = [_with_journal(launch, spec) for spec in devices]
            if rim is not None:
                rim, devices = with_rings(rim, devices)
        self._journals = {spec.node: spec.fds["journal"] for spec in devices}
        self._listening = {spec.node: spec.fds["listen"] for spec in devices}
        # as it is now, swaps included
        self.launch = replace(launch, memory=memory, others=(*devices, cpu), rim=rim)
        self._opened += rings(self.launch).values()
        self._crashes = CrashTraces(launch.run_dir)
        self.spans = Spans(launch.machine, launch.otlp)
        self.kept = Kept()  # for the rim: its sockets
        self.by_node: dict[str, Process] = {}
        self._forkserver, self._endpoint, self._clock = forkserver, endpoint, clock

    @property
    def devices(self) -> list[str]:
        return list(self._journals)

    def fork(self, specs: Sequence[ChildSpec]) -> None:
        """Start the nodes' first processes."""
        pairs = [None if spec.node == CPU else _pair() for spec in specs]
        try:
            told = [
                self._timed(spec) if pair is None else self._controlled(spec, pair[1])
                for spec, pair in zip(specs, pairs, strict=True)
            ]
            children = self._forkserver.fork_all(told)
        finally:
            for _, theirs in filter(None, pairs):
                theirs.close()
        for spec, child, pair in zip(specs, children, pairs, strict=True):
            control = None if pair is None else pair[0]
            self.by_node[spec.node] = process = Process(child, spec.log, control=control)
            process.restarts.started(time.monotonic())
            self._endpoint.connect(spec.node)

    def adopt(self, inherited: Inherited) -> None:
        """Go on with the processes of a launcher that has gone. Those that have ended are buried as any."""
        self.kept.fds = dict(inherited.deposit.kept)
        logs = {spec.node: spec.log for spec in self._specs()}
        for node, was in inherited.deposit.processes.items():
            child = inherited.processes[node]
            control = None if was.control is None else socket.socket(fileno=was.control)
            process = Process(child, logs[node], was.ready, was_ready=True, swaps=was.swaps, control=control)
            self.by_node[node] = process
            process.restarts.count = was.restarts
            self._endpoint.connect(node)
        for child in inherited.strangers:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
            if child.pid != inherited.processes[child.node].pid:
                report.wait_for_end(child.pidfd)
                os.close(child.pidfd)

    @property
    def met(self) -> bool:
        """All that are ready have answered our connection."""
        return all(not p.ready or self._endpoint.has_heard(node) for node, p in self.by_node.items())

    def deposited(self) -> dict[str, DepositedProcess]:
        """For `adopt`."""
        return {
            node: DepositedProcess(
                process.child.pid,
                process.ready,
                process.swaps,
                process.restarts.count,
                None if process.control is None or process.control.fileno() < 0 else process.control.fileno(),
            )
            for node, process in self.by_node.items()
        }

    def leave(self) -> None:
        """Another launcher has them."""
        for fd in (*self._journals.values(), *self._listening.values(), *self._opened, *self.pidfds()):
            os.close(fd)
        self.kept.close()

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
        for fd in (*self._journals.values(), *self._listening.values(), *self._opened):
            os.close(fd)
        self._crashes.finish()
        self.spans.close()
        for pidfd in self.pidfds():
            report.wait_for_end(pidfd)
            os.close(pidfd)
        self.hear_rim()
        self.kept.close()  # now the consoles' clients are hung up on, if they weren't

    # ---- deaths and restarts -------------------------------------------------------------------

    def obituary(self, node: str) -> str:
        """One line about one that has ended, and with it the machine."""
        process = self.by_node[node]
        line = self._obituary(node, process)
        return line + self.save_trace(line) if process.was_ready else line

    def save_trace(self, why: str) -> str:
        """Something has crashed. What is to be added to the line that tells of it."""
        file = self._crashes.save(self.launch, why)
        return "" if file is None else f"; what led to it: {file}"

    def restarts(self, node: str) -> bool:
        """Whether another process can go on for one that ends now."""
        spec = next(spec for spec in self._specs() if spec.node == node)
        return node != CPU and self.by_node[node].was_ready and spec.config.get("checkpoints") is not False

    def bury(self, node: str) -> str:
        """Have one that has ended restarted, see `restart_due`; what to tell of it."""
        process = self.by_node[node]
        ended = replace(process)
        self.hear(node)
        process.ended_ns = time.monotonic_ns()
        if node in self._journals:
            process.replaces.append(process.child.pid)
        wait_s = process.restarts.ended(time.monotonic())
        process.ready = False
        process.last_words = ""
        if node == RIM and ended.control is not None:
            self.kept.drain(ended.control)
        self.restart_due()  # before anything else: the guest waits
        line = self._obituary(node, ended)
        trace = "" if ended.killed else self.save_trace(line)
        process.killed = False
        os.close(ended.child.pidfd)
        if ended.control is not None:
            ended.control.close()
        return f"{line}; it is restarted {f'in {wait_s:.1f} s' if wait_s else 'at once'}{trace}"

    def waiting(self) -> dict[int, str]:
        """Sockets of new processes, and the nodes; `hear` has to be called when one is readable."""
        return {
            p.control.fileno(): node
            for node, p in self.by_node.items()
            if p.replaces and p.control is not None and p.restarts.due_s is None
        }

    def hear(self, node: str) -> None:
        """What a new process says of itself: the CPU is connected to it."""
        process = self.by_node[node]
        control = process.control
        while process.replaces and control is not None and select.select([control], [], [], 0)[0]:
            try:
                received = wire.receive_record(control)
            except (OSError, wire.BadRecord):
                return
            if received is None:  # it has ended, and its pidfd says so
                return
            if received[0]["op"] == "connected":
                self._tell_crashes(node, process, received[0]["ns"])
                process.replaced.extend((pid, received[0]["ns"]) for pid in process.replaces)
                process.replaces.clear()

    def _tell_crashes(self, node: str, process: Process, connected_ns: int) -> None:
        """The CPU is connected to one that went on for others, which ended or were swapped."""
        for pid in process.replaces if process.ended_ns else ():
            attributes: dict[str, str | int | bool] = {
                "device": node, "pid.old": pid, "pid.new": process.child.pid,
                "pause_ns": connected_ns - process.ended_ns,
            }  # fmt: skip
            self.spans.emit(Span("crash", process.ended_ns, connected_ns, attributes, f"{node} has ended"))
        process.ended_ns = 0

    def next_due_ns(self) -> int | None:
        """When `restart_due` has something to do, on CLOCK_MONOTONIC."""
        due = [p.restarts.due_s for p in self.by_node.values() if p.restarts.due_s is not None]
        return int(min(due) * SECOND_NS) if due else None

    def restart_due(self) -> None:
        """Fork the nodes whose time has come."""
        now_s = time.monotonic()
        for spec in self._specs():
            process = self.by_node.get(spec.node)
            if process is not None and process.restarts.due_s is not None and process.restarts.due_s <= now_s:
                self._restart(spec, process)

    def restart(self, node: str) -> None:
        """Fork a node's process now, if it has none."""
        process = self.by_node[node]
        if process.restarts.due_s is not None:
            self._restart(next(spec for spec in self._specs() if spec.node == node), process)

    def _restart(self, spec: ChildSpec, process: Process) -> None:
        if spec.node == RIM:
            spec = replace(spec, fds={**spec.fds, **self.kept.fds})
        process.child, process.control = self._fork_controlled(spec)
        process.restarts.started(time.monotonic())

    # ---- asked for by the user -----------------------------------------------------------------

    def kill(self, node: str) -> int:
        """kill -9 of a node's process; its pid. SwapRefused when there is none."""
        _, process = self._replaceable(node)
        process.killed = True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process.child.pidfd, signal.SIGKILL)
        return process.child.pid

    def stand_by(
        self, node: str, with_type: str | None, settings: dict[str, Any], folder: str = "/"
    ) -> tuple[Standby, ChildSpec]:
        """Start a process that shall replace the node's, see `replace`; SwapRefused.

        `folder`: where relative paths of disks begin."""
        spec, _ = self._replaceable(node)
        new = spec
        if spec.config.get("checkpoints") is False:
            raise SwapRefused(f"{node}: there is nothing to go on from: machine.checkpoints is false")
        if node in self._journals:
            _check_disks(spec, settings)
            with_type = with_type or str(spec.config["type"])
            settings = {**spec.config["settings"], **self._with_paths(node, settings, Path(folder))}
            new = replace(spec, config={**spec.config, "type": with_type, "settings": settings})
        elif with_type or settings:
            raise SwapRefused(f"{node}: it is no device, and has no types and no settings")
        kept = None if node in self._journals else self.kept if node == RIM else Kept()
        return Standby(node, new, self._fork_controlled, kept), new

    def replace(self, standby: Standby, new: ChildSpec) -> Swapped:
        """Have it take over. SwapRefused: the old one goes on. When the CPU is connected `hear` finds out."""
        node = standby.node
        try:
            _, process = self._replaceable(node)
        except SwapRefused:
            standby.close()
            raise
        control, old = process.control, process.child
        assert control is not None
        self.hear(node)
        device = node in self._journals
        done = standby.take_over(old, control, partial(self._attend, node), 0 if device else CONNECTED_S)
        process.child, process.control = done.child, done.control
        process.swaps += 1
        process.restarts.started(time.monotonic())
        self.pin(node)
        report.wait_for_end(old.pidfd)
        os.close(old.pidfd)
        control.close()
        others = tuple(new if s.node == node else s for s in self.launch.others)
        self.launch = replace(self.launch, others=others)
        if device:
            process.replaces.append(old.pid)
            self._connect_channels(node, new.config["settings"])
        elif node == RIM and self.launch.rim is not None:  # what has changed while it got ready
            known = new.config["channels"]
            self._tell_rim([row for row in self.launch.rim.config["channels"] if row not in known])
        return done

    def rim_descriptors(self) -> list[int]:
        """Readable when `hear_rim` has something to do."""
        control = self._rim_control()
        return [] if control is None else [control.fileno()]

    def hear_rim(self) -> list[dict[str, Any]]:
        """Take what the rim has kept here; what else it says."""
        control = self._rim_control()
        return [] if control is None else self.kept.drain(control)

    def _rim_control(self) -> socket.socket | None:
        process = self.by_node.get(RIM)
        return None if process is None or process.restarts.due_s is not None else process.control

    def _attend(self, node: str) -> None:
        """The CPU must look for a device's new process."""
        if node in self._journals:
            self._endpoint.send(CPU, Attend(node))

    def _connect_channels(self, node: str, settings: dict[str, Any]) -> None:
        """A device's channels may have other back ends now."""
        if self.launch.rim is None:
            return
        rim, rows = changed(self.launch.rim, node, settings)
        self.launch = replace(self.launch, rim=rim)  # also for a process that is started later
        self._tell_rim(rows)

    def _tell_rim(self, rows: Sequence[Row]) -> None:
        """Channels are others now. Returns when the rim has done what follows."""
        control = self._rim_control()
        if control is None:
            return
        for row in rows:
            with contextlib.suppress(OSError):
                wire.send_record(control, {"op": "channel", "channel": row})
            deadline_s = time.monotonic() + RIM_S
            while not any(record["op"] == "changed" for record in self.hear_rim()):
                fds = [control.fileno(), self.by_node[RIM].child.pidfd]
                readable = select.select(fds, [], [], max(0.0, deadline_s - time.monotonic()))[0]
                if readable != fds[:1]:
                    return  # it has ended, and its successor knows; or something takes its time

    def _replaceable(self, node: str) -> tuple[ChildSpec, Process]:
        spec = next((s for s in self._specs() if s.node == node and node != CPU), None)
        if spec is None:
            these = ", ".join(s.node for s in self._specs() if s.node != CPU)
            raise SwapRefused(f"{node!r} is no device of this machine; these are: {these}")
        if not self.by_node[node].ready:
            raise SwapRefused(f"{node}: it has no process at the moment", EXIT_DIED)
        return spec, self.by_node[node]

    def _with_paths(self, node: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Disks' paths made absolute, from a user's folder."""
        facts = self.launch.facts
        names = {disk.setting for disk in facts.disks if disk.node == node} if facts is not None else set()
        return {
            name: str((folder / Path(value).expanduser()).resolve())
            if name in names and isinstance(value, str) else value
            for name, value in settings.items()
        }  # fmt: skip

    # ---- inside --------------------------------------------------------------------------------

    def _obituary(self, node: str, process: Process) -> str:
        return report.obituary(node, process, self._forkserver.wait_status(process.child, LAST_WORDS_S))

    def _specs(self) -> tuple[ChildSpec, ...]:
        """Of all nodes."""
        rim = () if self.launch.rim is None else (self.launch.rim,)
        return (self.launch.memory, *rim, *self.launch.others)

    def _timed(self, spec: ChildSpec) -> ChildSpec:
        return replace(spec, config={**spec.config, **self._clock()})

    def _fork_controlled(self, spec: ChildSpec) -> tuple[Child, socket.socket]:
        ours, theirs = _pair()
        try:
            return self._forkserver.fork(self._controlled(spec, theirs)), ours
        finally:
            theirs.close()

    def _controlled(self, spec: ChildSpec, control: socket.socket) -> ChildSpec:
        if spec.node in self._journals:
            spec = self._timed(spec)
        return replace(spec, fds={**spec.fds, "control": control.fileno()})


def _pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _with_journal(launch: Launch, spec: ChildSpec) -> ChildSpec:
    """A device with what outlives its processes."""
    fds = {**spec.fds, "journal": DeviceJournal.make(spec.node), "listen": listen(launch.run_dir, spec.node)}
    return replace(spec, fds=fds)


def _check_disks(spec: ChildSpec, settings: dict[str, Any]) -> None:
    """A restored machine's writes are in an overlay, which belongs to the file beneath."""
    if spec.config.get("overlays") and settings:
        raise SwapRefused(f"{spec.node}: its disk is that of a snapshot, whose settings cannot be changed")
