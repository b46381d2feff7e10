"""Steps: what one record says happened, with names for people. A million of them pass by: what isn't asked
for isn't made.

What belongs together is decided in tracing/joining.py and tracing/chains.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import msgpack

from bus.addressmap import AddressMap, Entry
from bus.frames import (
    TABLE,
    ApicMessage,
    Eoi,
    Frame,
    Intr,
    Line,
    PostedBatch,
    Read,
    ReadReply,
    StringIn,
    StringOut,
    Write,
)
from bus.ranges import Space
from bus.recorder import DATA_MAX, LONG, MMIO, WRITE
from tracing.meta import Meta
from tracing.records import Record

HEADER_ITEMS = 7  # see bus/codec.py
KIND, SEQ, TRACE, SPAN, CLOCK = 1, 2, 4, 5, 6  # places in a frame's array
NAMED_WRITES = 3  # of a batch, in a step's name
DMA_NAMED = 16  # pieces, in a step's arguments
DISK_KINDS = ("read", "write", "flush", "?")


_TYPES: dict[str, tuple[type, ...]] = {  # by a field's annotation, as msgpack has them; as in bus/codec.py
    "int": (int,), "int | None": (int, type(None)), "bool": (bool,), "str": (str,), "bytes": (bytes,),
    "dict[str, Any]": (dict,), "tuple[PostedWrite, ...]": (list,),
}  # fmt: skip
_WRITE_TYPES = (str, int, int, int)
_FIELDS = {
    kind: (cls, tuple(_TYPES[cls.__annotations__[name]] for name in cls.__struct_fields__))
    for kind, (cls, _) in TABLE.items()
}


class NamesSymbols(Protocol):
    """tracing/symbols.py."""

    def find(self, va: int) -> str: ...


class Place(NamedTuple):
    """Where an access of some address and width goes."""

    entry: Entry | None  # of its first byte that somebody owns; None: open bus
    name: str  # "uart0 THR", "port 0x80"
    posts: tuple[str, ...]  # nodes of the posted writes it becomes, in order; a node may be there twice
    asks: bool  # it, or a part of it, is synchronous unless the mirror answers
    mirrored: bool  # the mirror may answer all of it
    notes: str  # node that is told what the mirror answered (bus.mirror.Latch), or empty

    @property
    def node(self) -> str:
        return "" if self.entry is None else self.entry.node


class Naming:
    """What steps need to name themselves: the address map and symbols."""

    def __init__(self, meta: Meta, symbols: NamesSymbols | None = None) -> None:
        self.map = AddressMap.from_plain(meta.map) if meta.map else AddressMap()
        self.has_map = bool(meta.map)
        self.symbols = symbols
        self.irqs = meta.irqs
        self.rings = frozenset(meta.rings)
        self._places: dict[int, Place] = {}
        entries = [*self.map.entries("port"), *self.map.entries("mmio")]
        self.regions = {(entry.node, entry.range.name): entry for entry in entries}

    def place(self, flags: int, address: int) -> Place:
        key = address << 8 | flags & (7 | WRITE | MMIO)
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = self._place(flags, address)
        return place

    def register(self, node: str, region: str, offset: int, write: bool) -> str:
        entry = self.regions.get((node, region))
        return f"{region}+{offset:#x}" if entry is None else entry.range.register(offset, write)

    def _place(self, flags: int, address: int) -> Place:
        space: Space = "mmio" if flags & MMIO else "port"
        width, write = flags & 7, bool(flags & WRITE)
        parts = [part for part in self._parts(space, address, width) if part[0] is not None]
        if not parts:
            return Place(None, f"{space} {address:#x}", (), False, False, "")
        posts: list[str] = []
        asks, mirrored, notes = False, not write, ""
        for entry, offset, size in parts:
            assert entry is not None
            r = entry.range
            if write and offset in r.posted:
                posts.append(entry.node)
            elif write:
                asks = True
            else:
                asks = True
                latched = size == 1 and any(offset == at for at, _ in r.latched)
                notes = entry.node if latched else notes
                covered = r.mirrored.issuperset(range(offset, offset + size))
                mirrored = mirrored and (latched or covered)
        first, offset, _ = parts[0]
        assert first is not None
        name = f"{first.node} {first.range.register(offset, write)}"
        return Place(first, name, tuple(posts), asks, mirrored, notes)

    def _parts(self, space: Space, address: int, width: int) -> Iterator[tuple[Entry | None, int, int]]:
        """As bus/binding.py splits it: (entry, offset, width)."""
        entry = self.map.find(space, address)
        if entry is not None and entry.range.accepts(address - entry.base, width):
            yield entry, address - entry.base, width
        elif width <= 1:
            yield None, address, width
        else:
            yield from self._parts(space, address, width // 2)
            yield from self._parts(space, address + width // 2, width // 2)


class RingOf:
    """The ring that a step's record is from; `pid` is of the process that writes it at the moment."""

    __slots__ = ("cpu", "name", "naming", "node", "pid", "title")

    def __init__(self, name: str, naming: Naming) -> None:
        self.name = name
        self.node = name.removesuffix(".io")
        self.cpu = name.endswith(".io")  # the CPU's thread: accesses and interrupts
        self.naming = naming
        self.pid = 0
        self.title = ""


