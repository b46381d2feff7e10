"""Traces of any size, from a seed: rings written by Recorders as a guest's work would have them written.

The mix is that of a boot of Linux that prints and reads its disk: three of four records are accesses. Frames
are real ones (bus/codec.py); times are those of a machine of which each record takes some microseconds.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

from bus import recorder
from bus.addressmap import AddressMap
from bus.codec import encode
from bus.frames import ApicMessage, Frame, Line, PostedBatch, Read, ReadReply, Write, WriteReply
from bus.ranges import MmioRange, PortRange
from bus.recorder import (
    ACCEPTED,
    ASK,
    BATCH,
    DISK,
    DISK_DONE,
    EOI,
    MARK,
    MMIO,
    OUTPUT,
    POSTED,
    RIM_OUT,
    TIMER,
    VECTOR,
    WRITE,
    Recorder,
)
from tracing.drain import Drain
from tracing.file import Writer
from tracing.meta import meta_of
from tracing.rings import Ring

RINGS = ("uart0", "disk0", "ioapic", "pit", "cpu0", "cpu0.io", "consoles")
BLOCKS = 64
COM1, DISK_BASE = 0x3F8, 0xFEB0_0000
NOTIFY, STATUS, ACK = 0x50, 0x60, 0x64  # registers of virtio-mmio
UART_IRQ, DISK_IRQ, TIMER_IRQ, OWN_TIMER = 4, 10, 0, 0xEC
UART = PortRange(
    "regs", length=8, posted=frozenset({0, 1}), mirrored=frozenset({5}),
    names={0: "RBR|THR", 1: "IER", 2: "IIR|FCR", 5: "LSR"},
)  # fmt: skip
DISK_REGS = MmioRange(
    "regs", length=0x100, widths=(4,), posted=frozenset({NOTIFY}),
    names={NOTIFY: "QueueNotify", STATUS: "InterruptStatus", ACK: "InterruptACK"},
)  # fmt: skip
DRAIN_EVERY = 2000  # records; the rings are far from full by then


class Cpu:
    cr3 = 0x1000


class Place:
    at = 0xC010_0000
    cpu = Cpu()


class Clock:
    """Moves with each look at it."""

    def __init__(self, random: random.Random) -> None:
        self._random = random
        self.now_ns = 1_000_000_000

    def tick(self) -> int:
        self.now_ns += self._random.randrange(1000, 8000)
        return self.now_ns


class Guest:
    """Does one piece of work after another, and counts the records."""

    def __init__(self, seed: int, random: random.Random, clock: Clock, rings: dict[str, Recorder]) -> None:
        self._random = random
        self._clock = clock
        self._rings = rings
        self._io = rings["cpu0.io"]
        self._id = seed << 40
        self._seq = 0
        self._place = Place()
        self._printed = 0
        self.records = len(rings)

    def work(self) -> None:
        self._place.at = 0xC010_0000 + self._random.randrange(400) * 5
        self._place.cpu.cr3 = 0x1000 * self._random.randrange(1, 9)
        choice = self._random.random()
        if choice < 0.55:
            self.print()
        elif choice < 0.85:
            self.io()
        else:
            self.timers()

    def print(self) -> None:
        """A line: each byte polled for and posted; two batches."""
        writes = []
        for _ in range(self._random.randrange(20, 44)):
            self._access(1, COM1 + 5, 0x60)
            value = self._random.randrange(32, 127)
            self._access(1 | WRITE | POSTED, COM1, value)
            writes.append(("regs", 0, 1, value))
        for part in (writes[:20], writes[20:]):
            if part:
                span = self._batch("uart0", len(part))
                self._step("uart0", "cpu0.io", PostedBatch(tuple(part)), span, span)
                self._long("uart0", OUTPUT, len(part), "tx", self._printed)
                self._printed += len(part)
                self._long("consoles", RIM_OUT, len(part), "uart0:tx", self._printed - len(part))
        self._interrupt(UART_IRQ, 0x24, span, "uart0.intr")
        self._read("uart0", COM1 + 2, 2, 1, 0)
        self._end(0x24)

    def io(self) -> None:
        """A request of the disk, its interrupt and what the driver does then."""
        self._access(4 | WRITE | MMIO | POSTED, DISK_BASE + NOTIFY, 0)
        span = self._batch("disk0", 1)
        self._step("disk0", "cpu0.io", PostedBatch((("regs", NOTIFY, 4, 0),)), span, span)
        ring, random = self._rings["disk0"], self._random
        self._long("disk0", MARK, 0, "queue", 0)
        ring.dma([(random.randrange(1 << 28) & ~15, 16, False) for _ in range(3)])
        size, write = 4096 * random.randrange(1, 9), random.randrange(2)
        done = ring.step(DISK, size, "disk", span, random.randrange(1 << 20) << 11 | write)
        self._clock.now_ns += random.randrange(100_000)
        ring.done(done)
        done = ring.step(DISK_DONE, random.randrange(64), "disk", span, 0)
        ring.dma([(random.randrange(1 << 28) & ~4095, 4096, not write) for _ in range(size // 4096)])
        ring.done(done)
        self.records += 4
        self._interrupt(DISK_IRQ, 0x25, span, "disk0.intr")
        self._read("disk0", DISK_BASE + STATUS, STATUS, 4, MMIO)
        self._access(4 | WRITE | MMIO, DISK_BASE + ACK, 1)
        span = self._ask("disk0")
        self._step("disk0", "cpu0.io", Write("regs", ACK, 4, 1), span, span)
        self._line("ioapic", DISK_IRQ, False, span, "disk0.intr")
        self._answer("disk0", WriteReply(), span)
        self._end(0x25)

    def timers(self) -> None:
        self._io.short(VECTOR, OWN_TIMER, self._place.at)
        self._end(OWN_TIMER)
        self.records += 1
        trace = self._new()
        done = self._rings["pit"].step(TIMER, 0, "out0", trace, self._clock.now_ns)
        self._rings["pit"].done(done)
        self.records += 1
        self._interrupt(TIMER_IRQ, 0x30, trace, "pit.out0")
        self._end(0x30)
        self._line("ioapic", TIMER_IRQ, False, trace, "pit.out0")

    # --- records

    def _new(self) -> int:
        self._id += 0x100
        return self._id

    def _access(self, flags: int, address: int, value: int) -> None:
        self._io.access(flags, self._place, address, value)
        self.records += 1

    def _long(self, node: str, kind: int, number: int, name: str, *words: int) -> None:
        self._rings[node].long(kind, number, name, self._clock.tick(), *words)
        self.records += 1

    def _batch(self, node: str, number: int) -> int:
        span = self._new()
        self._long("cpu0.io", BATCH, number, node, span)
        return span

    def _ask(self, node: str) -> int:
        span = self._new()
        self._long("cpu0.io", ASK, self._place.at, node, span)
        return span

    def _frame(self, node: str, peer: str, frame: Frame, trace: int, span: int) -> int:
        self._seq += 1
        data = encode(frame, self._seq, self._seq - 1, trace, span, self._clock.now_ns)
        self.records += 1
        return self._rings[node].frame(peer.encode(), data, self._clock.tick())

    def _step(self, node: str, peer: str, frame: Frame, trace: int, span: int) -> None:
        self._rings[node].done(self._frame(node, peer, frame, trace, span))

    def _answer(self, node: str, frame: Frame, span: int) -> None:
        self._frame("cpu0.io", node, frame, span, span)

    def _read(self, node: str, address: int, offset: int, width: int, mmio: int) -> None:
        self._access(width | mmio, address, 1)
        span = self._ask(node)
        self._step(node, "cpu0.io", Read("regs", offset, width), span, span)
        self._answer(node, ReadReply(1), span)

    def _line(self, controller: str, irq: int, level: bool, trace: int, source: str) -> None:
        self._step(controller, source.partition(".")[0], Line(irq, level, source), trace, self._new())

    def _interrupt(self, irq: int, vector: int, trace: int, source: str) -> None:
        self._line("ioapic", irq, True, trace, source)
        self._long("ioapic", MARK, 0, "irq", irq)
        span = self._new()
        self._step("cpu0", "ioapic", ApicMessage(vector, 0, 0, 0, False, True), trace, span)
        self._io.short(ACCEPTED, vector, span & 0xFFFF_FFFF)
        self._io.short(VECTOR, vector, self._place.at)
        self.records += 2

    def _end(self, vector: int) -> None:
        self._io.short(EOI, vector, self._place.at)
        self.records += 1


def make(path: Path, records: int, seed: int = 1) -> int:
    """Writes a trace file with at least so many records; how many it has."""
    map = AddressMap()
    map.add_device("uart0", [UART], {"regs": COM1}, 0)
    map.add_device("disk0", [DISK_REGS], {"regs": DISK_BASE}, None)
    fds = {name: recorder.make(name, BLOCKS) for name in RINGS}
    real = recorder.now_ns
    choice = random.Random(seed)
    clock = Clock(choice)
    recorder.now_ns = clock.tick
    try:
        guest = Guest(seed, choice, clock, {name: Recorder(fd, name) for name, fd in fds.items()})
        with path.open("wb") as file:
            rings = [Ring(name, fd) for name, fd in fds.items()]
            drain = Drain(rings, Writer(file, meta_of("made", RINGS, map=map.to_plain())))
            drained = 0
            while guest.records < records:
                guest.work()
                if guest.records - drained > DRAIN_EVERY:
                    drained = guest.records
                    drain.turn(clock.now_ns)
            drain.finish()
        return guest.records
    finally:
        recorder.now_ns = real
        for fd in fds.values():
            os.close(fd)
