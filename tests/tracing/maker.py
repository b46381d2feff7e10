"""Traces for tests: rings written by Recorder objects and real frames, by a clock that the test moves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bus import recorder
from bus.addressmap import AddressMap
from bus.codec import encode
from bus.frames import (
    ApicMessage,
    Eoi,
    Frame,
    IntAck,
    IntAckReply,
    Intr,
    Line,
    PostedBatch,
    PostedWrite,
    Read,
    ReadReply,
    Write,
    WriteReply,
)
from bus.ranges import MmioRange, PortRange
from bus.recorder import (
    ACCEPTED,
    ASK,
    BATCH,
    DISK,
    DISK_DONE,
    EOI,
    INPUT,
    MARK,
    MMIO,
    OUTPUT,
    POSTED,
    RIM_IN,
    RIM_OUT,
    TIMER,
    VECTOR,
    WRITE,
    Recorder,
)
from tracing.chains import Chain, Step, chains, steps
from tracing.file import Trace, Writer
from tracing.meta import meta_of
from tracing.rings import Ring

UART = PortRange(
    "regs",
    length=8,
    posted=frozenset({0, 1}),
    mirrored=frozenset({5}),
    latched=((2, 0),),
    names={0: "RBR|THR", 1: "IER", 2: "IIR|FCR", 5: "LSR"},
)
PIC = PortRange("master", length=2, posted=frozenset({0, 1}), names={0: "IRR|OCW2", 1: "IMR"})
DISK_REGS = MmioRange(
    "regs", length=0x100, widths=(1, 2, 4), posted=frozenset({0x50}), names={0x50: "QueueNotify"}
)
COM1, PIC_BASE, DISK_BASE = 0x3F8, 0x20, 0xFEB0_0000
RINGS = ["uart0", "disk0", "ioapic", "pic", "cpu0", "cpu0.io", "consoles"]
EIP, CR3 = 0xC010_0000, 0x1000


def address_map() -> AddressMap:
    new = AddressMap()
    new.add_device("uart0", [UART], {"regs": COM1}, 0)
    new.add_device("pic", [PIC], {"master": PIC_BASE}, None)
    new.add_device("disk0", [DISK_REGS], {"regs": DISK_BASE}, None)
    return new


class Cpu:
    cr3 = CR3


class Place:
    at = EIP
    cpu = Cpu()


class Maker:
    """Writes rings; each record takes a microsecond."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path, blocks: int = 16) -> None:
        self.path = path
        self.now = 1_000_000
        monkeypatch.setattr(recorder, "now_ns", self.tick)
        self.fds = {name: recorder.make(name, blocks) for name in RINGS}
        self.rings = {name: Recorder(fd, f"{name} 1") for name, fd in self.fds.items()}
        self.ids = 0x1000
        self.seq: dict[str, int] = {}
        self.used = list(RINGS)

    def tick(self) -> int:
        self.now += 1000
        return self.now

    def wait(self, ns: int) -> None:
        self.now += ns

    def id(self) -> int:
        self.ids += 0x100
        return self.ids

    def restart(self, node: str) -> None:
        """Another process goes on in the ring."""
        pid = os.getpid
        try:
            os.getpid = lambda: pid() + 1
            self.rings[node] = Recorder(self.fds[node], f"{node} 2")
        finally:
            os.getpid = pid

    def frame(
        self, node: str, peer: str, frame: Frame, trace: int, span: int | None = None, *, done: bool = True,
        seq: int | None = None,
    ) -> int:  # fmt: skip
        """`node` takes a frame; the place of its `done`."""
        stream = f"{peer}>{node}"
        self.seq[stream] = number = self.seq.get(stream, 0) + 1 if seq is None else seq
        data = encode(frame, number, 0, trace, self.id() if span is None else span, self.now - 500)
        place = self.rings[node].frame(peer.encode(), data, self.tick())
        if done:
            self.rings[node].done(place)
        return place

    # --- the CPU's thread

    def access(self, flags: int, address: int, value: int) -> None:
        self.rings["cpu0.io"].access(flags, Place(), address, value)

    def batch(self, node: str, number: int) -> int:
        span = self.id()
        self.rings["cpu0.io"].long(BATCH, number, node, self.tick(), span)
        return span

    def ask(self, node: str, span: int | None = None) -> int:
        span = self.id() if span is None else span
        self.rings["cpu0.io"].long(ASK, EIP, node, self.tick(), span)
        return span

    def post(self, *values: int) -> int:
        """The guest writes the UART's THR, and the batch leaves; its trace."""
        for value in values:
            self.access(1 | WRITE | POSTED, COM1, value)
        return self.batch("uart0", len(values))

    def posted(self, *values: int) -> int:
        """The same, and the UART takes it."""
        trace = self.post(*values)
        self.frame("uart0", "cpu0.io", batch_of(*values), trace, trace)
        return trace

    def read(self, offset: int = 6, node: str = "uart0", base: int = COM1, width: int = 1, mmio: int = 0,
             writes: tuple[PostedWrite, ...] = ()) -> int:  # fmt: skip
        """A synchronous read, answered; its trace."""
        self.access(width | mmio, base + offset, 7)
        trace = self.id()
        if writes:
            self.rings["cpu0.io"].long(BATCH, len(writes), node, self.tick(), trace)
        self.ask(node, trace)
        self.frame(node, "cpu0.io", Read("regs", offset, width, writes), trace, trace)
        self.frame("cpu0.io", node, ReadReply(7), trace, trace, done=False)
        return trace

    def write(self, offset: int, value: int, width: int = 4) -> int:
        """A synchronous write of the disk's, answered; its trace."""
        self.access(width | WRITE | MMIO, DISK_BASE + offset, value)
        trace = self.ask("disk0")
        self.frame("disk0", "cpu0.io", Write("regs", offset, width, value), trace, trace)
        self.frame("cpu0.io", "disk0", WriteReply(), trace, trace, done=False)
        return trace

    def vector(self, vector: int) -> None:
        self.rings["cpu0.io"].short(VECTOR, vector, EIP)

    def eoi(self, vector: int) -> None:
        self.rings["cpu0.io"].short(EOI, vector, EIP)

    # --- controllers

    def line(self, controller: str, irq: int, level: bool, trace: int, source: str = "uart0.irq") -> None:
        self.frame(controller, source.partition(".")[0], Line(irq, level, source), trace)

    def message(self, irq: int, vector: int, trace: int, level: bool = False) -> None:
        """The I/O APIC, in the step in force, sends; the CPU takes it."""
        self.rings["ioapic"].long(MARK, 0, "irq", self.tick(), irq)
        self.arrive(vector, trace, level)

    def arrive(self, vector: int, trace: int, level: bool = False, accepted: bool = True) -> int:
        """A message is taken by the CPU's node, and perhaps by its APIC; the span."""
        span = self.id()
        self.frame("cpu0", "ioapic", ApicMessage(vector, 0, 0, 0, level, True), trace, span)
        if accepted:
            self.accept(vector, span)
        return span

    def accept(self, vector: int, span: int) -> None:
        self.rings["cpu0.io"].short(ACCEPTED, vector, span & 0xFFFF_FFFF)

    def interrupt(self, irq: int, vector: int, trace: int, eoi: bool = True) -> None:
        """An edge, through the I/O APIC, delivered, and ended."""
        self.line("ioapic", irq, True, trace)
        self.message(irq, vector, trace)
        self.vector(vector)
        if eoi:
            self.eoi(vector)

    def end_level(self, vector: int) -> int:
        """A level-triggered interrupt has ended: the I/O APIC is told. The trace of that frame."""
        self.eoi(vector)
        trace = self.id()
        self.frame("ioapic", "cpu0.io", Eoi(vector), trace, trace)
        return trace

    def intr(self, level: bool, trace: int) -> None:
        self.frame("cpu0", "pic", Intr(level), trace)

    def acknowledge(self, irq: int, vector: int) -> int:
        """INTA cycles at the 8259."""
        trace = self.ask("pic")
        self.frame("pic", "cpu0.io", IntAck(), trace, trace)
        self.rings["pic"].long(MARK, 0, "irq", self.tick(), irq)
        self.frame("cpu0.io", "pic", IntAckReply(vector), trace, trace, done=False)
        self.vector(vector)
        return trace

    # --- devices

    def step(
        self, node: str, kind: int, number: int, name: str, trace: int, position: int, done: bool = True
    ) -> None:
        place = self.rings[node].step(kind, number, name, trace, position)
        if done:
            self.rings[node].done(place)

    def timer(self, node: str, name: str, trace: int, deadline: int, done: bool = True) -> None:
        self.step(node, TIMER, 0, name, trace, deadline, done)

    def input(self, node: str, channel: str, trace: int, position: int, count: int) -> None:
        self.step(node, INPUT, count, channel, trace, position)

    def disk(self, trace: int, offset: int, size: int, kind: int = 0, done: bool = True) -> None:
        self.step("disk0", DISK, size, "disk", trace, offset << 2 | kind, done)

    def disk_done(self, trace: int, tag: int) -> None:
        self.step("disk0", DISK_DONE, tag, "disk", trace, 0)

    def output(self, node: str, channel: str, position: int, count: int) -> None:
        self.rings[node].long(OUTPUT, count, channel, self.tick(), position)

    def out(self, channel: str, position: int, count: int) -> None:
        self.rings["consoles"].long(RIM_OUT, count, channel, self.tick(), position)

    def typed(self, channel: str, position: int, count: int) -> None:
        self.rings["consoles"].long(RIM_IN, count, channel, self.tick(), position)

    # --- the file

    def save(self) -> Path:
        with self.path.open("wb") as file:
            writer = Writer(file, meta_of("m", self.used, map=address_map().to_plain()))
            for number, name in enumerate(self.used):
                ring = Ring(name, self.fds[name])
                for position, data in ring.pieces(0, ring.tail):
                    writer.piece(number, position, data)
            writer.end()
        return self.path

    def steps(self) -> list[Step]:
        with Trace(self.save()) as trace:
            found = list(steps(trace))
            assert not trace.complaints
        return found

    def chains(self) -> dict[int, Chain]:
        """By id; those with id 0 by numbers below 0."""
        found: dict[int, Chain] = {}
        for chain in chains(self.steps()):
            key = chain.id or -1 - len(found)
            assert key not in found
            found[key] = chain
        return found

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)


def batch_of(*values: int) -> PostedBatch:
    return PostedBatch(tuple(("regs", 0, 1, value) for value in values))
