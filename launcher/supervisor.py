"""One machine's life: start its processes, watch them, answer for them, end them.

All waiting happens in one place (`_turn`), on the bus, the processes' pidfds, signals, the console
process and the control socket; whatever ends the machine raises MachineEnd there. A device whose process
ends gets a new one, which goes on from its journal (devices/journal.py); the end of any other process, or of
one that was never ready, ends the machine. Nothing can survive: see the chain of life in
launcher/forkserver.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bus.endpoint import Endpoint, Received
from bus.frames import (
    Attend,
    Event,
    Frame,
    Reset,
    ResetReply,
    Save,
    SaveReply,
    Shutdown,
    Stats,
    StatsReply,
    Timing,
)
from bus.link import console_path
from devices.journal import Journal as DeviceJournal
from devices.rim import NODE as RIM
from launcher import report
from launcher.affinity import pin
from launcher.control import ControlServer
from launcher.errors import EXIT_DIED, EXIT_INPUT, EXIT_OK, EXIT_OUTPUT, EXIT_RESET, EXIT_SIGNAL, EXIT_TIMEOUT
from launcher.facts import MachineFacts
from launcher.forkserver import Child, ChildSpec, ForkServer
from launcher.journal import Journal
from launcher.names import CPU, MEMORY
from launcher.pausing import NotQuiet, Pausing
from launcher.pump import Pump
from launcher.restarts import Restarts
from launcher.rings import with_rings
from launcher.rundir import CONTROL
from launcher.signals import Signals
from launcher.swapping import SwapRefused, swap
from memory_node.client import MemoryClient, MemoryRefused

if TYPE_CHECKING:
    from launcher.restore import Restored
    from launcher.snapshotting import Snapshots

LAUNCHER = "launcher"
SECOND_NS = 1_000_000_000
START_S = 60.0  # for all processes to say "ready"; a busy host is slow, not broken
LAST_WORDS_S = 0.2  # for events that a process sent before it ended
CONSOLE_S = 2.0  # for the console of a machine that ended while it started
POLITE_S = 20.0  # for a process to end after Shutdown, on a busy host perhaps in the middle of its start
ANSWER_NS = 5 * SECOND_NS
STATS_NS = 300_000_000
RESET_KINDS = ("reset", "triple-fault")
LIFE_KINDS = ("ready", "poweroff", *RESET_KINDS)  # not for the journal


class MachineEnd(Exception):
    """The machine is to end: with which exit status, and what to tell the user."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status, self.line = status, line


@dataclass(frozen=True, slots=True)
class Launch:
    """All that a machine is made of, in the order of its start."""

    machine: str
    run_dir: Path
    memory: ChildSpec
    others: tuple[ChildSpec, ...]  # the devices, then the CPU node
    rim: ChildSpec | None  # consoles and logs of the devices
    images: Iterable[tuple[int, bytes]]
    start: dict[str, int]
    console: Path | None  # socket of the console device, when someone wants to see it
    stop_on_reset: bool
    facts: MachineFacts | None = None  # for snapshots
    restored: Restored | None = None


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


@dataclass(slots=True)
class _PsRequest:
    """Of `launcher ps`, or of `launcher stats`, which is shown all counters."""

    client: int
    everything: bool
    deadline_ns: int
    missing: set[str]
    counters: dict[str, dict[str, Any]] = field(default_factory=dict)