class Step:
    """One step, in one process. Times are CLOCK_MONOTONIC in ns.

    `kind`: access, open-bus, frame, timer, input, disk, disk-done, output, terminal, typed, vector, eoi,
    mark, process, lost (records that were overwritten before they were read: `record.number` of them).
    `way`, of an access: posted, synchronous, mirrored, open-bus, split (a string whose elements follow as
    accesses), unsent (it should have led to a frame, and there is none in the trace); of a vector: apic or
    8259; of an output: "passed on" when its terminal step is earlier.
    """

    __slots__ = ("also", "begin_ns", "cause", "chain", "dma", "end_ns", "irq", "items", "kind", "pid",
                 "queued_ns", "record", "ring", "span", "way", "within")  # fmt: skip

    def __init__(self, kind: str, ring: RingOf, record: Record, begin_ns: int, end_ns: int) -> None:
        self.kind = kind
        self.ring = ring
        self.pid = ring.pid
        self.record = record
        self.begin_ns = begin_ns
        self.end_ns = end_ns  # 0: never done; equal to begin_ns: an instant
        self.queued_ns = 0  # frames: when it was sent, by the sender's clock
        self.chain = 0  # id; 0: alone
        self.span = 0  # frames, asked and batched accesses
        self.cause = 0  # the chain that this chain's begin was caused by: an interrupt's handler, typing
        self.also: tuple[int, ...] = ()  # further chains that it belongs to
        self.way = ""
        self.irq = -1  # of a frame or vector of an interrupt, where it is known
        self.within: Step | None = None  # mark, output, disk: of this step
        self.items: list[Any] | None = None  # frames: the array
        self.dma: bytes = b""  # pairs of words, as recorded

    @property
    def node(self) -> str:
        return self.ring.node

    @property
    def frame(self) -> Frame | None:
        """The frame, leniently decoded; None if there is none, or only a part of it."""
        items = self.items
        if items is None or (len(items) <= HEADER_ITEMS and self.record.number > DATA_MAX):
            return None
        checked = _FIELDS.get(items[KIND])
        values = items[HEADER_ITEMS:]
        if checked is None or len(values) != len(checked[1]):
            return None
        cls, types = checked
        for place, (value, allowed) in enumerate(zip(values, types, strict=True)):
            if type(value) not in allowed:
                return None
            if type(value) is list:
                if any(type(w) is not list or tuple(map(type, w)) != _WRITE_TYPES for w in value):
                    return None
                values[place] = tuple(map(tuple, value))
        return cls(*values)

    @property
    def name(self) -> str:
        """Short, for a track: "uart0 THR = 0x41"."""
        return _NAMES[self.kind](self)

    def args(self) -> dict[str, int | str]:
        """For viewers."""
        return dict(_args(self))

    @property
    def place(self) -> Place | None:
        """Accesses: where it went."""
        if self.kind not in ("access", "open-bus"):
            return None
        return self.ring.naming.place(self.record.flags, self.record.one)

    def __repr__(self) -> str:
        return f"<{self.begin_ns} {self.ring.name} {self.kind} {self.name} chain {self.chain:x}>"


def lenient(data: bytes, length: int) -> list[Any] | None:
    """A frame's array: of a frame that was cut, at least its header; None if there isn't even that."""
    try:
        if length <= DATA_MAX:
            items = msgpack.unpackb(data)
        else:
            unpacker = msgpack.Unpacker()
            unpacker.feed(data)
            unpacker.read_array_header()
            items = [unpacker.unpack() for _ in range(HEADER_ITEMS)]
        _, kind, seq, _, trace, span, clock_ns, *_ = items
        if type(kind) is type(seq) is type(trace) is type(span) is type(clock_ns) is int:
            return items if type(items) is list else None
    except Exception:  # whatever it is, it is no frame
        return None
    return None


def dma_ranges(step: Step) -> list[tuple[int, int, bool]]:
    """(pa, bytes, written by the device)."""
    words = memoryview(step.dma).cast("Q").tolist()
    return [(pa, size >> 1, bool(size & 1)) for pa, size in zip(words[::2], words[1::2], strict=False)]


# --- names --------------------------------------------------------------------------------------------


def _access(step: Step) -> str:
    record = step.record
    place = step.ring.naming.place(record.flags, record.one)
    if record.flags & LONG:
        arrow = "<-" if record.flags & WRITE else "->"
        return f"{place.name} {arrow} {record.two} x {record.flags & 7} bytes"
    return f"{place.name} {'=' if record.flags & WRITE else '->'} {record.two:#x}"


