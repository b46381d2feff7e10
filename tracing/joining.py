"""The steps of all rings in time order, linked: which chain each belongs to.

Frames carry their chain in the header. What has none is linked by what is known of a PC: an interrupt
message to the last rise of its line, a vector to the message, an EOI to the vector, bytes to those before and
behind `consoles` by their position. Each memory is limited; what was forgotten is a chain not complete.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import TypeVar
from zlib import crc32

from bus.frames import KIND_OF, ApicMessage, Eoi, IntAck, Line
from bus.recorder import WRITE
from tracing.file import Trace
from tracing.ringsteps import IRQ, RESUMED, CpuSteps, device_steps
from tracing.steps import HEADER_ITEMS, KIND, TRACE, NamesSymbols, Naming, RingOf, Step

LINE, APIC_MESSAGE, INT_ACK, EOI = (KIND_OF[cls] for cls in (Line, ApicMessage, IntAck, Eoi))
FIXED, LOWEST, NMI = 0, 1, 4  # delivery modes
NMI_VECTOR = 2
HANDLER_NS = 1_000_000  # after an EOI, accesses are still the handler's for so long if nothing else comes
NESTED = 64  # interrupts in service
REMEMBERED = 1 << 14  # entries of each memory
OCW2_EOI = 0x20  # bit of a write to an 8259's first port that ends an interrupt
OWN_IDS = (crc32(b"of the trace's reader") & 0xFF_FFFF) << 40  # as bus.stream.id_source
K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class Filter:
    """Which chains to keep: those with a step of one of these devices, or an access of one of these ports or
    addresses; without both, all. What began a chain earlier than its first step that fits is left out."""

    devices: frozenset[str] = frozenset()
    ports: tuple[range, ...] = ()
    since_ns: int = 0  # steps that begin then or later
    until_ns: int = 1 << 63


class Memory(dict[K, V]):
    """Forgets the oldest entries."""

    def put(self, key: K, value: V) -> None:
        self[key] = value
        if len(self) > REMEMBERED:
            for old in [key for key, _ in zip(self, range(REMEMBERED // 2), strict=False)]:
                del self[old]


class _Service:
    """An interrupt in service."""

    __slots__ = ("also", "chain", "eoi_ns", "irq", "vector", "way")

    def __init__(self, step: Step) -> None:
        self.vector, self.chain, self.also, self.way, self.irq = (
            step.record.flags, step.chain, step.also, step.way, step.irq,
        )  # fmt: skip
        self.eoi_ns = 0


def steps(trace: Trace, symbols: NamesSymbols | None = None, keep: Filter | None = None) -> Iterator[Step]:
    """All steps in time order, as the file is read; whatever is in it, nothing is raised."""
    naming = Naming(trace.meta, symbols)
    streams: list[Iterator[Step]] = []
    for name, records in zip(trace.meta.rings, trace.rings(), strict=True):
        ring = RingOf(name, naming)
        streams.append(CpuSteps(ring).steps(records) if ring.cpu else device_steps(ring, records))
    linked = Linker(trace.meta.rings).link(merged(streams))
    since_ns = trace.meta.since_ns
    if since_ns:
        linked = (step for step in linked if step.begin_ns >= since_ns)
    return linked if keep is None else kept(linked, keep)


def merged(streams: Iterable[Iterator[Step]]) -> Iterator[Step]:
    """By time. Each stream is nearly in order by itself."""
    heads: list[tuple[int, int, Step, Iterator[Step]]] = []
    for number, stream in enumerate(streams):
        if (step := next(stream, None)) is not None:
            heads.append((step.begin_ns, number, step, stream))
    heapify(heads)
    while heads:
        _, number, step, stream = heads[0]
        until_ns = min((head[0] for head in heads[1:3]), default=1 << 64)
        while True:  # runs of one stream are common
            yield step
            following = next(stream, None)
            if following is None:
                heappop(heads)
                break
            step = following
            if step.begin_ns > until_ns:
                heapreplace(heads, (step.begin_ns, number, step, stream))
                break


def kept(steps: Iterable[Step], keep: Filter) -> Iterator[Step]:
    chains: Memory[int, bool] = Memory()
    everything = not keep.devices and not keep.ports
    for step in steps:
        if not keep.since_ns <= step.begin_ns < keep.until_ns:
            continue
        if everything or step.chain in chains or _fits(step, keep) or any(c in chains for c in step.also):
            for chain in (step.chain, *step.also):
                if chain:
                    chains.put(chain, True)
            yield step


def _fits(step: Step, keep: Filter) -> bool:
    if step.ring.node in keep.devices:
        return True
    place = step.place
    if place is None:
        return step.kind in ("typed", "terminal") and step.record.name.partition(":")[0] in keep.devices
    return place.node in keep.devices or any(step.record.one in ports for ports in keep.ports)


class Linker:
    """Carries what links steps of different rings."""

    def __init__(self, rings: Iterable[str]) -> None:
        self._consoles = "consoles" in rings
        self._ids = OWN_IDS
        self._alias: Memory[int, int] = Memory()  # trace of frames -> chain
        self._rises: dict[tuple[str, int], int] = {}  # (controller, irq) -> chain of its last rise
        self._marks: Memory[int, list[tuple[int, int]]] = Memory()  # trace -> irq, chain of messages it sent
        self._used: Memory[tuple[int, str], int] = Memory()  # (trace, CPU) -> how many have arrived
        self._pending: dict[tuple[str, int], list[tuple[int, int]]] = {}  # (CPU, vector) -> chain, irq
        self._acknowledged: Memory[int, int] = Memory()  # trace of an IntAck -> irq
        # (CPU, span) -> vector, chain, irq of a message that the APIC hasn't taken yet
        self._arrived: Memory[tuple[str, int], tuple[int, int, int]] = Memory()
        self._undone: dict[str, tuple[int, int]] = {}  # ring -> trace, chain of the last step not done
        self._service: dict[str, list[_Service]] = {}
        self._ended: dict[int, _Service] = {}  # vector -> its last EOI
        self._outputs: dict[str, deque[tuple[int, int, int]]] = {}  # channel -> begin, end, chain
        self._passed: dict[str, int] = {}  # channel -> end of what consoles have passed on
        self._typed: dict[str, deque[tuple[int, int, int]]] = {}
        self._open: Memory[tuple[str, str, str, int], int] = Memory()  # steps that aren't done -> chain

    def link(self, steps: Iterable[Step]) -> Iterator[Step]:
        table = {
            "access": self._access, "frame": self._frame, "mark": self._mark, "vector": self._vector,
            "eoi": self._eoi, "output": self._output, "terminal": self._terminal, "typed": self._type,
            "input": self._input, "timer": self._timer, "disk": self._aliased,
            "disk-done": self._device_step, "process": self._process,
        }  # fmt: skip
        get = table.get
        for step in steps:
            if step.kind == "accepted":
                self._accepted(step)
                continue
            handle = get(step.kind)
            if handle is not None:
                handle(step)
            yield step

    def _own_id(self) -> int:
        self._ids += 1
        return self._ids

    # --- frames and interrupts

    def _access(self, step: Step) -> None:
        service = self._service.get(step.ring.node)
        if not service:
            return
        top = service[-1]
        if top.eoi_ns and step.begin_ns - top.eoi_ns > HANDLER_NS:
            service.pop()
            self._access(step)
            return
        step.cause = top.chain
        record = step.record
        if top.way == "8259" and record.flags & WRITE and record.two & OCW2_EOI and not top.eoi_ns:
            place = step.place
            if place is not None and place.entry is not None and record.one == place.entry.base:
                rises = self._rises  # controllers are those that lines lead to
                if any(node == place.node for node, _ in rises) and record.two & 0x18 == 0:
                    top.eoi_ns = step.begin_ns

    def _frame(self, step: Step) -> None:
        items = step.items
        if items is None:
            return
        trace = step.chain
        kind = items[KIND]
        if trace in self._alias:
            step.chain = self._alias[trace]
        if not step.end_ns and not step.ring.cpu:
            self._undone[step.ring.name] = trace, step.chain
        if kind == LINE:
            if len(items) > HEADER_ITEMS + 1 and type(items[HEADER_ITEMS]) is int:
                step.irq = items[HEADER_ITEMS]
                if items[HEADER_ITEMS + 1]:
                    self._rises[step.ring.node, step.irq] = step.chain
        elif kind == APIC_MESSAGE:
            self._message(step, trace)
        elif kind == INT_ACK:
            chain = self._rises.get((step.ring.node, step.irq))
            self._acknowledged.put(trace, step.irq)
            if chain:
                step.chain = chain
                self._alias.put(trace, chain)
        elif kind == EOI and len(items) > HEADER_ITEMS and type(items[HEADER_ITEMS]) is int:
            ended = self._ended.get(items[HEADER_ITEMS])
            if ended is not None and ended.chain:
                step.chain, step.irq = ended.chain, ended.irq
                self._alias.put(trace, ended.chain)

    def _mark(self, step: Step) -> None:
        owner = step.within
        if owner is None:
            return
        step.chain = owner.chain
        items = owner.items
        if step.record.name == IRQ and items is not None and items[KIND] != INT_ACK:
            irq = step.record.one
            sent = irq, self._rises.get((step.ring.node, irq), owner.chain)
            sents = self._marks.get(items[TRACE])
            if sents is None:
                self._marks.put(items[TRACE], [sent])
            else:
                sents.append(sent)

    def _message(self, step: Step, trace: int) -> None:
        items, cpu = step.items, step.ring.node
        assert items is not None
        if not step.ring.cpu and len(items) > HEADER_ITEMS + 1 and type(items[HEADER_ITEMS]) is int:
            used = self._used.get((trace, cpu), 0)
            sents = self._marks.get(trace, ())
            if used < len(sents):
                self._used.put((trace, cpu), used + 1)
                step.irq, step.chain = sents[used]
            vector, mode = items[HEADER_ITEMS : HEADER_ITEMS + 2]
            if mode in (FIXED, LOWEST, NMI):
                wanted = NMI_VECTOR if mode == NMI else vector
                self._arrived.put((cpu, step.span & 0xFFFF_FFFF), (wanted, step.chain, step.irq))

    def _accepted(self, step: Step) -> None:
        """Messages that are accepted before a vector is delivered have merged: it is the interrupt of all."""
        arrived = self._arrived.pop((step.ring.node, step.record.number), None)
        if arrived is not None:
            vector, chain, irq = arrived
            waiting = self._pending.setdefault((step.ring.node, vector), [])
            if len(waiting) < NESTED:
                waiting.append((chain, irq))

    def _vector(self, step: Step) -> None:
        cpu, vector = step.ring.node, step.record.flags
        if step.way == "8259":
            step.chain = self._alias.get(step.span, step.span)
            step.irq = self._acknowledged.get(step.span, -1)
        else:
            causes = self._pending.pop((cpu, vector), None)
            if causes:
                step.chain, step.irq = causes[0]
                step.also = tuple(dict.fromkeys(chain for chain, _ in causes if chain != step.chain))
            else:
                step.chain = self._own_id()
        service = self._service.setdefault(cpu, [])
        while service and service[-1].eoi_ns:
            service.pop()
        if len(service) >= NESTED:
            del service[0]
        service.append(_Service(step))

    def _eoi(self, step: Step) -> None:
        for entry in reversed(self._service.get(step.ring.node, ())):
            if entry.vector == step.record.flags and entry.way == "apic" and not entry.eoi_ns:
                entry.eoi_ns = step.begin_ns
                step.chain, step.also, step.irq = entry.chain, entry.also, entry.irq
                self._ended[entry.vector] = entry
                return

    # --- what a killed process had begun

    def _timer(self, step: Step) -> None:
        self._repeatable(step)
        self._device_step(step)

    def _device_step(self, step: Step) -> None:
        trace = step.record.one
        step.chain = self._alias.get(trace, trace)
        if not step.end_ns:
            self._undone[step.ring.name] = trace, step.chain

    def _process(self, step: Step) -> None:
        """Of one that goes on: it is in the chain that the one before it has left unfinished."""
        trace, chain = self._undone.get(step.ring.name, (0, 0))
        step.chain = chain if step.way == RESUMED and trace == step.record.one else 0

    def _repeatable(self, step: Step) -> None:
        """The successor of a killed process begins such a step anew, with a trace of its own."""
        key = step.ring.name, step.kind, step.record.name, step.record.two
        if (chain := self._open.pop(key, 0)) and chain != step.chain:
            self._alias.put(step.chain, chain)
            step.chain = chain
        if not step.end_ns:
            self._open.put(key, step.chain)

    def _aliased(self, step: Step) -> None:
        step.chain = self._alias.get(step.chain, step.chain)

    # --- bytes

    def _output(self, step: Step) -> None:
        if step.within is not None:
            step.chain = step.within.chain
        if not self._consoles:
            step.way = "not followed"
            return
        channel = f"{step.node}:{step.record.name}"
        begin, end = step.record.one, step.record.one + step.record.number
        if end <= self._passed.get(channel, 0):
            step.way = "passed on"
        else:
            self._outputs.setdefault(channel, deque(maxlen=REMEMBERED)).append((begin, end, step.chain))

    def _terminal(self, step: Step) -> None:
        channel = step.record.name
        end = step.record.one + step.record.number
        self._passed[channel] = max(end, self._passed.get(channel, 0))
        step.chain, step.also = _covered(self._outputs.get(channel), end)

    def _type(self, step: Step) -> None:
        step.chain = self._own_id()
        begin, end = step.record.one, step.record.one + step.record.number
        typed = self._typed.setdefault(step.record.name, deque(maxlen=REMEMBERED))
        typed.append((begin, end, step.chain))

    def _input(self, step: Step) -> None:
        self._timer(step)
        end = step.record.two + step.record.number
        for channel, typed in self._typed.items():  # its name there is that of its other direction
            if channel.startswith(f"{step.node}:") and typed and typed[0][0] < end:
                step.cause, _ = _covered(typed, end)
                break


def _covered(ranges: deque[tuple[int, int, int]] | None, end: int) -> tuple[int, tuple[int, ...]]:
    """Chains of the ranges that begin before `end`; those that end by then are forgotten."""
    chains: list[int] = []
    while ranges and ranges[0][0] < end:
        chains.append(ranges[0][2])
        if ranges[0][1] > end:
            break
        ranges.popleft()
    chains = list(dict.fromkeys(chain for chain in chains if chain))
    return (chains[0], tuple(chains[1:])) if chains else (0, ())
