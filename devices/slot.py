"""Slot: one device plugged into the bus; the Wiring it sees, and what each frame does to it.

No socket, clock or file here: devices/host.py runs a Slot in a process, devices/fake.py in a test.
What is done to a device comes in steps: a frame, a timer, input, the completion of disk I/O. Effects of a
step (lines, INT, APIC messages, events, bytes, the answer) are collected while the device works. Then the
step is committed (devices/outside.py): a process that ends from here on is succeeded by one that does what is
left. Then the mirror page is published and guest memory is written, then the effects are handed on in
order: who sees one sees the registers and the memory that belong to it. Then comes disk I/O (`run_disks`),
before any other step. A frame of which nothing can be seen outside may be committed with a later one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from bus.frames import (
    ApicMessage,
    Eoi,
    Event,
    Frame,
    IntAck,
    IntAckReply,
    Intr,
    Line,
    Load,
    LoadReply,
    Ping,
    Pong,
    PostedBatch,
    PostedWrite,
    Read,
    ReadReply,
    Refused,
    Reset,
    ResetReply,
    Save,
    SaveReply,
    StringIn,
    StringInReply,
    StringOut,
    StringOutReply,
    Write,
    WriteReply,
)
from bus.mirror import MirrorWriter
from bus.ranges import IoRange
from devices.base import Device, StateMismatch
from devices.disks import AsksDisks, DiskRequest, Disks
from devices.dma import GuestRam
from devices.notes import Notes
from devices.outside import InputLines, LevelEffect, OutputEffect, Outside

STRING_MAX = 1 << 20  # bytes of one string access
TIMERS_PER_TURN = 16  # a timer that is always due must not shut out the bus


class BadAccess(ValueError):
    """A frame asks for a register or a function that the device does not have."""


class Slot(AsksDisks):
    """Implements devices.base.Wiring for `device`."""

    def __init__(
        self,
        node: str,
        cls: type[Device[Any]],
        settings: Any,
        irqs: Mapping[str, int],
        outside: Outside,
        now_ns: Callable[[], int],
        mirror: MirrorWriter | None,
        ram: GuestRam | None = None,
        disks: Disks | None = None,
        saved: dict[str, Any] | None = None,
        kept: tuple[dict[str, Any], list[Any]] | None = None,
        notes: Notes | None = None,
    ) -> None:
        """`irqs`: ISA IRQ by line name; a line that isn't there leads nowhere. `ram`: for cls.DMA.

        `saved`: a state record to begin with, as of Save; nobody hears of the reset before it.
        `kept`: the last step of an earlier process, a state record and to_plain(): go on behind it, see
        finish(). Raises StateMismatch.
        """
        self.node = node
        self._notes = notes = notes or Notes()
        self._counts = notes.counts
        self.now_ns = now_ns
        self._outside = outside
        self._irqs = dict(irqs)
        self._mirror = mirror
        self._ranges: dict[str, IoRange] = {r.name: r for r in (*cls.PORTS, *cls.MMIO)}
        self._latched = {(r.name, offset) for r in self._ranges.values() for offset, _ in r.latched}
        self._done = 0  # posted operations
        self._levels: dict[str, bool] = dict.fromkeys(cls.IRQS, False)
        self._intr: bool | None = None  # None: the device has never driven an INT pin
        self._inputs = InputLines({})
        self._deadlines: dict[str, int] = {}
        self._effects: list[Callable[[], None]] = []
        self._ram = ram
        self._disks = disks
        self._dma: list[tuple[int, bytes]] = []
        self._disk_work: deque[DiskRequest] = deque()
        self._lines = frozenset(cls.IRQS)
        self.device = cls(self, settings)
        self.device.reset()
        if kept is not None:
            self._keep_on(*kept)
            return
        if saved is not None:
            self._effects.clear()
            self._load(saved)
        self._settle()

    # --- devices.base.Wiring -----------------------------------------------------------------------

    def set_irq(self, line: str, level: bool) -> None:
        if line not in self._lines:
            raise ValueError(f"{self.node} has no line {line!r}")
        level = bool(level)
        if self._levels.get(line) != level:
            self._levels[line] = level
            self._counts.interrupts += level
            irq = self._irqs.get(line)
            source = f"{self.node}.{line}"
            if irq is not None and (level or not self._take_back(source)):
                self._effects.append(LevelEffect(self._outside, Line(irq, level, source)))

    def _take_back(self, source: str) -> bool:
        """Forget that a line rose in this operation, which lowers it again: nobody has seen it high.

        A fall that is followed by a rise stays: for a controller that is an edge.
        """
        for at, effect in enumerate(self._effects):
            if isinstance(effect, LevelEffect) and effect.frame.source == source and effect.frame.level:
                del self._effects[at]
                return True
        return False

    def send(self, channel: str, data: bytes) -> None:
        last = self._effects[-1] if self._effects else None
        if isinstance(last, OutputEffect) and last.channel == channel:
            last.data += data  # the bytes of one batch leave in one piece
        else:
            self._effects.append(OutputEffect(self._outside, channel, bytearray(data)))

    def set_timer(self, name: str, deadline_ns: int | None) -> None:
        if deadline_ns is None:
            self._deadlines.pop(name, None)
        else:
            self._deadlines[name] = deadline_ns

    def event(self, kind: str, text: str) -> None:
        self._effects.append(lambda: self._outside.to_launcher(Event(kind, text)))

    def intr(self, level: bool) -> None:
        level = bool(level)
        if level != self._intr:
            self._intr = level
            self._counts.interrupts += level
            self._effects.append(lambda: self._outside.to_boot_cpu(Intr(level)))

    def apic_message(self, message: ApicMessage) -> None:
        self._counts.interrupts += 1
        self._effects.append(lambda: self._outside.to_cpus(message))

    def line_level(self, irq: int) -> bool:
        return bool(self._inputs.drivers.get(irq))

    def mark(self, name: str, value: int) -> None:
        self._notes.mark(name, value)

    def dma_read(self, pa: int, size: int) -> bytes:
        self._notes.dma(pa, size, False)
        return self._memory().read(pa, size)

    def dma_write(self, pa: int, data: bytes) -> None:
        self._memory().check(pa, len(data))
        self._notes.dma(pa, len(data), True)
        self._dma.append((pa, bytes(data)))

    def disk_size(self, disk: str) -> int:
        return self._all_disks().size(disk)

    # --- what the host calls ------------------------------------------------------------------------

    def handle(self, frame: Frame) -> Frame | None:
        """Do what a frame asks, hand on the effects, return the answer if there is one.

        The caller hands that on, then calls run_disks().
        Refused for what the device does not have or take; any other exception is the device's own.
        """
        try:
            answer = self._do(frame)
        except (BadAccess, StateMismatch) as error:
            answer = Refused(f"{self.node}: {error}")
        self._settle(answer, may_wait=True)
        return answer

    def set_aside(self, frame: Frame) -> Frame | None:
        """In place of handle(): answer as a device that has failed."""
        answer: Frame | None
        match frame:
            case Read(width=width):
                answer = ReadReply((1 << 8 * width) - 1)
            case Write():
                answer = WriteReply()
            case StringIn(width=width, count=count):
                answer = StringInReply(b"\xff" * min(width * count, STRING_MAX))
            case StringOut():
                answer = StringOutReply()
            case IntAck():
                answer = IntAckReply(None)
            case Reset():
                answer = ResetReply()
            case Save() | Load() | Ping():
                answer = Refused(f"{self.node}: set aside, its processes ended in it")
            case _:
                answer = None
        if isinstance(frame, Read | PostedBatch):
            self._done += len(frame.writes)
        self._settle(answer)
        return answer

    def receive(self, channel: str, data: bytes, position: int = 0) -> None:
        """Bytes from the host side, no more than device.room(channel); `position`: how many came before."""
        self._notes.input(channel, len(data), position)
        if self._outside.begin(channel, position):
            self.device.receive(channel, data)
        self._settle()
        self.run_disks()

    def run_disks(self) -> None:
        """Do the disk I/O that was asked for, and what its completions ask for."""
        while self._disk_work:
            request = self._disk_work[0]
            self._notes.disk(request)
            error = self._all_disks().perform(request, self._memory())
            self._disk_work.popleft()
            self._notes.over()
            self._notes.disk_done(request)
            if self._outside.begin(request.disk, request.tag):
                self.device.disk_done(request.disk, request.tag, error)
            self._settle()

    def to_plain(self) -> list[Any]:
        """What is committed besides the device's state: wires, timers, and what is left of the step to be
        done."""
        return [
            self._levels, self._intr, self._inputs.drivers, self._deadlines, self._done, self._dma,
            list(self._disk_work), self._notes.trace,
        ]  # fmt: skip

    def finish(self, dma_done: int) -> None:
        """Do what an earlier process left of its last step; so many DMA writes it had done."""
        self._publish()
        self._write_dma(dma_done)
        self.run_disks()

    def next_deadline_ns(self) -> int | None:
        return min(self._deadlines.values(), default=None)

    def run_timers(self) -> None:
        """Call the timers whose deadlines have come, earliest first, TIMERS_PER_TURN at most."""
        for _ in range(TIMERS_PER_TURN):
            if not self._deadlines:
                return
            name = min(self._deadlines, key=self._deadlines.__getitem__)
            if self._deadlines[name] > self.now_ns():
                return
            deadline_ns = self._deadlines.pop(name)
            self._notes.timer(name, deadline_ns)
            if self._outside.begin(name, deadline_ns):
                self.device.timer(name)
            self._settle()
            self.run_disks()

    # --- inside -------------------------------------------------------------------------------------

    def _do(self, frame: Frame) -> Frame | None:
        device = self.device
        match frame:
            case Read(region, offset, width, writes):
                self._check(region, offset, width)
                if writes:
                    self._write_all(writes)
                return ReadReply(self._read(region, offset, width))
            case PostedBatch(writes):
                self._write_all(writes)
                return None
            case Write(region, offset, width, value):
                self._check(region, offset, width, value)
                self._counts.writes += 1
                device.write(region, offset, width, value)
                return WriteReply()
            case StringIn(region, offset, width, count):
                self._check(region, offset, width)
                if count * width > STRING_MAX:
                    raise BadAccess(f"a string of {count} * {width} bytes is too long")
                values = (self._read(region, offset, width) for _ in range(count))
                return StringInReply(b"".join(value.to_bytes(width, "little") for value in values))
            case StringOut(region, offset, width, data):
                self._check(region, offset, width)
                if len(data) % width:
                    raise BadAccess(f"{len(data)} bytes are no string of {width}-byte values")
                for at in range(0, len(data), width):
                    value = int.from_bytes(data[at : at + width], "little")
                    device.write(region, offset, width, value)
                self._counts.writes += len(data) // width
                return StringOutReply()
            case Line():
                self._need_controller()
                level = self._inputs.change(frame)
                if level is not None:
                    device.line_in(frame.irq, level)
                return None
            case IntAck():
                self._need_controller()
                return IntAckReply(device.int_ack() if self._intr else None)
            case Eoi(vector):
                self._need_controller()
                device.eoi(vector)
                return None
            case _:
                return self._control(frame)

    def _control(self, frame: Frame) -> Frame | None:
        match frame:
            case Ping():
                return Pong()
            case Reset():
                self.device.reset()
                return ResetReply()
            case Save():
                return SaveReply({"device": self.device.save(), "inputs": self._inputs.to_plain()})
            case Load(state):
                self._load(state)
                return LoadReply()
            case _:
                raise BadAccess(f"a device has no use for {type(frame).__name__}")

    def _load(self, state: dict[str, Any]) -> None:
        if set(state) != {"device", "inputs"}:
            raise StateMismatch(f"not a saved device: {sorted(state)}")
        try:
            inputs = InputLines.from_plain(state["inputs"])
        except (TypeError, ValueError) as error:
            raise StateMismatch(f"input lines {state['inputs']!r}: {error}") from error
        before = self._inputs, self._levels, self._intr
        self._inputs, self._levels, self._intr = inputs, {}, None  # so that all is said again
        self._deadlines.clear()
        try:
            self.device.load(state["device"])
        except StateMismatch:
            self._inputs, self._levels, self._intr = before
            self.device.drive_lines()
            raise

    def _keep_on(self, record: dict[str, Any], plain: list[Any]) -> None:
        levels, intr, inputs, deadlines, done, dma, work, self._notes.trace = plain
        self._levels, self._intr, self._done = levels, intr, done
        self._inputs = InputLines.from_plain(inputs.items())
        self._deadlines = deadlines
        self._effects.clear()
        self.device.load(record)  # says nothing of a line that is as it was
        self._dma = [(pa, data) for pa, data in dma]
        self._disk_work = deque(
            DiskRequest(disk, tag, kind, offset, tuple((pa, size) for pa, size in segments))
            for disk, tag, kind, offset, segments in work
        )

    def _settle(self, answer: Frame | None = None, may_wait: bool = False) -> None:
        """End a step. `may_wait`: it may be committed with a later one, if nothing of it can be seen."""
        effects, self._effects = self._effects, []
        if (may_wait and answer is None and not (effects or self._dma or self._disk_work)
                and self._is_published() and self._outside.put_off()):  # fmt: skip
            self._notes.over()
            return
        self._outside.commit(self, effects, answer)
        self._publish()
        if self._dma:
            self._write_dma(0)
        self._outside.perform()
        self._notes.over()

    def _publish(self) -> None:
        if self._mirror is not None:
            self._mirror.publish(self.device.mirror(), self._done)

    def _is_published(self) -> bool:
        return self._mirror is None or self._mirror.shows(self.device.mirror(), self._done)

    def _write_dma(self, done: int) -> None:
        writes, self._dma = self._dma, []
        for count, (pa, data) in enumerate(writes[done:], done + 1):
            self._memory().write(pa, data)
            self._outside.dma_written(count)

    def ask_disk(self, request: DiskRequest) -> None:
        self._all_disks().size(request.disk)  # KeyError: there is no such disk
        for pa, size in request.segments:
            self._memory().check(pa, size)
        self._disk_work.append(request)

    def _memory(self) -> GuestRam:
        if self._ram is None:
            raise ValueError(f"{self.node} declares no DMA")
        return self._ram

    def _all_disks(self) -> Disks:
        if self._disks is None:
            raise ValueError(f"{self.node} declares no disks")
        return self._disks

    def _write_all(self, writes: tuple[PostedWrite, ...]) -> None:
        """All of them, or none if one is refused. A width of 0: it is what was read from a Latch."""
        self._done += len(writes)
        for region, offset, width, value in writes:
            if width:
                self._check(region, offset, width, value)
            elif (region, offset) not in self._latched or value > 0xFF:
                raise BadAccess(f"nobody can have read {value:#x} from the mirror of {region!r}+{offset}")
        write = self.device.write
        self._counts.writes += len(writes)
        for region, offset, width, value in writes:
            if width:
                write(region, offset, width, value)
            else:
                self.device.seen(region, offset, value)

    def _read(self, region: str, offset: int, width: int) -> int:
        self._counts.reads += 1
        value = self.device.read(region, offset, width)
        if value >> 8 * width:
            raise ValueError(f"{self.node}: read of {region}+{offset:#x} gave {value:#x} for {width} bytes")
        return value

    def _check(self, region: str, offset: int, width: int, value: int = 0) -> None:
        r = self._ranges.get(region)
        if r is None:
            raise BadAccess(f"no region {region!r}")
        if not r.accepts(offset, width):
            raise BadAccess(f"region {region!r} takes no {width}-byte access at offset {offset}")
        if value >> 8 * width:
            raise BadAccess(f"value {value:#x} does not fit into {width} bytes")

    def _need_controller(self) -> None:
        if not self.device.CONTROLLER:
            raise BadAccess("not an interrupt controller")
