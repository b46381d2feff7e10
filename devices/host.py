"""The process of one device: one loop around one Slot.

Each thing that it does to the device is a step (devices/slot.py), committed to the device's journal before
anything of it can be seen outside; a new process of the device goes on behind the last one.
A turn: wait for a frame, a descriptor of a back end, a signal or the earliest timer; run what is due. Frames
are answered in order of arrival, one sender's frames in the order in which it sent them.
The loop ends after Shutdown or SIGTERM: what has arrived is still handled, consoles are flushed, exit 0.
After Pause no timer runs and no input is taken, until Continue; frames are answered as ever.
A device that raises is broken: the launcher gets an Event "device-error" with one line, exit 1. The frame in
which too many processes ended is set aside: answered as by a failed device, with an Event "set-aside".
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import msgspec

from bus.clock import MachineClock
from bus.control import Control
from bus.endpoint import LINGER_MS, Received
from bus.frames import (
    ApicMessage,
    Continue,
    ContinueReply,
    Event,
    Frame,
    Intr,
    Line,
    Pause,
    PauseReply,
    Refused,
    Shutdown,
    Stats,
    StatsReply,
)
from bus.grants import GrantRefused
from bus.link import BadRunDir, console_path
from bus.recorder import attached as recorder_of
from devices.backends import BackEnd, ConsoleBackEnd, LogBackEnd, NullBackEnd, RingBackEnd
from devices.base import StateMismatch
from devices.disks import BadDisk, Disks
from devices.host_config import HostConfig
from devices.journal import BadJournal, Record
from devices.notes import Notes
from devices.prepared import Prepared
from devices.registry import BadDeviceType, BadSettings, is_built_in, load_class, make_settings
from devices.slot import Slot

DRAIN_S = 2.0  # a sender that never stops must not keep us
FLUSH_S = 5.0  # how long an attached console may take for the last bytes
PUT_OFF_MOST = 16  # steps that are committed with a later one; fewer than a sender waits for an Ack
RETIRED = -1  # in place of an exit status: another process takes over

log = logging.getLogger(__name__)


class Host:
    """One device on the bus. Also the Outside of its Slot."""

    def __init__(self, config: HostConfig, prepared: Prepared, control: Control | None = None) -> None:
        self._config = config
        self._control = control
        self._retiring = False
        cls = prepared.cls
        self._endpoint = prepared.take_endpoint()
        self._endpoint.bind(config.fds.get("listen"))  # first: ZeroMQ's thread meets the others meanwhile
        for peer in config.peers():
            self._endpoint.connect(peer)
        self._disks = Disks.open(cls, prepared.settings, config.overlays)
        self._journal = prepared.journal
        record = self._journal.latest() if self._journal is not None else None
        if record is not None:
            self._endpoint.load(record.streams)
        self._cpu_io = f"{config.cpus[0]}.io" if config.cpus else ""
        self._endpoint.recorder = recorder = recorder_of(config.fds, config.node)
        self._notes = Notes(recorder)
        self._asking: Received | None = None  # whose frame the step is about
        self._news: list[Event] = []  # for the launcher, with the next step
        self._put_off = 0  # steps that are done and not committed
        self._outputs: list[tuple[str, bytes]] = []  # of the step
        self._put_out = dict(record.outputs) if record is not None else {}
        self._taken_in = dict(record.inputs) if record is not None else {}
        for channel in cls.CHANNELS if record is not None else ():
            self._put_out.setdefault(channel.sends, 0)
            self._taken_in.setdefault(channel.sends, 0)
        self._stopping = False
        self._turns = 0
        self._channels = cls.CHANNELS
        self._backends: dict[str, BackEnd] = {
            c.sends: self._back_end(prepared, getattr(prepared.settings, c.setting), c.sends)
            for c in cls.CHANNELS
        }
        if record is not None:  # put out again what may not have been
            self._outputs = [o for o in record.output if isinstance(self._backends.get(o[0]), RingBackEnd)]
        clock = (config.clock_offset_ns, config.clock_stopped_ns) if record is None else record.clock
        self._clock = MachineClock(*clock)
        try:
            self._slot = self._make_slot(prepared, record)
        except StateMismatch as error:
            if record is None:  # a restored machine ends; one that runs goes on, and this is tried again
                self.to_launcher(Event("refused", f"{config.node}: {error}"))
                self._endpoint.close()
            raise
        if self._journal is not None and record is not None:
            self._notes.resume()
            self._slot.finish(self._journal.dma_done())
            self._notes.resumed()
        self._wake, self._wake_signal = socket.socketpair()
        self._wake.setblocking(False)
        self._wake_signal.setblocking(False)

    def _make_slot(self, prepared: Prepared, record: Record | None) -> Slot:
        config = self._config
        return Slot(
            config.node,
            prepared.cls,
            prepared.settings,
            config.irqs,
            self,
            self._clock,
            prepared.mirror_writer(),
            prepared.ram,
            self._disks,
            config.state if record is None else None,
            None if record is None else (record.device(), record.slot),
            self._notes,
        )

    def stop(self) -> None:
        """End the loop soon; may be called from a signal handler."""
        self._stopping = True
        with contextlib.suppress(BlockingIOError):
            self._wake_signal.send(b"\0")

    def run(self) -> int:
        """The loop; returns the exit status."""
        failed = False
        try:
            self._tell_launcher(Event("ready", self._config.node))
            self._end_step(None)
            while not self._stopping:
                self._turn()
                if self._retiring:
                    return RETIRED
            deadline = time.monotonic() + DRAIN_S
            while self._handle_frames() and time.monotonic() < deadline:  # what came before the end counts
                pass
            return 0
        except Exception as error:
            text = f"{self._config.node}: {type(error).__name__}: {' '.join(str(error).split())}"
            log.error("%s\n%s", text, traceback.format_exc())
            self._news.clear()
            failed = True
            self._say_last(Event("device-error", text, {"traceback": traceback.format_exc()}))
            return 1
        finally:
            for back_end in self._backends.values():
                back_end.close(FLUSH_S)
            if failed:
                for frame in self._news:  # a back end's last words; the step is not to be committed
                    self._say_last(frame)
            elif self._news or self._put_off:
                self._end_step(None)
            if self._retiring:
                self._endpoint.leave()
            else:
                self._endpoint.close(LINGER_MS if self._stopping or self._journal is None else 0)
            self._disks.close()

    def let_go(self) -> None:
        """After run() has returned RETIRED, if this process is to go on: what takes its time."""
        self._endpoint.close(0)

    # --- devices.outside.Outside --------------------------------------------------------------------

    def to_controllers(self, frame: Line) -> None:
        for peer in self._config.controllers:
            self._endpoint.send(peer, frame, self._notes.trace)

    def to_boot_cpu(self, frame: Intr) -> None:
        if self._config.cpus:
            self._endpoint.send(self._config.cpus[0], frame, self._notes.trace)

    def to_cpus(self, frame: ApicMessage) -> None:
        for peer in self._config.cpus:
            self._endpoint.send(peer, frame, self._notes.trace)

    def to_launcher(self, frame: Event) -> None:
        self._endpoint.send(self._config.launcher, frame, self._notes.trace)

    def output(self, channel: str, data: bytes) -> None:
        self._outputs.append((channel, data))

    def begin(self, source: str, number: int) -> bool:
        if self._journal is None:
            return True
        begun = self._journal.begin(source, number)
        if begun <= self._config.set_aside_after:
            return True
        what = _in_words(self._asking) if self._asking is not None else f"{source} {number}"
        ends = f"{begun - 1} processes of {self._config.node} ended in it"
        self._tell_launcher(Event("set-aside", f"{what} is set aside: {ends}"))
        return False

    def commit(self, slot: Slot, effects: Sequence[Callable[[], None]], answer: Frame | None) -> None:
        self._endpoint.hold()
        news, self._news = self._news, []
        for frame in news:
            self._endpoint.send(self._config.launcher, frame, self._notes.trace)
        for effect in effects:
            effect()
        if answer is not None and self._asking is not None:
            self._endpoint.reply(self._asking, answer)
        if self._journal is not None:
            self._put_off = 0
            state = slot.device.state
            clock = self._clock.offset_ns, self._clock.stopped_ns
            self._journal.commit((
                type(state).__name__, state.VERSION, state, slot.to_plain(), self._endpoint.to_plain(),
                self._put_out, self._outputs, self._taken_in, clock,
            ))  # fmt: skip

    def put_off(self) -> bool:
        if self._journal is None or self._asking is None or self._news or self._put_off >= PUT_OFF_MOST:
            return False
        self._put_off += 1
        self._endpoint.put_off(self._asking)
        self._journal.put_off()
        return True

    def dma_written(self, count: int) -> None:
        if self._journal is not None:
            self._journal.dma_written(count)

    def perform(self) -> None:
        outputs, self._outputs = self._outputs, []
        for channel, data in outputs:
            position = self._put_out.get(channel, 0)
            self._notes.output(channel, len(data), position)  # first: `consoles` may be faster than we
            self._backends[channel].write(data)
            self._put_out[channel] = position + len(data)
        self._endpoint.release()

    # --- inside -------------------------------------------------------------------------------------

    def _turn(self) -> None:
        self._turns += 1
        back_ends = self._backends.values()
        control = self._control
        own_fds = [self._wake.fileno()] if control is None else [self._wake.fileno(), control.fileno()]
        read_fds = [*own_fds, *(fd for b in back_ends for fd in b.read_fds())]
        write_fds = [fd for b in back_ends for fd in b.write_fds()]
        readable, writable = self._endpoint.wait(self._timeout_ns(), read_fds, write_fds)
        if self._wake.fileno() in readable:
            self._wake.recv(64)
        if control is not None and control.fileno() in readable and control.told_to_retire():
            self._retiring = True  # the last step has ended, and what comes now is another's
            return
        self._asking = None
        self._notes.look()
        self._notes.trace = next(self._endpoint.ids)  # what timers cause begins a trace
        if self._clock.stopped_ns is None:
            self._slot.run_timers()
        self._handle_frames()
        if control is not None and control.wants_to_know and self._cpu_io in self._endpoint.connections:
            control.connected(self._endpoint.connections[self._cpu_io])
        if readable or writable:
            for back_end in back_ends:
                back_end.ready(readable, writable)
        if self._news:
            self._end_step(None)
        self._notes.trace = next(self._endpoint.ids)  # and so does what the host side causes
        self._feed()

    def _timeout_ns(self) -> int | None:
        deadline_ns = self._slot.next_deadline_ns()
        if deadline_ns is None or self._clock.stopped_ns is not None:
            return None
        return max(0, deadline_ns - self._clock())

    def _handle_frames(self) -> bool:
        """Handle what has arrived; whether that was anything."""
        some = False
        for received in self._endpoint.receive():
            some = True
            self._handle(received)
        return some

    def _handle(self, received: Received) -> None:
        frame = received.frame
        self._asking = received
        if not received.asked:  # an answer: all we send is one-way, so something was refused
            log.warning("%s answered %s", received.peer, frame)
            self._end_step(None)
            return
        answer: Frame | None = None
        if isinstance(frame, Shutdown):
            self._stopping = True
            return
        match frame:
            case Stats():
                mine = {"cpu_ns": time.process_time_ns(), "turns": self._turns}
                counts = msgspec.structs.asdict(self._notes.counts)
                answer = StatsReply({**self._endpoint.stats(), **mine, **counts})
            case Pause():
                answer = PauseReply(self._clock.stop(), self._endpoint.positions())
            case Continue(clock_ns=clock_ns, host_ns=host_ns):
                self._clock.go_on(clock_ns - host_ns)
                answer = ContinueReply()
            case _:
                self._notes.trace = received.header.trace
                if self.begin(received.peer, received.header.seq):
                    answer = self._slot.handle(frame)
                else:
                    answer = self._slot.set_aside(frame)
                self._asking = None
                self._slot.run_disks()
        if self._asking is not None:
            self._end_step(answer)
        if isinstance(answer, Refused):
            log.warning("refused %s from %s: %s", frame, received.peer, answer.reason)

    def _feed(self) -> None:
        """Give the device as much input as it has room for; while the machine is paused it takes none."""
        if self._clock.stopped_ns is not None:
            return
        for channel in self._channels:
            if channel.receives:
                data = self._backends[channel.sends].take(self._slot.device.room(channel.receives))
                if data:
                    position = self._taken_in.get(channel.sends, 0)
                    self._taken_in[channel.sends] = position + len(data)
                    self._slot.receive(channel.receives, data, position)

    def _end_step(self, answer: Frame | None) -> None:
        """Of a step that is not the device's."""
        self.commit(self._slot, (), answer)
        self.perform()
        self._asking = None

    def _tell_launcher(self, frame: Event) -> None:
        """With the end of this step, or of the next."""
        self._news.append(frame)

    def _say_last(self, frame: Event) -> None:
        """In the middle of a step, which shall not count."""
        launcher = self._config.launcher
        self._endpoint.hold()  # drops what a step that failed in its commit has numbered
        self._endpoint.send(launcher, frame, self._notes.trace)
        if self._journal is not None:
            self._journal.amend(launcher, self._endpoint.to_plain()[1][launcher])
        self._endpoint.release()

    def _back_end(self, prepared: Prepared, kind: str, channel: str) -> BackEnd:
        fds = self._config.fds
        match kind:
            case "console" | "log" | "null" if (rings := prepared.rings.get(channel)) is not None:
                positions = self._put_out.get(channel), self._taken_in.get(channel)
                return RingBackEnd(rings, fds["wake_rim"], fds["wake_device"], *positions)
            case "console":
                return ConsoleBackEnd(console_path(self._config.run_dir, self._config.node))
            case "log":
                return LogBackEnd(lambda text: self._tell_launcher(Event("log", text)))
            case "null":
                return NullBackEnd()
            case _:
                raise ValueError(f"{self._config.node}: no back end {kind!r}: use console, log or null")


