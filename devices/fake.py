"""For tests: a Wiring that records, and a board of real devices in one process, with a clock set by hand.

    board = Board([Part("uart0", Uart16550, {"regs": 0x3F8}, {"intr": 4}), Part("pic", Pic8259, ...)])
    board.io.port_write(0x3F8, 1, 0x41)      # a real IoClient, batching included
    board.advance(1_000_000)                 # 1 ms: timers run at their deadlines
    board.intr, board.output["uart0"], board.events

Disks are bytearrays, and so is guest memory.
Left out: sockets and processes; back ends (output is collected, input goes in through `type_in`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bus.addressmap import AddressMap
from bus.fake import LocalLink
from bus.frames import ApicMessage, Event, Frame, Intr, Line
from bus.io import IoClient
from bus.mirror import PAGE_SIZE, MirrorWriter, page_of, slots
from devices.base import Device
from devices.disks import AsksDisks, DiskRequest, Disks
from devices.dma import GuestRam
from devices.outside import Immediately
from devices.registry import make_settings
from devices.slot import Slot

RAM_SIZE = 1 << 20


class FakeDisks(Disks):
    """Disks in memory. What is in `errors`, by disk, is what the next requests fail with."""

    def __init__(self, contents: Mapping[str, bytes]) -> None:
        super().__init__({})
        self.contents = {name: bytearray(data) for name, data in contents.items()}
        self.errors: dict[str, deque[str]] = {name: deque() for name in contents}
        self.done: list[DiskRequest] = []

    def size(self, disk: str) -> int:
        return len(self.contents[disk])

    def perform(self, request: DiskRequest, ram: GuestRam) -> str:
        self.done.append(request)
        content, at = self.contents[request.disk], request.offset
        if self.errors[request.disk] and (error := self.errors[request.disk].popleft()):
            return error
        for view in ram.views(request.segments):
            if at + len(view) > len(content):
                return f"{request.disk} ends at byte {len(content)}"
            if request.kind == "read":
                view[:] = content[at : at + len(view)]
            else:
                content[at : at + len(view)] = view
            at += len(view)
        return ""


class FakeWiring(AsksDisks):
    """Implements devices.base.Wiring for one device without a host.

    `settle` ends a step that uses DMA or disks.
    """

    def __init__(self, now_ns: int = 0, disks: Mapping[str, bytes] | None = None) -> None:
        self.ram = bytearray(RAM_SIZE)
        self.memory = GuestRam(memoryview(self.ram))
        self.disks = FakeDisks(disks or {})
        self.dma: list[tuple[int, bytes]] = []  # done at the end of the step
        self.dma_done: list[tuple[int, bytes]] = []
        self.disk_work: deque[DiskRequest] = deque()
        self.clock_ns = now_ns
        self.irq: dict[str, bool] = {}
        self.changes: list[tuple[str, bool]] = []  # every change of a line, in order
        self.marks: list[tuple[str, int]] = []
        self.sent: list[tuple[str, bytes]] = []
        self.timers: dict[str, int] = {}
        self.events: list[tuple[str, str]] = []
        self.int_pin = False
        self.apic_messages: list[ApicMessage] = []
        self.inputs: dict[int, bool] = {}  # set by the test, for line_level

    def set_irq(self, line: str, level: bool) -> None:
        if self.irq.get(line, False) != level:
            self.changes.append((line, level))
        self.irq[line] = level

    def send(self, channel: str, data: bytes) -> None:
        self.sent.append((channel, data))

    def now_ns(self) -> int:
        return self.clock_ns

    def set_timer(self, name: str, deadline_ns: int | None) -> None:
        if deadline_ns is None:
            self.timers.pop(name, None)
        else:
            self.timers[name] = deadline_ns

    def mark(self, name: str, value: int) -> None:
        self.marks.append((name, value))

    def event(self, kind: str, text: str) -> None:
        self.events.append((kind, text))

    def intr(self, level: bool) -> None:
        self.int_pin = level

    def apic_message(self, message: ApicMessage) -> None:
        self.apic_messages.append(message)

    def line_level(self, irq: int) -> bool:
        return self.inputs.get(irq, False)

    def dma_read(self, pa: int, size: int) -> bytes:
        for other, data in self.dma:
            if pa < other + len(data) and other < pa + size:
                raise AssertionError(f"{size} bytes at {pa:#x} are read in the step that writes them")
        return self.memory.read(pa, size)

    def dma_write(self, pa: int, data: bytes) -> None:
        self.memory.check(pa, len(data))
        self.dma.append((pa, bytes(data)))

    def disk_size(self, disk: str) -> int:
        return self.disks.size(disk)

    def ask_disk(self, request: DiskRequest) -> None:
        for pa, size in request.segments:
            self.memory.check(pa, size)
        self.disk_work.append(request)

    def write_memory(self) -> None:
        """The end of a step: what it wrote to guest memory is there."""
        for pa, data in self.dma:
            self.memory.write(pa, data)
        self.dma_done += self.dma
        self.dma.clear()

    def settle(self, device: Device[Any]) -> None:
        """The end of a step, and the disk I/O it asked for, each completion a step of its own."""
        self.write_memory()
        while self.disk_work:
            request = self.disk_work.popleft()
            device.disk_done(request.disk, request.tag, self.disks.perform(request, self.memory))
            self.write_memory()

    def advance(self, device: Device[Any], ns: int) -> None:
        """Let `ns` pass; timers fire at their deadlines."""
        end_ns = self.clock_ns + ns
        while self.timers and min(self.timers.values()) <= end_ns:
            name = min(self.timers, key=self.timers.__getitem__)
            self.clock_ns = max(self.clock_ns, self.timers.pop(name))
            device.timer(name)
        self.clock_ns = end_ns


@dataclass(frozen=True, slots=True)
class Part:
    """One [[device]] of a board: bases by region name, ISA IRQs by line name."""

    name: str
    cls: type[Device[Any]]
    bases: Mapping[str, int]
    irqs: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    disks: Mapping[str, bytes] = field(default_factory=dict)  # contents by name


class Board:
    """All parts wired up; `io` is the CPU's IoClient, `slots` the devices by name."""

    def __init__(
        self, parts: Sequence[Part], *, pic: str | None = None, ioapics: Sequence[str] = (), now_ns: int = 0
    ) -> None:
        self.clock_ns = now_ns
        self.intr = False
        self.apic_messages: list[ApicMessage] = []
        self.events: list[Event] = []
        self.output: dict[str, bytes] = {}
        self.open_bus: list[tuple[str, int, int, bool, int]] = []
        self.mirror = memoryview(bytearray(PAGE_SIZE * len(parts)))
        self.ram = bytearray(RAM_SIZE)
        self.disks = {part.name: FakeDisks(part.disks) for part in parts}
        self.address_map = AddressMap()
        self.slots: dict[str, Slot] = {}
        self.links: dict[str, LocalLink] = {}
        controllers = [part.name for part in parts if part.cls.CONTROLLER]
        # controllers first: a device may drive its lines as soon as it exists
        for page, part in sorted(enumerate(parts), key=lambda p: not p[1].cls.CONTROLLER):
            ranges = (*part.cls.PORTS, *part.cls.MMIO)
            self.address_map.add_device(part.name, ranges, dict(part.bases), page)
            for line, irq in part.irqs.items():
                self.address_map.add_line(part.name, line, irq)
            self.slots[part.name] = Slot(
                part.name,
                part.cls,
                make_settings(part.cls, dict(part.settings)),
                part.irqs,
                _Outside(self, part.name, controllers),
                self.now_ns,
                MirrorWriter(page_of(self.mirror, page), slots(ranges)),
                GuestRam(memoryview(self.ram)) if part.cls.DMA else None,
                self.disks[part.name],
            )
        self.io = IoClient(
            "/nonexistent",
            "cpu0",
            self.address_map,
            self.mirror,
            self.now_ns,
            lambda *access: self.open_bus.append(access),
            pic=pic,
            ioapics=ioapics,
            make_link=self._link,
        )

    def now_ns(self) -> int:
        return self.clock_ns

    def advance(self, ns: int) -> None:
        """Let `ns` pass; every device's timers fire at their deadlines, in order."""
        end_ns = self.clock_ns + ns
        while True:
            due = [(at, s) for s in self.slots.values() if (at := s.next_deadline_ns()) is not None]
            at, slot = min(due, key=lambda pair: pair[0], default=(end_ns + 1, None))
            if slot is None or at > end_ns:
                break
            self.clock_ns = max(self.clock_ns, at)
            slot.run_timers()
        self.clock_ns = end_ns

    def type_in(self, name: str, channel: str, data: bytes) -> int:
        """Input for a device, as much as it has room for; how much that was."""
        part = data[: self.slots[name].device.room(channel)]
        if part:
            self.slots[name].receive(channel, part)
        return len(part)

    def _link(self, peer: str) -> LocalLink:
        slot = self.slots[peer]

        def handle(frame: Frame) -> Frame | None:
            answer = slot.handle(frame)
            slot.run_disks()
            return answer

        self.links[peer] = LocalLink(handle, self.now_ns)
        return self.links[peer]


class _Outside(Immediately):
    """Where one part's effects go on a board."""

    def __init__(self, board: Board, name: str, controllers: Sequence[str]) -> None:
        self._board = board
        self._name = name
        self._controllers = controllers

    def to_controllers(self, frame: Line) -> None:
        for name in self._controllers:
            self._board.slots[name].handle(frame)

    def to_boot_cpu(self, frame: Intr) -> None:
        self._board.intr = frame.level

    def to_cpus(self, frame: ApicMessage) -> None:
        self._board.apic_messages.append(frame)

    def to_launcher(self, frame: Event) -> None:
        self._board.events.append(frame)

    def output(self, channel: str, data: bytes) -> None:
        self._board.output[self._name] = self._board.output.get(self._name, b"") + data
