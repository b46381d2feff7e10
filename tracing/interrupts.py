"""Interrupts of a trace: how many, how long from the line to the vector and on to the EOI, and those that
nobody handled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from bus.frames import KIND_OF, ApicMessage, Intr, Line
from bus.recorder import MARK
from tracing.chains import Step
from tracing.histogram import Histogram
from tracing.joining import FIXED, LOWEST, NMI, NMI_VECTOR, OWN_IDS
from tracing.steps import HEADER_ITEMS, KIND

LINE, APIC_MESSAGE, INTR = (KIND_OF[cls] for cls in (Line, ApicMessage, Intr))
OPEN_MAX = 1000  # rises of one line that wait for their vector
LINES_MAX, VECTORS_MAX = 1000, 2000
SOURCES_MAX = 8  # names kept of one line
OWN = OWN_IDS >> 40
Where = tuple[int, int]  # how many, when the first was (ns)


@dataclass(slots=True)
class LineUse:
    """One interrupt line."""

    irq: int
    sources: list[str] = field(default_factory=list)
    rises: int = 0
    sent: int = 0  # messages of controllers, and acknowledgements of an 8259
    delivered: int = 0  # rises that a vector came for
    ignored: int = 0  # rises that no controller sent anything for: masked, or one before them was pending
    lost: int = 0  # rises for which a controller did, and no vector came
    first_ignored_ns: int = 0
    first_lost_ns: int = 0


@dataclass(slots=True)
class Vector:
    """One vector, delivered for one line."""

    irq: int  # -1: for none
    vector: int
    way: str  # apic, 8259, "own" (the local APIC's timer), "message" (no line)
    count: int = 0
    again: int = 0  # of these without a new rise: the line was still high
    unended: int = 0
    first_unended_ns: int = 0
    latency: Histogram = field(default_factory=Histogram)  # from the line's rise to the vector
    handled: Histogram = field(default_factory=Histogram)  # from the vector to the EOI

    @property
    def spurious(self) -> bool:
        """An 8259's without a line, or an APIC's without a message and an end."""
        if self.way == "8259":
            return self.irq < 0
        return self.way == "own" and not self.handled.count and self.vector & 15 == 15


class _Rise:
    __slots__ = ("at_ns", "count", "sent")

    def __init__(self, at_ns: int) -> None:
        self.at_ns, self.count, self.sent = at_ns, 0, False


class Interrupts:
    """Is told of steps in time order, through `table`."""

    def __init__(self) -> None:
        self.lines: dict[int, LineUse] = {}
        self.vectors: dict[tuple[int, int, str], Vector] = {}
        self.unsent: list[tuple[str, int, int]] = []  # messages without a vector: CPU, vector, when
        self.unacknowledged_ns = 0  # since when the 8259's INT is high, at the end
        self.table: dict[str, Callable[[Step], None]] = {
            "frame": self._frame, "mark": self._mark, "vector": self._vector, "eoi": self._eoi,
        }  # fmt: skip
        self._rises: dict[int, dict[int, _Rise]] = {}  # line -> chain
        self._first: dict[int, str] = {}  # line -> the controller whose frames are counted
        self._pending: dict[tuple[str, int], int] = {}  # (CPU, vector) -> when it was told
        self._service: dict[tuple[str, int], tuple[Vector, int]] = {}
        self._int_ns: dict[str, int] = {}  # by CPU

    def line(self, irq: int) -> LineUse:
        if irq not in self.lines and len(self.lines) >= LINES_MAX:
            irq = -1
        return self.lines.setdefault(irq, LineUse(irq))

    @property
    def busiest(self) -> list[Vector]:
        return sorted(self.vectors.values(), key=lambda v: (-v.count, v.irq, v.vector))

    def _frame(self, step: Step) -> None:
        items = step.items
        if items is None:
            return
        kind = items[KIND]
        if len(items) <= HEADER_ITEMS + (kind != INTR):
            return
        if kind == LINE:
            irq, level = items[HEADER_ITEMS : HEADER_ITEMS + 2]
            if level and type(irq) is int:
                self._rise(step, irq)
        elif kind == APIC_MESSAGE and not step.ring.cpu:
            vector, mode = items[HEADER_ITEMS : HEADER_ITEMS + 2]
            if mode in (FIXED, LOWEST, NMI) and type(vector) is int:
                key = step.node, NMI_VECTOR if mode == NMI else vector
                if len(self._pending) < VECTORS_MAX:
                    self._pending.setdefault(key, step.begin_ns)
        elif kind == INTR:
            if items[HEADER_ITEMS]:
                self._int_ns.setdefault(step.node, step.begin_ns)
            else:
                self._int_ns.pop(step.node, None)

    def _rise(self, step: Step, irq: int) -> None:
        line = self.line(irq)
        items = step.items
        assert items is not None
        source = str(items[HEADER_ITEMS + 2]) if len(items) > HEADER_ITEMS + 2 else step.record.name
        if source not in line.sources and len(line.sources) < SOURCES_MAX:
            line.sources.append(source)
        rises = self._rises.setdefault(line.irq, {})
        rise = rises.get(step.chain)
        if rise is None:
            rise = rises[step.chain] = _Rise(step.queued_ns or step.begin_ns)
            if len(rises) > OPEN_MAX:
                oldest = next(iter(rises))
                self._over(line, rises.pop(oldest))
        if step.ring.name == self._first.setdefault(line.irq, step.ring.name):  # all controllers are told
            line.rises += 1
            rise.count += 1

    def _mark(self, step: Step) -> None:
        if step.record.kind == MARK and step.record.name == "irq":
            irq = step.record.one
            self.line(irq).sent += 1
            rises = self._rises.get(irq)
            if rises:
                rise = rises.get(step.chain)
                (rise if rise is not None else rises[next(reversed(rises))]).sent = True

    def _vector(self, step: Step) -> None:
        vector, cpu = step.record.flags, step.node
        way, irq = step.way, step.irq
        if way == "8259":
            self._int_ns.pop(cpu, None)
        else:
            self._pending.pop((cpu, vector), None)
            if irq < 0:
                way = "own" if step.chain >> 40 == OWN else "message"
        key = irq, vector, way
        if key not in self.vectors and len(self.vectors) >= VECTORS_MAX:
            key = -1, vector, "own"
        use = self.vectors.setdefault(key, Vector(*key))
        use.count += 1
        if irq >= 0:
            rises = self._rises.get(irq, {})
            found = [rise for c in (step.chain, *step.also) if (rise := rises.pop(c, None)) is not None]
            if found:
                use.latency.add(step.begin_ns - min(rise.at_ns for rise in found))
                self.line(irq).delivered += sum(rise.count for rise in found)
            else:
                use.again += 1
        if way != "8259" and vector != NMI_VECTOR:
            before = self._service.get((cpu, vector))
            if before is not None:
                _unended(*before)
            self._service[cpu, vector] = use, step.begin_ns

    def _eoi(self, step: Step) -> None:
        found = self._service.pop((step.node, step.record.flags), None)
        if found is not None:
            use, begin_ns = found
            use.handled.add(step.begin_ns - begin_ns)

    def _over(self, line: LineUse, rise: _Rise) -> None:
        if rise.sent:
            line.first_lost_ns = line.first_lost_ns or rise.at_ns
            line.lost += rise.count
        else:
            line.first_ignored_ns = line.first_ignored_ns or rise.at_ns
            line.ignored += rise.count

    def end(self) -> None:
        """The trace is over."""
        for irq, rises in self._rises.items():
            for rise in rises.values():
                self._over(self.line(irq), rise)
        self._rises.clear()
        for use, begin_ns in self._service.values():
            _unended(use, begin_ns)
        self._service.clear()
        self.unsent = [(cpu, vector, at_ns) for (cpu, vector), at_ns in self._pending.items()]
        self.unacknowledged_ns = min(self._int_ns.values(), default=0)


def _unended(use: Vector, begin_ns: int) -> None:
    use.unended += 1
    use.first_unended_ns = use.first_unended_ns or begin_ns