def _in_words(received: Received) -> str:
    """A frame in a few words."""
    return f"{received.frame!r:.120} from {received.peer}"


def before_fork(config: dict[str, Any]) -> None:
    """In the fork server: make what all processes of such devices have in common. A device from a file is
    left to its process, which reads it as it is then."""
    parsed = msgspec.convert(config, HostConfig)  # makes what msgspec wants to know of the type
    if is_built_in(parsed.type):
        make_settings(load_class(parsed.type), parsed.settings)


def run(config: dict[str, Any]) -> None:
    """Entry point of a device process; ends with SystemExit(0), or 1 when the device failed or can't start.

    `config` has the fields of HostConfig; what is wrong with it is one line in the log.
    """
    parsed = msgspec.convert(config, HostConfig)
    logging.basicConfig(level=parsed.log_level.upper(), format=f"{parsed.node}: %(levelname)s: %(message)s")
    control = Control(parsed.fds["control"], parsed.fds.get("baton")) if "control" in parsed.fds else None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at the terminal is the launcher's to handle
    try:
        prepared = Prepared(parsed)
        if parsed.standby and control is not None:
            prepared.rehearse()
            control.stand_by()
        status, told = RETIRED, False
        while status == RETIRED:
            host = Host(parsed, prepared, control)
            signal.signal(signal.SIGTERM, partial(_stop, host))
            if parsed.standby and control is not None and not told:
                control.live()  # once: not when it resumes because a later one has failed
                told = True
            elif control is not None and not parsed.standby:
                control.wants_to_know = not told
                told = True
            status = host.run()
            if status == RETIRED:
                assert control is not None
                control.retired()
                cores = os.sched_getaffinity(0)
                _run_on(range(os.cpu_count() or 1))  # to end takes milliseconds, which the CPU's core hasn't
                control.wait_to_resume()
                _run_on(cores)
                host.let_go()
    except (BadDeviceType, BadDisk, BadSettings, BadRunDir, GrantRefused, BadJournal, StateMismatch) as error:
        log.error("%s", error)
        if control is not None:
            control.refuse(str(error))
        raise SystemExit(1) from error
    except Exception as error:
        if control is not None and parsed.standby:
            control.refuse(f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise
    raise SystemExit(status)


def _run_on(cores: Iterable[int]) -> None:
    """Have all threads of this process run there."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended
            os.sched_setaffinity(int(thread), cores)


def _stop(host: Host, number: int, stack: object) -> None:
    host.stop()