def _frame(step: Step) -> str:
    frame, node, naming = step.frame, step.node, step.ring.naming
    match frame:
        case Read(region=region, offset=offset):
            return f"read {naming.register(node, region, offset, False)}"
        case Write(region=region, offset=offset, value=value):
            return f"{naming.register(node, region, offset, True)} = {value:#x}"
        case PostedBatch(writes=writes):
            parts = [
                f"{naming.register(node, region, offset, width > 0)} {'=' if width else 'seen'} {value:#x}"
                for region, offset, width, value in writes[:NAMED_WRITES]
            ]
            more = len(writes) - NAMED_WRITES
            return ", ".join(parts) + (f" and {more} more" if more > 0 else "")
        case ReadReply(value=value):
            return f"answer {value:#x}"
        case StringIn(region=region, offset=offset, count=count):
            return f"read {naming.register(node, region, offset, False)} x {count}"
        case StringOut(region=region, offset=offset, width=width, data=data):
            return f"{naming.register(node, region, offset, True)} x {len(data) // max(width, 1)}"
        case Line(irq=irq, level=level):
            return f"Line {irq} {'high' if level else 'low'}"
        case Intr(level=level):
            return f"INTR {'high' if level else 'low'}"
        case ApicMessage(vector=vector):
            return f"ApicMessage vector {vector:#x}"
        case Eoi(vector=vector):
            return f"Eoi vector {vector:#x}"
        case None:
            kind = TABLE.get(step.items[KIND]) if step.items is not None else None
            return f"frame of {step.record.number} bytes" if kind is None else kind[0].__name__
        case _:
            return type(frame).__name__


def _vector(step: Step) -> str:
    irq = f"IRQ {step.irq} " if step.irq >= 0 else ""
    return f"{irq}vector {step.record.flags:#x}"


def _disk(step: Step) -> str:
    what = DISK_KINDS[step.record.two & 3]
    return what if what == "flush" else f"{what} {step.record.number} at {step.record.two >> 2}"


_NAMES: Mapping[str, Callable[[Step], str]] = {
    "access": _access,
    "open-bus": _access,
    "frame": _frame,
    "vector": _vector,
    "disk": _disk,
    "eoi": lambda step: f"EOI vector {step.record.flags:#x}",
    "timer": lambda step: f"timer {step.record.name}",
    "input": lambda step: f"input {step.record.name} {step.record.number} bytes",
    "disk-done": lambda step: f"{step.record.name} done, request {step.record.number}",
    "output": lambda step: f"output {step.record.name} {step.record.number} bytes",
    "terminal": lambda step: f"{step.record.name} {step.record.number} bytes out",
    "typed": lambda step: f"{step.record.name} {step.record.number} bytes in",
    "mark": lambda step: f"{step.record.name} = {step.record.one}",
    "process": lambda step: f"process {step.record.number} {step.record.name or 'goes on'}",
    "lost": lambda step: f"{step.record.number} records lost",
}


def _args(step: Step) -> Iterator[tuple[str, int | str]]:
    record, naming = step.record, step.ring.naming
    if step.kind in ("access", "open-bus", "vector", "eoi"):
        yield "eip", f"{record.number:#010x}"
        if naming.symbols is not None and (symbol := naming.symbols.find(record.number)):
            yield "symbol", symbol
        if record.cr3 >= 0:
            yield "cr3", f"{record.cr3:#010x}"
    if step.way:
        yield "class", step.way
    if (place := step.place) is not None:
        write = record.flags & WRITE
        yield "address", f"{record.one:#x}"
        yield "width", record.flags & 7
        if record.flags & LONG:
            yield "count", record.two
        else:
            yield "value", f"{record.two:#x}"
        yield "direction", "write" if write else "read"
        if place.entry is not None:
            yield "device", place.entry.node
            yield "region", place.entry.range.name
            yield "register", place.name.partition(" ")[2]
    elif step.kind == "frame":
        yield "from", record.name
        yield "bytes", record.number
        if step.items is not None:
            yield "seq", step.items[SEQ]
        yield from _fields(step)
    elif step.kind in ("vector", "eoi"):
        yield "vector", f"{record.flags:#x}"
    elif step.kind in ("input", "output", "terminal", "typed"):
        yield "channel", record.name
        yield "bytes", record.number
        yield "position", record.two if step.kind == "input" else record.one
    elif step.kind == "disk":
        yield "disk", record.name
        yield "bytes", record.number
        yield "offset", record.two >> 2
    elif step.kind == "mark":
        yield "value", record.one
    elif step.kind == "process":
        yield "pid", record.number
    if step.irq >= 0:
        yield "irq", step.irq
    if step.dma:
        pieces = dma_ranges(step)
        texts = [f"{pa:#x}+{size}{' written' if written else ''}" for pa, size, written in pieces[:DMA_NAMED]]
        yield "dma", ", ".join(texts)
        yield "dma_bytes", sum(size for _, size, _ in pieces)


def _fields(step: Step) -> Iterator[tuple[str, int | str]]:
    frame = step.frame
    if isinstance(frame, PostedBatch | Read) and frame.writes:
        register = step.ring.naming.register
        for number, (region, offset, width, value) in enumerate(frame.writes):
            yield f"write {number}", f"{register(step.node, region, offset, width > 0)} = {value:#x}"
    for field in frame.__struct_fields__ if frame is not None else ():
        value = getattr(frame, field)
        if isinstance(value, bool):
            yield field, int(value)
        elif isinstance(value, int | str):
            yield field, value
        elif isinstance(value, bytes):
            yield field, f"{len(value)} bytes"
