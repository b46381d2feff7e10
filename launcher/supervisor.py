"""One machine's life: start its processes, watch them, answer for them, end them.

All waiting happens in one place (`_turn`), on the bus, the processes' pidfds, signals, the console
process and the control socket; whatever ends the machine raises MachineEnd there. A node whose process
ends gets a new one (launcher/processes.py); the end of the CPU's process, or of one that was never ready,
ends the machine. Nothing can survive: see the chain of life in launcher/forkserver.py.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bus.endpoint import Endpoint, Received
from bus.frames import Attend, Event, Frame, Shutdown, StatsReply
from bus.link import console_path
from devices.rim import NODE as RIM
from launcher import report
from launcher.commands import Commands
from launcher.depositing import Depositing
from launcher.errors import EXIT_DIED, EXIT_INPUT, EXIT_OK, EXIT_OUTPUT, EXIT_RESET, EXIT_SIGNAL, EXIT_TIMEOUT
from launcher.forkserver import ForkServer
from launcher.journal import Journal
from launcher.launch import Launch, MachineEnd
from launcher.memory import load_images
from launcher.names import CPU
from launcher.pausing import NotQuiet, Pausing
from launcher.processes import LAST_WORDS_S, SECOND_NS, Process, Processes
from launcher.recording import Draining
from launcher.resetting import Resetting
from launcher.rundir import CONTROL
from launcher.signals import Signals
from launcher.spans import in_phases

if TYPE_CHECKING:
    from launcher.pump import Pump
    from launcher.reattach import Inherited

LAUNCHER = "launcher"
START_S = 60.0  # for all processes to say "ready"; a busy host is slow, not broken
CONSOLE_S = 2.0  # for the console of a machine that ended while it started
POLITE_S = 20.0  # for a process to end after Shutdown, on a busy host perhaps in the middle of its start
MEET_NS = 5 * SECOND_NS  # for the processes of a machine that runs to answer; it goes on if they don't
DELIVERIES = 3  # processes of `consoles` that may end in it
ANSWER_NS = 5 * SECOND_NS
RESET_KINDS = ("reset", "triple-fault")
LIFE_KINDS = ("ready", "poweroff", *RESET_KINDS)  # not for the journal


class Supervisor:
    """Made when the run directory is ours; `live` blocks until the machine has ended."""

    def __init__(
        self,
        launch: Launch,
        forkserver: ForkServer,
        pump: Pump | None,
        signals: Signals,
        journal: Journal,
        inherited: Inherited | None = None,
    ) -> None:
        """`inherited`: the machine runs already."""
        self._forkserver, self._pump = forkserver, pump
        self._signals, self._journal = signals, journal
        self._deadline_ns: int | None = None
        self._started_ns = time.monotonic_ns()
        self._phases_ns: dict[str, int] = {}  # of the start: when each had ended
        self._console_asked = self._console_open = self._left = False
        self._inherited = inherited
        self._endpoint = Endpoint(launch.run_dir, LAUNCHER, afresh=True)
        self._pausing = Pausing(self._ask_all)
        self._processes = Processes(
            launch, forkserver, self._endpoint, self._pausing.node_config, inherited is not None
        )
        self._resetting = Resetting(self._processes, self._endpoint)
        self._depositing = Depositing(self._processes, self._pausing, forkserver)
        path = launch.run_dir / CONTROL
        self._commands = Commands(
            path, self._processes, self._pausing, self._endpoint, self._ask, forkserver, pump,
            self._depositing.deposit,
        )  # fmt: skip

    def draining(self, file: Path) -> Draining:
        """Have all that is noted from now on written to a file."""
        return Draining(self._launch, file, go_on=True)

    @property
    def _launch(self) -> Launch:
        return self._processes.launch

    def live(self, timeout_s: float | None, on_ready: Callable[[], None]) -> MachineEnd:
        """Start the machine, run it, end it; nothing of it is left when this returns why it ended."""
        if timeout_s is not None:
            self._deadline_ns = self._started_ns + int(timeout_s * SECOND_NS)
        try:
            try:
                self._begin()
            except MachineEnd as end:
                if end.status == EXIT_OK:  # it has run, and come to its end before all were ready
                    on_ready()
                raise
            on_ready()
            name = "up" if self._launch.restored is None else "restore"
            self._processes.spans.emit(in_phases(name, self._started_ns, self._phases_ns))
            if not gc.isenabled():  # launcher/start.py
                gc.freeze()
                gc.enable()
            while True:
                if (line := self._depositing.update()) is not None:
                    self._journal.tell(line)
                self._turn(None)
        except MachineEnd as end:
            if not end.left:
                self._stop()
            self._left = end.left
            return end
        finally:
            self._destroy()

    # ---- start ---------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._start() if self._inherited is None else self._go_on_with(self._inherited)
        if self._pump is not None and self._launch.console is not None:
            self._wait_for(lambda: self._console_open, START_S, "the console did not open")
        self._depositing.begin(self._started_ns)

    def _start(self) -> None:
        self._endpoint.bind()
        if self._launch.restored is not None:
            self._pausing.begin_paused(self._launch.restored.clock_ns)
        restored, rim = self._launch.restored, self._launch.rim
        if restored is None:
            load_images(self._launch.memory, self._launch.images)
        self._phases_ns["images are loaded"] = time.monotonic_ns()
        *devices, cpu = self._launch.others  # the CPU node has most to do before it is ready
        self._processes.fork([self._launch.memory, cpu, *([] if rim is None else [rim]), *devices])
        self._processes.show_last(cpu.node)
        self._phases_ns["processes are forked"] = time.monotonic_ns()
        self._wait_for(
            lambda: all(p.ready for p in self._processes.by_node.values()),
            START_S,
            lambda: "not ready: " + ", ".join(n for n, p in self._processes.by_node.items() if not p.ready),
        )
        self._phases_ns["processes get ready"] = time.monotonic_ns()
        if restored is not None:
            restored.await_memory()
            if not restored.stay_paused:
                self._go_on()
        self._processes.pin()

    def _go_on_with(self, inherited: Inherited) -> None:
        """Be the launcher of a machine that runs."""
        self._started_ns = inherited.deposit.started_ns
        self._endpoint.bind()
        self._pausing.take_over(inherited.deposit.offset_ns, inherited.deposit.clock_ns)
        self._processes.adopt(inherited)
        until_ns = time.monotonic_ns() + MEET_NS
        while not self._processes.met and (left_ns := until_ns - time.monotonic_ns()) > 0:
            self._turn(left_ns)
        self._open_console()

    def _open_console(self) -> None:
        """Show the console that is to be shown, once its device and the process with its socket are ready."""
        path = self._launch.console
        ready = {node for node, process in self._processes.by_node.items() if process.was_ready}
        shown = {node for node in ready if console_path(self._launch.run_dir, node) == path}
        if self._pump is not None and path is not None and not self._console_asked and RIM in ready and shown:
            self._console_asked = True
            self._pump.connect(path)

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
        pidfds, waiting = self._processes.pidfds(), self._processes.waiting()
        fds = [self._signals.descriptor, self._forkserver.pidfd, self._forkserver.sock.fileno(), *pidfds]
        fds += waiting
        if self._pump is not None:
            fds += [self._pump.sock.fileno(), self._pump.pidfd]
        fds += self._commands.descriptors()
        of_rim = self._processes.rim_descriptors()
        fds += of_rim
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
        if readable.intersection(of_rim):
            self._processes.hear_rim()
        for fd in readable & waiting.keys():
            self._processes.hear(waiting[fd])
        for fd in readable & pidfds.keys():
            self._bury(pidfds[fd])
        self._processes.restart_due()
        if self._pump is not None and readable & {self._pump.sock.fileno(), self._pump.pidfd}:
            self._take_pump_record(self._pump)
        self._commands.turn(readable)

    def _wait_ns(self, timeout_ns: int | None) -> int | None:
        """`timeout_ns`, or less where a deadline comes first."""
        now_ns = time.monotonic_ns()
        deadlines = (self._deadline_ns, self._commands.deadline_ns(), self._processes.next_due_ns())
        waits = [deadline_ns - now_ns for deadline_ns in deadlines if deadline_ns is not None]
        if timeout_ns is not None:
            waits.append(timeout_ns)
        return max(0, min(waits)) if waits else None

    def _take_frame(self, received: Received) -> None:
        process = self._processes.by_node.get(received.peer)
        if process is not None:
            process.last_frame = report.frame_name(received.frame)
            process.last_frame_ns = time.monotonic_ns()
        match received.frame:
            case Event(kind="ready"):
                if process is not None:
                    if process.was_ready:  # it is not the first; those are pinned when all are ready
                        self._processes.pin(received.peer)
                    process.ready = process.was_ready = True
                if CPU in self._processes.by_node and received.peer in self._processes.devices:
                    self._endpoint.send(CPU, Attend(received.peer))
                self._open_console()
            case Event(kind="poweroff"):
                raise MachineEnd(EXIT_OK, f"powered off after {self._uptime_s():.1f} s")
            case Event(kind=kind) as event if kind in RESET_KINDS:
                if not self._resetting.is_done(received.header.clock_ns):
                    self._reset(received.peer, event)
            case Event(kind="refused", text=text):
                raise MachineEnd(EXIT_INPUT, f"not restored: {text}")
            case Event(kind="device-error" | "cpu-error", text=text):
                if process is not None:
                    process.last_words = text
            case Event() as event:
                self._journal.event(_whose(received.peer, event), event)
            case StatsReply() as reply:
                self._commands.take(received.peer, reply)
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

    def _go_on(self) -> None:
        try:
            self._pausing.resume(CPU, self._processes.devices)
        except NotQuiet as e:
            self._turn(0)  # if one died, its pidfd says so
            raise MachineEnd(EXIT_DIED, str(e)) from e

    def _ask(self, node: str, frame: Frame) -> Frame:
        return self._endpoint.request(node, frame, ANSWER_NS)

    def _ask_all(self, nodes: Sequence[str], frame: Frame) -> list[Frame]:
        return self._endpoint.request_all(nodes, frame, ANSWER_NS)

    # ---- deaths --------------------------------------------------------------------------------

    def _bury(self, node: str) -> None:
        """A process has ended. What it said before may explain it; else name it."""
        if self._forkserver_died():
            self._bury_forkserver()
        if self._processes.restarts(node):
            line = self._processes.bury(node)
            self._journal.log(node, self._processes.by_node[node].log)
            self._journal.tell(line)
            return
        self._hear_last_words()
        line = self._processes.obituary(node)
        self._journal.log(node, self._processes.by_node[node].log)
        raise MachineEnd(EXIT_DIED, line)

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
            state = event.data or self._resetting.cpu_state()
            line = f"reset by {source}: {event.text}"
            raise MachineEnd(EXIT_RESET, "\n".join([line, *report.cpu_state_lines(state)]))
        if event.kind == "triple-fault" and (trace := self._processes.save_trace(f"{source}: {event.text}")):
            self._journal.tell(f"{event.kind}{trace}")
        self._journal.event(source, event)
        try:
            self._resetting.reset()
        except RuntimeError as e:
            self._turn(0)  # if one died, its pidfd says so
            raise MachineEnd(EXIT_DIED, f"the machine could not be reset: {e}") from e

    # ---- end -----------------------------------------------------------------------------------

    def _stop(self) -> None:
        """Politely: the CPU node first, so that all it has posted arrives; the devices; then the consoles.

        A guest may have ended before its console was open: then that comes first.
        """
        if self._pump is not None and self._launch.console is not None and not self._console_open:
            self._await_console(self._pump)
        self._shut_down([CPU])
        self._shut_down([node for node in self._processes.by_node if node not in (CPU, RIM)])
        self._deliver()

    def _deliver(self) -> None:
        """When all has been said, it is to be shown, by whatever process of `consoles`."""
        for _ in range(DELIVERIES):
            process = self._processes.by_node.get(RIM)
            if process is None or not process.was_ready or self._forkserver_died():
                return
            self._processes.restart(RIM)
            if not self._await_rim(process):
                return
            if process.ready and not self._shut_down([RIM]):
                return
            status = self._forkserver.wait_status(process.child, LAST_WORDS_S)
            if status == 0 or self._forkserver_died():
                return
            self._journal.tell(self._processes.bury(RIM))

    def _await_rim(self, process: Process) -> bool:
        """Until it is ready, or has ended; False: neither, or somebody has become impatient."""
        deadline_ns = time.monotonic_ns() + int(POLITE_S * SECOND_NS)
        fds = [process.child.pidfd, self._signals.descriptor]
        while not process.ready:
            left_ns = deadline_ns - time.monotonic_ns()
            readable, _ = self._endpoint.wait(max(0, left_ns), fds)
            for received in self._endpoint.receive():
                if received.peer == RIM and isinstance(received.frame, Event):
                    process.ready |= received.frame.kind == "ready"
            if process.child.pidfd in readable:
                return True
            if readable or left_ns <= 0:
                return False
        return True

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

    def _shut_down(self, nodes: list[str]) -> bool:
        """Have those that hear it end; whether all have, and nobody interrupted it."""
        by_node = self._processes.by_node
        processes = [by_node[n] for n in nodes if n in by_node]
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
                return False  # once more Ctrl-C: no politeness
            for fd in ended & alive.keys():
                del alive[fd]
        for node in alive.values():
            self._journal.tell(f"{node} has not ended in {POLITE_S:g} s, and is killed")
        return not alive

    def _destroy(self) -> None:
        """Whatever state things are in: no process, no terminal in raw mode, no open socket afterwards."""
        if self._left:
            self._leave()
            return
        self._forkserver.stop()
        self._processes.close()
        if self._pump is not None:
            self._pump.finish(self._signals.descriptor)
        self._journal.console_ended()
        self._commands.close()
        self._endpoint.close(linger_ms=0)  # there is nobody left to send to

    def _leave(self) -> None:
        """Another launcher goes on, and doesn't wait for who reads our output."""
        self._commands.close()
        self._endpoint.acknowledge()
        self._endpoint.close()
        self._processes.leave()
        self._forkserver.leave()
        if self._pump is not None:
            self._pump.leave(self._signals.descriptor)
        self._journal.console_ended()

    def _uptime_s(self) -> float:
        return (time.monotonic_ns() - self._started_ns) / SECOND_NS


def _whose(peer: str, event: Event) -> str:
    """The node that an event is about: log lines of devices come from another process."""
    return str(event.data.get("node", peer))
