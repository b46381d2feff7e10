"""Perfetto: steps as TrackEvents, for ui.perfetto.dev and its trace processor.

A process per node (and per process of it: a swapped device has two), with tracks for its steps, the CPU's
accesses, interrupts, each disk and each channel of the consoles. A step is a slice from taken to done, or an
instant; names of registers, values, EIP and so on are its arguments. Flow arrows lead along a chain, from
each step to the next, and from an interrupt to what its handler did. Counters: how long what a device took
had waited, the disk I/O under way.

Left out: senders of frames (the arrow leads from the step before, in time), posted writes one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import IO

from bus.frames import TABLE
from bus.recorder import LONG, WRITE
from tracing.meta import Meta
from tracing.protobuf import varint
from tracing.steps import HEADER_ITEMS, KIND, Step, dma_ranges
from tracing.trackevents import (
    ARG_POINTER,
    ARG_UINT,
    BEGIN,
    FOREVER,
    FORGET_NS,
    INSTANT,
    PARTS_MAX,
    Track,
    TrackEvents,
    argument,
    cached,
)

NO_PID = 1 << 24  # and on: processes whose begin isn't in the trace
BATCH_SHOWN = 8  # writes of a batch that are arguments
NO_FRAME = "frame that bus/codec.py would have refused"


class Writer(TrackEvents):
    """Takes steps in order of time; OSError is the caller's."""

    def __init__(self, file: IO[bytes], meta: Meta) -> None:
        super().__init__(file, meta.monotonic_ns, meta.realtime_ns)
        self._rings = frozenset(meta.rings)
        self._tracks: dict[tuple[str, int, str], Track] = {}
        self._processes: dict[tuple[str, int], int] = {}
        self._counters: dict[tuple[str, int, str], bytes] = {}
        self._accesses: dict[tuple[int, int, str], bytes] = {}
        self._frames: dict[object, bytes] = {}
        self._places: dict[tuple[int, int], bytes] = {}  # EIP, CR3
        self._values: dict[int, bytes] = {}
        self._plain: dict[tuple[str, str, str], bytes] = {}
        self._interrupts: dict[tuple[str, int, str], bytes] = {}
        self._writes: dict[tuple[str, str, int, bool], str] = {}
        self._service: dict[str, list[tuple[int, bytes]]] = {}  # interrupts in service
        self._busy: dict[tuple[str, int, str], list[int]] = {}  # ends of a disk's I/O
        self._value_arg = self.argument_head("value") + ARG_POINTER
        self._wait_arg = self.argument_head("wait_ns") + ARG_UINT
        self._look_ns = 0
        self._encoders: dict[str, Callable[[Step], None]] = {
            "access": self._access, "open-bus": self._access, "frame": self._frame, "vector": self._interrupt,
            "eoi": self._interrupt, "disk": self._disk, "output": self._bytes, "input": self._bytes,
            "terminal": self._bytes, "typed": self._bytes, "timer": self._device, "mark": self._device,
            "disk-done": self._device,
        }  # fmt: skip

    def step(self, step: Step) -> None:
        encode = self._encoders.get(step.kind)
        if encode is not None:
            encode(step)
        else:
            self._other(step)
        if step.begin_ns > self._look_ns or len(self.parts) > PARTS_MAX:
            self._look_ns = step.begin_ns + FORGET_NS // 8
            self.forget(step.begin_ns - FORGET_NS)
            self.write()

    # --- steps

    def _access(self, step: Step) -> None:
        record = step.record
        key = record.flags, record.one, step.way
        fixed = self._accesses.get(key)
        if fixed is None:
            fixed = cached(self._accesses, key, self._access_fixed(step))
        place = self._places.get((record.number, record.cr3))
        if place is None:
            place = cached(self._places, (record.number, record.cr3), self._place(step))
        value = self._values.get(record.two)
        if value is None:
            value = argument(self._value_arg, varint(record.two))
            cached(self._values, record.two, value)
        self._slice(step, self._track(step, "accesses"), fixed + place + value)

    def _access_fixed(self, step: Step) -> bytes:
        place, flags = step.place, step.record.flags
        assert place is not None
        fixed = self.named("access", place.name)
        fixed += self.arg_pointer("address", step.record.one) + self.arg_uint("width", flags & 7)
        fixed += self.arg_string("direction", "write" if flags & WRITE else "read")
        fixed += self.arg_string("class", step.way)
        if flags & LONG:
            fixed += self.arg_string("string", "value is the number of elements")
        if place.entry is not None:
            fixed += self.arg_string("device", place.entry.node)
            fixed += self.arg_string("region", place.entry.range.name)
            fixed += self.arg_string("register", place.name.partition(" ")[2])
        return fixed

    def _place(self, step: Step) -> bytes:
        record, symbols = step.record, step.ring.naming.symbols
        args = self.arg_pointer("eip", record.number)
        if record.cr3 >= 0:
            args += self.arg_pointer("cr3", record.cr3)
        if symbols is not None and (symbol := symbols.find(record.number)):
            args += self.arg_text("symbol", symbol)
        return args

    def _frame(self, step: Step) -> None:
        items = step.items
        if items is None:
            return self._other(step)
        kind = items[KIND]
        # What a frame of the same key says anew each time, comes behind what is fixed.
        anew = b""
        if kind in _REGISTER and list(map(type, items[HEADER_ITEMS : HEADER_ITEMS + 2])) == [str, int]:
            key: object = (step.ring.name, kind, step.record.name, *items[HEADER_ITEMS : HEADER_ITEMS + 2])
            if kind == WRITE_KIND and len(items) > HEADER_ITEMS + 3:
                anew = self.arg_uint_if(self._value_arg, items[HEADER_ITEMS + 3])
            elif kind == READ_KIND and len(items) > HEADER_ITEMS + 3 and items[HEADER_ITEMS + 3]:
                anew = self._batch(step, items[HEADER_ITEMS + 3])
        elif kind == BATCH_KIND and len(items) > HEADER_ITEMS:
            key = step.ring.name, kind, step.record.name
            anew = self._batch(step, items[HEADER_ITEMS])
        elif kind == REPLY_KIND and len(items) > HEADER_ITEMS:
            key = step.ring.name, kind, step.record.name
            anew = self.arg_uint_if(self._value_arg, items[HEADER_ITEMS])
        elif kind in _SMALL:
            key = step.ring.name, kind, step.record.name, step.irq, *items[HEADER_ITEMS:]
        else:
            return self._other(step)
        try:
            fixed = self._frames.get(key)
        except TypeError:  # a frame of types that bus/codec.py would have refused
            return self._other(step)
        if fixed is None:
            fixed = cached(self._frames, key, self._frame_fixed(step, kind))
        wait_ns = step.begin_ns - step.queued_ns
        if 0 <= wait_ns < FOREVER and step.queued_ns:
            anew += argument(self._wait_arg, varint(wait_ns))
            if step.end_ns > step.begin_ns:
                self._count(step, "queue wait", "ns", step.begin_ns, wait_ns)
        if step.dma:
            anew += self._dma(step)
        what = "answers" if step.ring.cpu else "steps"
        self._slice(step, self._track(step, what), fixed + anew)

    def _frame_fixed(self, step: Step, kind: int) -> bytes:
        items, record = step.items, step.record
        assert items is not None
        cls = TABLE[kind][0]
        name = cls.__name__
        if kind in _REGISTER:
            region, offset = items[HEADER_ITEMS : HEADER_ITEMS + 2]
            register = step.ring.naming.register(step.node, region, offset, kind in _WRITING)
            fixed = self.named("frame", f"{name} {register}") + self.arg_string("register", register)
            fixed += self.arg_text("region", region) + self.arg_uint("offset", offset)
        elif kind in _SMALL:
            fixed = self.named("frame", _name(step))
            for field, value in zip(cls.__struct_fields__, items[HEADER_ITEMS:], strict=False):
                fixed += self.arg_any(field, value)
        else:
            fixed = self.named("frame", name)
        if step.irq >= 0 and "irq" not in cls.__struct_fields__:
            fixed += self.arg_uint("irq", step.irq)
        return fixed + self.arg_string("from", record.name)

    def _batch(self, step: Step, writes: object) -> bytes:
        """Arguments of posted writes: how many, and the first of them."""
        if not isinstance(writes, list):
            return b""
        texts = self._writes
        args = self.arg_uint("writes", len(writes))
        for number, write in enumerate(writes[:BATCH_SHOWN]):
            try:
                region, offset, width, value = write
                key = step.ring.name, region, offset, width > 0
                shown = texts.get(key)
                if shown is None:
                    register = step.ring.naming.register(step.node, region, offset, width > 0)
                    shown = cached(texts, key, register + (" = " if width else " seen "))
                args += self.arg_text(f"write {number}", f"{shown}{value:#x}")
            except (TypeError, ValueError):  # as above
                break
        return args

    def _dma(self, step: Step) -> bytes:
        pieces = dma_ranges(step)
        shown = ", ".join(f"{pa:#x}+{size}{' written' if new else ''}" for pa, size, new in pieces[:16])
        return self.arg_text("dma", shown) + self.arg_uint("dma_bytes", sum(size for _, size, _ in pieces))

    def _interrupt(self, step: Step) -> None:
        """A slice from a vector up to its EOI, where the local APIC is told of it."""
        vector, begin_ns, eoi = step.record.flags, step.begin_ns, step.kind == "eoi"
        key = step.kind, vector << 16 | step.irq & 0xFFFF, step.way
        fixed = self._interrupts.get(key)
        if fixed is None:
            fixed = cached(self._interrupts, key, self._interrupt_fixed(step))
        place = self._places.get((step.record.number, step.record.cr3))
        if place is None:
            place = cached(self._places, (step.record.number, step.record.cr3), self._place(step))
        head = self.lane(self._track(step, "interrupts"), begin_ns, begin_ns)
        service = self._service.setdefault(step.node, [])
        if eoi or step.way == "8259":
            self._event(step, INSTANT + head + fixed + place)
        else:
            while service and service[-1][0] >> 4 >= vector >> 4:  # over: only higher ones interrupt
                self.close(begin_ns, service.pop()[1])
            service.append((vector, head))
            self._event(step, BEGIN + head + fixed + place)
        if eoi and any(vector == one for one, _ in service):
            while service:
                one, head = service.pop()
                self.close(begin_ns, head)
                if one == vector:
                    break

    def _interrupt_fixed(self, step: Step) -> bytes:
        fixed = self.named("interrupt", step.name) + self.arg_uint("vector", step.record.flags)
        if step.way:
            fixed += self.arg_string("class", step.way)
        return fixed + self.arg_uint("irq", step.irq) if step.irq >= 0 else fixed

    def _disk(self, step: Step) -> None:
        record = step.record
        name = step.name.partition(" ")[0]
        body = self.named("disk", f"{name} {record.name}") + self.arg_uint("bytes", record.number)
        body += self.arg_uint("offset", record.two >> 2) + (self._dma(step) if step.dma else b"")
        key = step.node, step.pid, record.name
        busy = self._busy.setdefault(key, [])
        while busy and busy[0] <= step.begin_ns:
            end_ns = busy.pop(0)
            self._count(step, f"{record.name} I/O under way", "", end_ns, len(busy))
        busy.append(step.end_ns or FOREVER)
        busy.sort()
        self._count(step, f"{record.name} I/O under way", "", step.begin_ns, len(busy))
        self._slice(step, self._track(step, f"{record.name} I/O"), body)

    def _bytes(self, step: Step) -> None:
        """Of a channel."""
        record, kind = step.record, step.kind
        seen = kind in ("terminal", "typed")
        body = self._fixed(step, kind if seen else f"{kind} {record.name}")
        body += self.arg_uint("bytes", record.number)
        body += self.arg_uint("position", record.two if kind == "input" else record.one)
        self._slice(step, self._track(step, record.name if seen else "steps"), body)

    def _device(self, step: Step) -> None:
        """What a device says or does by itself."""
        record, kind = step.record, step.kind
        body = self._fixed(step, f"{kind} {record.name}")
        if kind != "timer":
            name, value = ("value", record.one) if kind == "mark" else ("request", record.number)
            body += self.arg_uint(name, value)
        if step.dma:
            body += self._dma(step)
        self._slice(step, self._track(step, "steps"), body)

    def _fixed(self, step: Step, name: str) -> bytes:
        key = step.ring.name, step.kind, step.record.name
        fixed = self._plain.get(key)
        if fixed is None:
            what = "channel" if step.kind in _CHANNELS else "name"
            fixed = self.named(step.kind, name) + self.arg_string(what, step.record.name)
            cached(self._plain, key, fixed)
        return fixed

    def _other(self, step: Step) -> None:
        kind = step.kind
        body = self.named(kind, _name(step) if kind == "frame" else kind)
        for arg, value in _args(step).items():
            body += self.arg_any(arg, value)
        if kind == "frame" and step.queued_ns and step.queued_ns <= step.begin_ns:
            body += argument(self._wait_arg, varint(step.begin_ns - step.queued_ns))
        self._slice(step, self._track(step, "steps"), body)

    # --- events

    def _event(self, step: Step, body: bytes) -> None:
        self.event(step.begin_ns, step.chain, step.cause, step.also, body)

    def _slice(self, step: Step, track: Track, body: bytes) -> None:
        begin_ns, end_ns = step.begin_ns, step.end_ns
        if end_ns > begin_ns:
            head = self.lane(track, begin_ns, end_ns)
            self._event(step, BEGIN + head + body)
            self.close(end_ns, head)
        elif end_ns or self._is_cpu(step):
            self._event(step, INSTANT + self.lane(track, begin_ns, begin_ns) + body)
        else:  # never done
            self._event(step, BEGIN + self.lane(track, begin_ns, FOREVER) + body)

    def _is_cpu(self, step: Step) -> bool:
        """The CPU's threads don't say when they are done with a frame."""
        return step.ring.cpu or f"{step.ring.name}.io" in self._rings

    def _count(self, step: Step, what: str, unit: str, time_ns: int, value: int) -> None:
        key = step.node, step.pid, what
        head = self._counters.get(key)
        if head is None:
            head = self._counters[key] = self.counter(what, unit, self._process(step))
        self.out(time_ns, head + varint(value))

    # --- tracks

    def _process(self, step: Step) -> int:
        key = step.node, step.pid
        uuid = self._processes.get(key)
        if uuid is None:
            pid = step.pid or NO_PID + len(self._processes)
            uuid = self._processes[key] = self.process(pid, step.node, step.ring.title or step.node)
        return uuid

    def _track(self, step: Step, what: str) -> Track:
        key = step.ring.name, step.pid, what
        track = self._tracks.get(key)
        if track is None:
            bus = what == "steps" and f"{step.ring.name}.io" in self._rings
            track = self._tracks[key] = Track("bus thread" if bus else what, self._process(step))
        return track