class Supervisor:
    """Made when the run directory is ours; `live` blocks until the machine has ended."""

    def __init__(
        self, launch: Launch, forkserver: ForkServer, pump: Pump | None, signals: Signals, journal: Journal
    ) -> None:
        *devices, cpu = launch.others
        self._journals = {spec.node: DeviceJournal.make(spec.node) for spec in devices}
        devices = [replace(spec, fds={"journal": self._journals[spec.node]}) for spec in devices]
        rim = launch.rim
        if rim is not None:
            rim, devices = with_rings(rim, devices)
        self._launch = replace(launch, others=(*devices, cpu), rim=rim)
        self._forkserver, self._pump = forkserver, pump
        self._signals, self._journal = signals, journal
        self._processes: dict[str, Process] = {}
        self._ps_requests: list[_PsRequest] = []
        self._deadline_ns: int | None = None
        self._started_ns = time.monotonic_ns()
        self._console_asked = self._console_open = False
        self._endpoint = Endpoint(launch.run_dir, LAUNCHER)
        self._pausing = Pausing(self._ask)
        self._control = ControlServer(launch.run_dir / CONTROL)
        self._snapshots: Snapshots | None = None  # made when the first is asked for

    def live(self, timeout_s: float | None, on_ready: Callable[[], None]) -> MachineEnd:
        """Start the machine, run it, end it; nothing of it is left when this returns why it ended."""
        if timeout_s is not None:
            self._deadline_ns = self._started_ns + int(timeout_s * SECOND_NS)
        try:
            self._start()
            on_ready()
            while True:
                self._turn(None)
        except MachineEnd as end:
            self._stop()
            return end
        finally:
            self._destroy()

    # ---- start ---------------------------------------------------------------------------------

    def _start(self) -> None:
        self._endpoint.bind()
        if self._launch.restored is not None:
            self._pausing.begin_paused(self._launch.restored.clock_ns)
        self._fork(self._launch.memory)
        if self._launch.rim is not None:
            self._fork(self._launch.rim)
        self._wait_for(lambda: self._processes[MEMORY].ready, START_S, "memory is not ready")
        restored = self._launch.restored
        if restored is None:
            self._load_images()
        *devices, cpu = self._launch.others
        for spec in (cpu, *devices):  # the CPU node has most to do before it is ready
            self._fork(spec)
            self._turn(0)
        self._processes[cpu.node] = self._processes.pop(cpu.node)  # where `ps` shows it: last
        self._wait_for(
            lambda: all(p.ready for p in self._processes.values()),
            START_S,
            lambda: "not ready: " + ", ".join(n for n, p in self._processes.items() if not p.ready),
        )
        if restored is not None:
            restored.await_memory()
            if not restored.stay_paused:
                self._go_on()
        for spec in self._launch.others:
            pin(self._processes[spec.node].child.pid, spec.host_cpus)
        if self._pump is not None and self._launch.console is not None:
            self._wait_for(lambda: self._console_open, START_S, "the console did not open")

    def _open_console(self) -> None:
        """Show the console that is to be shown, once its device and the process with its socket are ready."""
        path = self._launch.console
        ready = {node for node, process in self._processes.items() if process.was_ready}
        shown = {node for node in ready if console_path(self._launch.run_dir, node) == path}
        if self._pump is not None and path is not None and not self._console_asked and RIM in ready and shown:
            self._console_asked = True
            self._pump.connect(path)

    def _fork(self, spec: ChildSpec) -> None:
        control: socket.socket | None = None
        if spec.node not in (MEMORY, RIM):
            spec = replace(spec, config={**spec.config, **self._pausing.node_config()})
        if spec.node in self._journals:
            child, control = self._fork_device(spec)
        else:
            child = self._forkserver.fork(spec)
        self._processes[spec.node] = process = Process(child, spec.log, control=control)
        process.restarts.started(time.monotonic())
        self._endpoint.connect(spec.node)

    def _fork_device(self, spec: ChildSpec) -> tuple[Child, socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            return self._forkserver.fork(replace(spec, fds={**spec.fds, "control": theirs.fileno()})), ours
        finally:
            theirs.close()

    def _load_images(self) -> None:
        try:
            with MemoryClient(self._launch.run_dir) as memory:
                memory.put("ram", self._launch.images)
        except MemoryRefused as e:
            self._turn(SECOND_NS)  # if it died, its pidfd says so
            raise MachineEnd(EXIT_DIED, str(e)) from e

    def _wait_for(
        self, condition: Callable[[], bool], timeout_s: float, failure: str | Callable[[], str]
    ) -> None:
        deadline_ns = time.monotonic_ns() + int(timeout_s * SECOND_NS)
        while not condition():
            left_ns = deadline_ns - time.monotonic_ns()
            if left_ns <= 0:
                text = failure if isinstance(failure, str) else failure()
                raise MachineEnd(EXIT_DIED, f"after {timeout_s:g} s: {text}")
            self._turn(left_ns)

    # ---- the one place that waits --------------------------------------------------------------

    def _turn(self, timeout_ns: int | None) -> None:
        """Wait for the next thing to happen, or for the time to pass, and act on it."""
        pidfds = {p.child.pidfd: node for node, p in self._processes.items() if p.restarts.due_s is None}
        fds = [self._signals.descriptor, self._forkserver.pidfd, self._forkserver.sock.fileno(), *pidfds]
        if self._pump is not None:
            fds += [self._pump.sock.fileno(), self._pump.pidfd]
        fds += self._control.descriptors()
        written = self._snapshots.descriptors() if self._snapshots is not None else []
        fds += written
        readable, _ = self._endpoint.wait(self._wait_ns(timeout_ns), fds)
        for received in self._endpoint.receive():
            self._take_frame(received)
        if self._signals.descriptor in readable and (number := self._signals.take()) is not None:
            raise MachineEnd(EXIT_SIGNAL + number, f"ended by {number.name}")
        if self._deadline_ns is not None and time.monotonic_ns() >= self._deadline_ns:
            raise MachineEnd(EXIT_TIMEOUT, "still running when --timeout had passed")
        if self._forkserver.pidfd in readable:
            self._bury_forkserver()
        if self._forkserver.sock.fileno() in readable:
            self._forkserver.read_reports()
        for fd in readable & pidfds.keys():
            self._bury(pidfds[fd])
        self._restart_due()
        if self._pump is not None and readable & {self._pump.sock.fileno(), self._pump.pidfd}:
            self._take_pump_record(self._pump)
        for fd in readable.intersection(self._control.descriptors()):
            for client, request in self._control.readable(fd):
                self._obey(client, request)
        if self._snapshots is not None and readable.intersection(written):
            self._snapshots.finish(self._devices())
        self._answer_ps()

    def _wait_ns(self, timeout_ns: int | None) -> int | None:
        """`timeout_ns`, or less where a deadline comes first."""
        now = time.monotonic_ns()
        waits = [r.deadline_ns - now for r in self._ps_requests]
        due = [p.restarts.due_s for p in self._processes.values() if p.restarts.due_s is not None]
        waits += [int(due_s * SECOND_NS) - now for due_s in due]
        if timeout_ns is not None:
            waits.append(timeout_ns)
        if self._deadline_ns is not None:
            waits.append(self._deadline_ns - now)
        return max(0, min(waits)) if waits else None

    def _take_frame(self, received: Received) -> None:
        process = self._processes.get(received.peer)
        if process is not None:
            process.last_frame = report.frame_name(received.frame)
            process.last_frame_ns = time.monotonic_ns()
        match received.frame:
            case Event(kind="ready"):
                if process is not None:
                    process.ready = process.was_ready = True
                if CPU in self._processes and received.peer in self._journals:
                    self._endpoint.send(CPU, Attend(received.peer))
                self._open_console()
            case Event(kind="poweroff"):
                raise MachineEnd(EXIT_OK, f"powered off after {self._uptime_s():.1f} s")
            case Event(kind=kind) as event if kind in RESET_KINDS:
                self._reset(received.peer, event)
            case Event(kind="refused", text=text):
                raise MachineEnd(EXIT_INPUT, f"not restored: {text}")
            case Event(kind="device-error" | "cpu-error", text=text):
                if process is not None:
                    process.last_words = text
            case Event() as event:
                self._journal.event(_whose(received.peer, event), event)
            case StatsReply(counters=counters):
                for request in self._ps_requests:
                    request.counters[received.peer] = counters
                    request.missing.discard(received.peer)
            case _:
                pass  # an answer that came too late

    def _take_pump_record(self, pump: Pump) -> None:
        record = pump.read()
        if record is None:
            raise MachineEnd(EXIT_DIED, f"the console process (pid {pump.pid}) died")
        match record["op"]:
            case "connected":
                self._console_open = True
                self._journal.use_console(pump)
            case "until":
                raise MachineEnd(EXIT_OK, "the text of --until has appeared")
            case "leave":
                raise MachineEnd(EXIT_OK, "left with Ctrl-] q")
            case "output-closed":
                raise MachineEnd(EXIT_OUTPUT, "standard output was closed")
            case "failed":
                raise MachineEnd(EXIT_DIED, f"the console: {record['error']}")
            case "closed":
                pass  # the device has ended, and its pidfd says so

    def _obey(self, client: int, request: dict[str, Any]) -> None:
        match op := request["op"]:
            case "down":
                self._control.answer(client, {})
                raise MachineEnd(EXIT_OK, "ended by `launcher down`")
            case "pause" | "resume" if self._snapshots is not None and self._snapshots.busy:
                self._control.answer(client, {"error": "a snapshot is being written"})
            case "pause" | "resume":
                self._pause_or_resume(client, op == "pause")
            case "swap":
                self._swap(client, request)
            case "kill":
                self._kill(client, str(request.get("device")))
            case "snapshot":
                self._snapshot(client, request)
            case "timing-on" | "timing-off":
                self._endpoint.send(CPU, Timing(op == "timing-on"))
                self._control.answer(client, {})
            case "ps" | "stats":
                asked = {node for node, process in self._processes.items() if process.ready}
                for node in asked:
                    self._endpoint.send(node, Stats())
                deadline_ns = time.monotonic_ns() + STATS_NS
                self._ps_requests.append(_PsRequest(client, op == "stats", deadline_ns, asked))

    def _devices(self) -> list[str]:
        return list(self._journals)

    def _go_on(self) -> None:
        try:
            self._pausing.resume(CPU, self._devices())
        except NotQuiet as e:
            self._turn(0)  # if one died, its pidfd says so
            raise MachineEnd(EXIT_DIED, str(e)) from e

    def _snapshot(self, client: int, request: dict[str, Any]) -> None:
        if self._snapshots is None:
            from launcher.snapshotting import Snapshots  # takes its time to import

            self._snapshots = Snapshots(lambda: self._launch, self._pausing, self._ask, self._control.answer)
        if self._snapshots.busy:
            self._control.answer(client, {"error": "a snapshot is being written already"})
        else:
            self._snapshots.begin(client, request, self._devices())

    def _ask(self, node: str, frame: Frame) -> Frame:
        return self._endpoint.request(node, frame, ANSWER_NS)

    def _pause_or_resume(self, client: int, pause: bool) -> None:
        try:
            (self._pausing.pause if pause else self._pausing.resume)(CPU, self._devices())
        except NotQuiet as e:
            self._control.answer(client, {"error": str(e)})
        else:
            self._control.answer(client, {})

    def _swap(self, client: int, request: dict[str, Any]) -> None:
        node = str(request.get("device"))
        try:
            spec, process = self._device(node)
            control = process.control
            if control is None or not process.ready:
                raise SwapRefused(f"{node}: it has no process at the moment")
            with_type, settings = request.get("type") or spec.config["type"], request.get("settings") or {}
            settings = {**spec.config["settings"], **settings}
            new = replace(spec, config={**spec.config, "type": with_type, "settings": settings})
            tell_cpu = partial(self._endpoint.send, CPU, Attend(node))
            done = swap(node, process.child, control, new, self._fork_device, tell_cpu)
        except SwapRefused as e:
            self._control.answer(client, {"error": str(e)})
            return
        old = process.child
        process.child, process.control = done.child, done.control
        process.swaps += 1
        process.restarts.started(time.monotonic())
        pin(done.child.pid, spec.host_cpus)
        report.wait_for_end(old.pidfd)
        os.close(old.pidfd)
        control.close()
        others = tuple(new if s.node == node else s for s in self._launch.others)
        self._launch = replace(self._launch, others=others)
        reply = {"type": with_type, "old": old.pid, "new": done.child.pid, "pause_ns": done.pause_ns}
        self._control.answer(client, reply)

    def _kill(self, client: int, node: str) -> None:
        try:
            _, process = self._device(node)
            if not process.ready:
                raise SwapRefused(f"{node}: it has no process at the moment")
        except SwapRefused as e:
            self._control.answer(client, {"error": str(e)})
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process.child.pidfd, signal.SIGKILL)
        self._control.answer(client, {"pid": process.child.pid})

    def _device(self, node: str) -> tuple[ChildSpec, Process]:
        for spec in self._launch.others:
            if spec.node == node and node in self._journals:
                return spec, self._processes[node]
        raise SwapRefused(f"{node!r} is no device of this machine; these are: {', '.join(self._journals)}")

    def _answer_ps(self) -> None:
        for request in list(self._ps_requests):
            if not request.missing or time.monotonic_ns() >= request.deadline_ns:
                self._ps_requests.remove(request)
                self._control.answer(request.client, {"rows": list(self._ps_rows(request))})

    def _ps_rows(self, request: _PsRequest) -> Iterator[dict[str, Any]]:
        own = self._endpoint.stats()
        yield report.ps_row("launcher", os.getpid(), own)
        yield report.ps_row("forkserver", self._forkserver.pid, None)
        if self._pump is not None:
            yield report.ps_row("console", self._pump.pid, None)
        for node, process in self._processes.items():
            row = report.ps_row(node, process.child.pid, request.counters.get(node), process.restarts.count)
            if process.restarts.due_s is not None:
                row["state"] = process.restarts.state(time.monotonic())
            elif not process.ready:
                row["state"] = "starting"
            elif node in request.missing:
                row["state"] += ", silent"
            elif self._pausing.paused and node not in (MEMORY, RIM):
                row["state"] = "paused"
            if request.everything:
                row["counters"] = request.counters.get(node, {})
            yield row

    # ---- deaths --------------------------------------------------------------------------------

    def _bury(self, node: str) -> None:
        """A process has ended. What it said before may explain it; else name it."""
        process = self._processes[node]
        if self._forkserver_died():
            self._bury_forkserver()
        if node in self._journals and process.was_ready:
            status = self._forkserver.wait_status(process.child, LAST_WORDS_S)
            wait_s = process.restarts.ended(time.monotonic())
            when = f"in {wait_s:.1f} s" if wait_s else "at once"
            self._journal.log(node, process.log)
            self._journal.tell(f"{report.obituary(node, process, status)}; it is restarted {when}")
            os.close(process.child.pidfd)
            if process.control is not None:
                process.control.close()
            process.ready = False
            process.last_words = ""
            return
        self._hear_last_words()
        status = self._forkserver.wait_status(process.child, LAST_WORDS_S)
        self._journal.log(node, process.log)
        raise MachineEnd(EXIT_DIED, report.obituary(node, process, status))

    def _restart_due(self) -> None:
        """Fork the devices whose time has come."""
        now_s = time.monotonic()
        for spec in self._launch.others:
            process = self._processes.get(spec.node)
            if process is not None and process.restarts.due_s is not None and process.restarts.due_s <= now_s:
                process.child, process.control = self._fork_device(spec)
                process.restarts.started(now_s)
                pin(process.child.pid, spec.host_cpus)

    def _bury_forkserver(self) -> None:
        self._hear_last_words()
        pid = self._forkserver.pid
        raise MachineEnd(EXIT_DIED, f"the fork server (pid {pid}) died, and with it all processes")

    def _forkserver_died(self) -> bool:
        readable, _ = self._endpoint.wait(0, [self._forkserver.pidfd])
        return bool(readable)

    def _hear_last_words(self) -> None:
        deadline_ns = time.monotonic_ns() + int(LAST_WORDS_S * SECOND_NS)
        while (left_ns := deadline_ns - time.monotonic_ns()) > 0:
            self._endpoint.wait(left_ns)
            for received in self._endpoint.receive():
                self._take_frame(received)

    # ---- reset ---------------------------------------------------------------------------------

    def _reset(self, source: str, event: Event) -> None:
        """The guest has pulled the RESET pin, or shut down with a triple fault."""
        if self._launch.stop_on_reset:
            state = event.data or self._cpu_state()
            line = f"reset by {source}: {event.text}"
            raise MachineEnd(EXIT_RESET, "\n".join([line, *report.cpu_state_lines(state)]))
        self._journal.event(source, event)
        nodes = list(self._journals)
        try:
            self._request(CPU, Reset())  # with no registers to start from: stay in reset
            for node in nodes:
                self._request(node, Reset())
            self._load_images()
            self._request(CPU, Reset(dict(self._launch.start)))
        except RuntimeError as e:
            self._turn(0)  # if one died, its pidfd says so
            raise MachineEnd(EXIT_DIED, f"the machine could not be reset: {e}") from e

    def _cpu_state(self) -> dict[str, Any]:
        try:
            reply = self._endpoint.request(CPU, Save(), ANSWER_NS)
        except RuntimeError as e:
            return {"unknown": str(e)}
        return reply.state["cpu"] if isinstance(reply, SaveReply) else {"unknown": repr(reply)}

    def _request(self, node: str, frame: Reset) -> None:
        reply: Frame = self._endpoint.request(node, frame, ANSWER_NS)
        if not isinstance(reply, ResetReply):
            raise RuntimeError(f"{node} answered Reset with {reply}")

    # ---- end -----------------------------------------------------------------------------------

    def _stop(self) -> None:
        """Politely: the CPU node first, so that all it has posted arrives; the devices; then the consoles.

        A guest may have ended before its console was open: then that comes first.
        """
        if self._pump is not None and self._launch.console is not None and not self._console_open:
            self._await_console(self._pump)
        self._shut_down([CPU])
        self._shut_down([node for node in self._processes if node not in (CPU, RIM)])
        self._shut_down([RIM])  # when all has been said

    def _await_console(self, pump: Pump) -> None:
        deadline_ns = time.monotonic_ns() + int(CONSOLE_S * SECOND_NS)
        while not self._console_open and (left_ns := deadline_ns - time.monotonic_ns()) > 0:
            readable, _ = self._endpoint.wait(left_ns, [pump.sock.fileno()])
            for received in self._endpoint.receive():
                with contextlib.suppress(MachineEnd):  # it is ending already
                    self._take_frame(received)
            if readable:
                try:
                    self._take_pump_record(pump)
                except MachineEnd:
                    return

    def _shut_down(self, nodes: list[str]) -> None:
        processes = [self._processes[n] for n in nodes if n in self._processes]
        alive = {p.child.pidfd: p.child.node for p in processes if p.ready}  # others would not hear it
        for node in alive.values():
            self._endpoint.send(node, Shutdown())
        deadline_ns = time.monotonic_ns() + int(POLITE_S * SECOND_NS)
        while alive and (left_ns := deadline_ns - time.monotonic_ns()) > 0:
            ended, _ = self._endpoint.wait(left_ns, [*alive, self._signals.descriptor])
            for received in self._endpoint.receive():
                if isinstance(received.frame, Event) and received.frame.kind not in LIFE_KINDS:
                    self._journal.event(_whose(received.peer, received.frame), received.frame)
            if self._signals.descriptor in ended and self._signals.take() is not None:
                return  # once more Ctrl-C: no politeness
            for fd in ended & alive.keys():
                del alive[fd]
        for node in alive.values():
            self._journal.tell(f"{node} has not ended in {POLITE_S:g} s, and is killed")

    def _destroy(self) -> None:
        """Whatever state things are in: no process, no terminal in raw mode, no open socket afterwards."""
        self._forkserver.stop()
        for fd in self._journals.values():
            os.close(fd)
        for process in self._processes.values():
            if process.restarts.due_s is not None:
                continue
            report.wait_for_end(process.child.pidfd)
            os.close(process.child.pidfd)
        if self._pump is not None:
            self._pump.finish(self._signals.descriptor)
        self._journal.console_ended()
        if self._snapshots is not None:
            self._snapshots.close()
        self._control.close()
        self._endpoint.close(linger_ms=0)  # there is nobody left to send to

    def _uptime_s(self) -> float:
        return (time.monotonic_ns() - self._started_ns) / SECOND_NS


def _whose(peer: str, event: Event) -> str:
    """The node that an event is about: log lines of devices come from another process."""
    return str(event.data.get("node", peer))
