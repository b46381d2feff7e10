"""Small devices that together use everything a device can use; also loaded as a device file by path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from devices.base import ApicMessage, Channel, Device, DeviceState, Disk, MirrorValue, MmioRange, PortRange


@dataclass(frozen=True, slots=True)
class GadgetSettings:
    backend: Literal["console", "log", "null"] = "null"
    depth: int = 4


@dataclass(slots=True)
class GadgetState(DeviceState):
    line: bool = False
    due_ns: int = 0
    ticks: int = 0
    scratch: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    queue: bytes = b""


class Gadget(Device[GadgetState]):
    """0 line level, 1 output byte, 2 input queue (read: next byte), 3 queue length (mirrored), 4 timer in ms,
    5 ticks, 6 raises an exception, 7 event, 8-11 scratch (posted, mirrored)."""

    NAME = "gadget"
    PORTS = (
        PortRange(
            "regs",
            12,
            widths=(1, 2, 4),
            posted=frozenset({1, 8, 9, 10, 11}),
            mirrored=frozenset({3, 8, 9, 10, 11}),
        ),
    )
    MMIO = (MmioRange("window", 16, widths=(4,)),)
    IRQS = ("line",)
    CHANNELS = (Channel("out", "in"),)
    SETTINGS = GadgetSettings
    STATE = GadgetState

    def reset(self) -> None:
        self.state = GadgetState()
        self.drive_lines()

    def read(self, region: str, offset: int, width: int) -> int:
        s = self.state
        if region == "window":
            return 0x1234_0000 + offset
        match offset:
            case 0:
                return int(s.line)
            case 2:
                value, s.queue = (s.queue[0], s.queue[1:]) if s.queue else (0, b"")
                return value
            case 3:
                return len(s.queue)
            case 5:
                return s.ticks
            case 6:
                raise RuntimeError("broken\ngadget")
            case _:
                return int.from_bytes(bytes(s.scratch[offset - 8 : offset - 8 + width]), "little")

    def write(self, region: str, offset: int, width: int, value: int) -> None:
        s = self.state
        match offset:
            case 0:
                s.line = bool(value)
            case 1:
                self.wiring.send("out", bytes([value & 0xFF]))
            case 4:
                s.due_ns = self.wiring.now_ns() + value * 1_000_000 if value else 0
            case 7:
                self.wiring.event("log", f"event {value}")
            case _ if offset >= 8:
                s.scratch[offset - 8 : offset - 8 + width] = value.to_bytes(width, "little")
        self.drive_lines()

    def room(self, channel: str) -> int:
        depth: int = self.settings.depth
        return depth - len(self.state.queue)

    def receive(self, channel: str, data: bytes) -> None:
        self.state.queue += data
        self.state.line = True
        self.drive_lines()

    def timer(self, name: str) -> None:
        self.state.ticks += 1
        self.state.due_ns = 0
        self.state.line = True
        self.drive_lines()

    def drive_lines(self) -> None:
        self.wiring.set_irq("line", self.state.line)
        self.wiring.set_timer("due", self.state.due_ns or None)

    def mirror(self) -> Mapping[tuple[str, int], MirrorValue]:
        values: dict[tuple[str, int], MirrorValue] = {("regs", 3): len(self.state.queue)}
        values |= {("regs", 8 + i): byte for i, byte in enumerate(self.state.scratch)}
        return values


@dataclass(slots=True)
class HubState(DeviceState):
    levels: list[int] = field(default_factory=lambda: [0] * 16)
    seen: list[list[int]] = field(default_factory=list)


class Hub(Device[HubState]):
    """A controller: INT is the OR of its lines; one vector per line; an Eoi becomes an APIC message."""

    NAME = "hub"
    PORTS = (PortRange("regs", 16),)
    CONTROLLER = True
    STATE = HubState

    def reset(self) -> None:
        levels = self.state.levels if hasattr(self, "state") else [0] * 16
        self.state = HubState(levels=levels)
        self.drive_lines()

    def read(self, region: str, offset: int, width: int) -> int:
        return self.state.levels[offset]

    def write(self, region: str, offset: int, width: int, value: int) -> None:
        raise AssertionError("read-only")

    def line_in(self, irq: int, level: bool) -> None:
        assert self.wiring.line_level(irq) == level
        self.state.levels[irq] = int(level)
        self.state.seen.append([irq, int(level)])
        self.drive_lines()

    def int_ack(self) -> int:
        return 0x20 + self.state.levels.index(1)

    def eoi(self, vector: int) -> None:
        self.wiring.apic_message(ApicMessage(vector, 0, 0xFF, 0, True, True))

    def drive_lines(self) -> None:
        self.wiring.intr(any(self.state.levels))


@dataclass(frozen=True, slots=True)
class CopierSettings:
    file: str
    read_only: bool = False


@dataclass(slots=True)
class CopierState(DeviceState):
    done: list[str] = field(default_factory=list)
    line: bool = False


class Copier(Device[CopierState]):
    """Register 0: 1 reads sector 1 of the disk to 0x1000 and 0x3000, 2 writes it from there, 3 flushes,
    4 asks for all three, 5 adds 1 to the byte at 0x2000, 6 asks for memory that is not there, 7 reads behind
    the end; a completion is noted, marked at 0x2001 + tag, and raises the line."""

    NAME = "copier"
    PORTS = (PortRange("regs", 1),)
    IRQS = ("line",)
    SETTINGS = CopierSettings
    DMA = True
    DISKS = (Disk("disk"),)
    STATE = CopierState

    SEGMENTS = ((0x1000, 100), (0x3000, 412))

    def reset(self) -> None:
        self.state = CopierState()
        self.drive_lines()

    def read(self, region: str, offset: int, width: int) -> int:
        return len(self.state.done)

    def write(self, region: str, offset: int, width: int, value: int) -> None:
        wiring = self.wiring
        if value in (1, 4):
            wiring.disk_read("disk", 1, 512, self.SEGMENTS)
        if value in (2, 4):
            wiring.disk_write("disk", 2, 512, self.SEGMENTS)
        if value in (3, 4):
            wiring.disk_flush("disk", 3)
        if value == 5:
            wiring.dma_write(0x2000, bytes([wiring.dma_read(0x2000, 1)[0] + 1]))
            self.state.line = True
        if value == 6:
            wiring.disk_read("disk", 9, 0, ((1 << 31, 512),))
        if value == 7:
            wiring.disk_read("disk", 4, wiring.disk_size("disk") - 256, ((0x1000, 512),))
        self.drive_lines()

    def disk_done(self, disk: str, tag: int, error: str) -> None:
        self.state.done.append(f"{tag}:{error}")
        self.state.line = True
        self.wiring.dma_write(0x2001 + tag, b"\1")
        self.drive_lines()

    def drive_lines(self) -> None:
        self.wiring.set_irq("line", self.state.line)