def export(steps: Iterable[Step], meta: Meta, file: IO[bytes]) -> None:
    writer = Writer(file, meta)
    write = writer.step
    for step in steps:
        write(step)
    writer.end()


def _name(step: Step) -> str:
    try:
        return step.name
    except (TypeError, ValueError, IndexError):
        return NO_FRAME


def _args(step: Step) -> dict[str, int | str]:
    try:
        return step.args()
    except (TypeError, ValueError, IndexError):
        return {}


_CHANNELS = ("output", "input", "terminal", "typed")
_KIND = {cls.__name__: kind for kind, (cls, _) in TABLE.items()}
READ_KIND, WRITE_KIND, REPLY_KIND, BATCH_KIND = (
    _KIND[name] for name in ("Read", "Write", "ReadReply", "PostedBatch")
)
_WRITING = {WRITE_KIND, _KIND["StringOut"]}
_REGISTER = {READ_KIND, _KIND["StringIn"], *_WRITING}
_SMALL = {  # kinds of few different frames
    _KIND[name] for name in (
        "WriteReply", "StringOutReply", "Line", "Intr", "IntAck", "IntAckReply", "ApicMessage", "Eoi", "Ping",
        "Pong", "Stats", "Save", "Pause", "Shutdown",
    )
}  # fmt: skip
