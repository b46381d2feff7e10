"""The records of one ring, as steps: what a record alone, or its neighbours in the same ring, can tell.

An access of the guest and the batch, request or answer it led to are in the ring of the CPU's thread; so a
posted access waits here until its batch has left. What several rings tell together: tracing/joining.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from bus import recorder
from bus.frames import KIND_OF, IntAck, IntAckReply
from bus.recorder import ACCESS, ASK, BATCH, BLOCK_BEGINS, DMA, FRAME, LONG, MARK, POSTED, TOLD, VECTOR
from tracing.records import Record
from tracing.steps import CLOCK, HEADER_ITEMS, KIND, SPAN, TRACE, RingOf, Step, lenient

GROUP_MAX = 1000  # records of one step that wait for each other
HELD_MAX = 4096  # steps that wait for a posted access before them to leave
HELD_NS = 1_000_000_000  # and how long: 2 ms is what it takes, but the CPU may stand, or wait for a device
INT_ACK, INT_ACK_REPLY = KIND_OF[IntAck], KIND_OF[IntAckReply]
RESUMED = "resumed"  # Step.way of a process that brings to an end what the one before it had committed
WAITING, UNSENT = "waiting", "unsent"  # Step.way
IRQ = "irq"  # the mark of interrupt controllers, with the number of the line
_STEPS = {recorder.TIMER: "timer", recorder.INPUT: "input", recorder.DISK_DONE: "disk-done"}
_INSTANTS = {recorder.RIM_OUT: "terminal", recorder.RIM_IN: "typed"}


def frame_step(ring: RingOf, record: Record) -> Step:
    step = Step("frame", ring, record, record.time_ns, record.done_ns)
    step.items = items = lenient(record.data, record.number)
    if items is not None:
        step.chain, step.span, step.queued_ns = items[TRACE], items[SPAN], items[CLOCK]
    return step


def _lost(ring: RingOf, record: Record, begin_ns: int, end_ns: int) -> Step:
    return Step("lost", ring, record, begin_ns, end_ns)


def _process(ring: RingOf, record: Record) -> Step:
    ring.pid, ring.title = record.number, record.name
    return Step("process", ring, record, record.time_ns, record.time_ns)


def device_steps(ring: RingOf, records: Iterator[Record]) -> Iterator[Step]:
    """Of a ring in which frames and other steps are followed by what belongs to them."""
    group: list[Step] = []
    last_ns = 0
    lost: Record | None = None
    for record in records:
        kind = record.kind
        if kind == FRAME:
            step = frame_step(ring, record)
        elif kind in _STEPS:
            step = Step(_STEPS[kind], ring, record, record.time_ns, record.done_ns)
            step.chain = record.one
        elif kind == DMA:
            if group:
                step = group[-1] if group[-1].kind == "disk" else group[0]
                step.dma += record.data
            continue
        elif kind == BLOCK_BEGINS:
            lost = record
            continue
        elif kind == recorder.PROCESS:
            step = _process(ring, record)
        elif kind == recorder.RESUMED:
            step = Step("process", ring, record, record.time_ns, record.done_ns)
            step.way, step.chain = RESUMED, record.one
        elif kind in _INSTANTS:
            step = Step(_INSTANTS[kind], ring, record, record.time_ns, record.time_ns)
        elif kind in (recorder.DISK, recorder.OUTPUT, MARK):
            what = "disk" if kind == recorder.DISK else "output" if kind == recorder.OUTPUT else "mark"
            end_ns = record.done_ns if kind == recorder.DISK else record.time_ns
            step = Step(what, ring, record, record.time_ns, end_ns)
            if group and lost is None:
                step.within = owner = group[0]
                step.chain = owner.chain
                if kind == MARK and owner.irq < 0 and record.name == IRQ:
                    owner.irq = record.one
            if kind == recorder.DISK:
                step.chain = record.one
            if group and lost is None and len(group) < GROUP_MAX:
                group.append(step)
                continue
        else:  # a kind of the CPU's thread: no device writes it
            continue
        yield from group
        group.clear()
        if lost is not None:
            yield _lost(ring, lost, last_ns, record.time_ns)
            lost = None
        last_ns = record.time_ns
        group.append(step)
    yield from group


class CpuSteps:
    """Of the ring of the CPU's thread."""

    def __init__(self, ring: RingOf) -> None:
        self._ring = ring
        self._held: deque[Step] = deque()
        self._posted: dict[str, deque[Step]] = {}  # by node: accesses whose batch hasn't left; twice if split
        self._access: Step | None = None  # the last one
        self._asked: list[Record] = []  # requests without an answer yet, of the last access
        self._acknowledged = 0  # trace of the answer to the IntAck before

    def steps(self, records: Iterator[Record], more: bool = False) -> Iterator[Step]:
        """`more`: this is called again, with those that follow; what waits for them is not given up."""
        ring, held = self._ring, self._held
        last_ns = 0
        lost: Record | None = None
        for record in records:
            kind = record.kind
            if kind == ACCESS:
                if self._access is not None:
                    self._settle()
                step = self._begin(record)
            elif kind == FRAME:
                step = frame_step(ring, record)
                step.end_ns = step.begin_ns  # an answer is taken, and that is all
                self._answer(step)
            elif kind == ASK:
                self._asked.append(record)
                continue
            elif kind == BATCH:
                self._leave(record)
                continue
            elif kind == BLOCK_BEGINS:
                lost = record
                self._forget()
                yield from held
                held.clear()
                continue
            elif kind == recorder.PROCESS:
                self._forget()
                step = _process(ring, record)
            elif kind in (VECTOR, recorder.EOI):
                if self._access is not None:
                    self._settle()
                step = Step(
                    "vector" if kind == VECTOR else "eoi", ring, record, record.time_ns, record.time_ns
                )
                if kind == VECTOR:
                    step.way = "8259" if self._acknowledged else "apic"
                    step.span, self._acknowledged = self._acknowledged, 0
            elif kind == recorder.ACCEPTED:
                step = Step("accepted", ring, record, record.time_ns, record.time_ns)
            else:
                continue
            if lost is not None:
                yield _lost(ring, lost, last_ns, record.time_ns)
                lost = None
            last_ns = record.time_ns
            held.append(step)
            while held:  # what waits for nothing, and for nothing before it
                first = held[0]
                if first is self._access:  # it is settled by what comes after it
                    break
                if first.way == WAITING:
                    if len(held) < HELD_MAX and record.time_ns - first.begin_ns < HELD_NS:
                        break
                    first.way = UNSENT
                yield held.popleft()
        if not more:
            self._forget()
            yield from held
            held.clear()

    def _begin(self, record: Record) -> Step:
        ring = self._ring
        step = Step("access", ring, record, record.time_ns, record.time_ns)
        place = ring.naming.place(record.flags, record.one)
        if place.posts and not record.flags & LONG:
            step.way = WAITING
            for node in place.posts:
                self._posted.setdefault(node, deque()).append(step)
        elif record.flags & TOLD:
            step.way = WAITING
            self._posted.setdefault(place.notes, deque()).append(step)
        elif record.flags & POSTED and not ring.naming.has_map:
            step.way = WAITING
            self._posted.setdefault("", deque()).append(step)
        self._access = step
        return step

    def _settle(self) -> None:
        """No more records of the last access follow, but the batch of a posted one."""
        step, self._access = self._access, None
        asked, self._asked = self._asked, []
        assert step is not None
        for record in asked:
            if record.name == step.ring.naming.place(step.record.flags, step.record.one).node:
                self._link(step, record)  # it was never answered
                step.end_ns = 0
        if step.way:
            return
        record, place = step.record, step.ring.naming.place(step.record.flags, step.record.one)
        if place.entry is None:
            step.kind = step.way = "open-bus"
            if not step.ring.naming.has_map:
                step.kind, step.way = "access", "mirrored"
        elif record.flags & LONG and not place.entry.range.accepts(
            record.one - place.entry.base, record.flags & 7
        ):
            step.way = "split"
        elif place.mirrored:
            step.way = "mirrored"
        else:
            step.way = UNSENT

    def _link(self, step: Step, ask: Record) -> None:
        if step.way == "synchronous" or step.way in (WAITING, "posted"):
            step.also = (*step.also, ask.one)
        else:
            step.way = "synchronous"
            step.chain = step.span = ask.one

    def _answer(self, frame: Step) -> None:
        for place, record in enumerate(self._asked):
            if record.one == frame.span:
                del self._asked[place]
                break
        else:
            return
        items = frame.items
        if items is not None and items[KIND] == INT_ACK_REPLY:
            if items[HEADER_ITEMS:] != [None]:  # else INT was withdrawn meanwhile
                self._acknowledged = frame.chain
        elif self._access is not None:
            self._link(self._access, record)
            self._access.end_ns = frame.begin_ns

    def _leave(self, batch: Record) -> None:
        """A batch has taken posted accesses along: all that waited for the device."""
        posted = self._posted.get(batch.name) or self._posted.get("") or deque()
        left = [posted.popleft() for _ in range(min(batch.number, len(posted)))]
        for span, step in enumerate(left, batch.one):
            if step.way == WAITING:
                step.way = "mirrored" if step.record.flags & TOLD else "posted"
            elif step.way == UNSENT or step.chain == batch.one:  # given up, or the other half of it
                continue
            if step.chain:
                step.also = (*step.also, batch.one)
            else:
                step.chain, step.span = batch.one, span

    def _forget(self) -> None:
        """What waits will not be told any more."""
        if self._access is not None:
            self._settle()
        for step in self._held:
            if step.way == WAITING:
                step.way = UNSENT
        self._posted.clear()
        self._asked.clear()
        self._acknowledged = 0
