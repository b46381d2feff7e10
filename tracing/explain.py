"""What a trace tells: the slowest chains, the busiest registers, interrupts, who waited for whom, what is
lacking. Read in one pass; memory stays bounded, whatever is in the trace.

Text of it: tracing/explaintext.py; pictures: tracing/report.py. Interrupts: tracing/interrupts.py.
Left out: ends of interrupts at an 8259 (they are writes like others), and why a process worked so long.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappush, heappushpop

from bus.frames import TABLE
from bus.recorder import LONG, WRITE
from tracing.activity import Activity
from tracing.chains import Chain, Step, chains, steps
from tracing.file import Trace
from tracing.histogram import Histogram
from tracing.interrupts import Interrupts
from tracing.legs import Slow, shown
from tracing.steps import KIND, NamesSymbols

OF_A_KIND = 3  # slowest chains of one kind
KINDS_MAX, REGISTERS_MAX, PAIRS_MAX, REASONS_MAX, PROCESSES_MAX = 500, 20_000, 2_000, 200, 1_000
LONG_CHAIN = 500  # steps: of a chain above, only what is to be shown is kept
OTHERS = "others"
WAYS = ("posted", "mirrored", "synchronous", "open-bus", "split", "unsent")
_NUMBER = re.compile(r"\b0x[0-9a-fA-F]+\b|(?<![\w])\d+\b")


@dataclass(slots=True)
class Register:
    name: str  # "uart0 THR", "port 0x80"
    node: str  # "" where nobody is
    write: bool
    ways: dict[str, int] = field(default_factory=dict)
    units: int = 0  # of strings: elements
    waited: Histogram = field(default_factory=Histogram)  # the CPU, for answers

    @property
    def count(self) -> int:
        return sum(self.ways.values())


@dataclass(slots=True)
class Pair:
    """Frames of one sender that one receiver took."""

    sender: str
    receiver: str
    size: int = 0  # bytes of frames
    kinds: dict[str, int] = field(default_factory=dict)
    undone: int = 0
    queued: Histogram = field(default_factory=Histogram)  # from sent to taken
    handled: Histogram = field(default_factory=Histogram)  # from taken to done

    @property
    def count(self) -> int:
        return sum(self.kinds.values())


@dataclass(slots=True)
class Kind:
    """Chains that begin with the same thing."""

    name: str
    node: str
    incomplete: int = 0
    took: Histogram = field(default_factory=Histogram)
    slowest: list[tuple[int, int, Chain | Slow]] = field(default_factory=list)  # a heap

    @property
    def shown(self) -> list[Slow]:
        """The slowest first."""
        return [
            shown(chain, self.name) if isinstance(chain, Chain) else chain
            for _, _, chain in sorted(self.slowest, key=lambda entry: (-entry[0], entry[1]))
        ]


@dataclass(slots=True)
class Reason:
    """Why chains are not complete."""

    why: str  # numbers left out
    count: int
    example: str
    at_ns: int
    chain: int


@dataclass(slots=True)
class Replaced:
    node: str
    before: int  # pid
    after: int
    at_ns: int
    title: str


class Explained:
    """All of it, and how it is found. Times are CLOCK_MONOTONIC in ns."""

    def __init__(self, trace: Trace) -> None:
        self.path = trace.path
        self.meta = trace.meta
        self.begin_ns = self.end_ns = 0
        self.steps = 0
        self.chains = self.incomplete = 0
        self.alone = 0  # chains of one mirrored or open-bus access
        self.accesses = self.accesses_incomplete = 0
        self.kinds: dict[str, Kind] = {}
        self.pairs: dict[tuple[str, str], Pair] = {}
        self.waited: dict[str, Histogram] = {}  # device -> how long the CPU waited for its answers
        self.reasons: dict[str, Reason] = {}
        self.replaced: list[Replaced] = []
        self.interrupts = Interrupts()
        self.activity = Activity()
        self.lost: dict[str, int] = {}  # ring -> records
        self.complaints: list[str] = []
        self._registers: dict[int, tuple[Register, dict[str, int]]] = {}  # address, width, direction
        self._named: dict[tuple[str, bool], Register] = {}
        self._pids: dict[str, int] = {}

    @property
    def registers(self) -> list[Register]:
        """The busiest first."""
        return sorted(self._named.values(), key=lambda r: (-r.count, r.name, r.write))

    def slowest(self, top: int) -> list[Slow]:
        """At most OF_A_KIND of each kind."""
        found = [(-took, number, kind, chain) for kind in self.kinds.values()
                 for took, number, chain in kind.slowest]  # fmt: skip
        found.sort(key=lambda entry: entry[:2])
        return [
            shown(chain, kind.name) if isinstance(chain, Chain) else chain
            for _, _, kind, chain in found[:top]
        ]

    # --- steps, as they pass

    def watch(self, steps: Iterator[Step]) -> Iterator[Step]:
        tick = self.activity.add
        interrupt = self.interrupts.table.get
        registers = self._registers
        last_ns = begin_ns = 0
        for count, step in enumerate(steps, 1):
            kind = step.kind
            at_ns = step.begin_ns
            if not begin_ns:
                self.begin_ns = begin_ns = at_ns
            last_ns = max(last_ns, at_ns, step.end_ns)
            tick(step.ring.node, at_ns)
            if kind == "access" or kind == "open-bus":
                record = step.record
                found = registers.get(record.one << 5 | record.flags & 31)
                register, ways = found if found is not None else self._register(step)
                ways[step.way] = ways.get(step.way, 0) + 1
                if step.way == "synchronous":
                    self._synchronous(step, register)
                if record.flags & LONG:
                    register.units += record.two
            elif kind == "frame":
                self._frame(step)
            elif kind == "process":
                self._process(step)
            elif kind == "lost":
                self.lost[step.ring.name] = self.lost.get(step.ring.name, 0) + step.record.number
            note = interrupt(kind)
            if note is not None:
                note(step)
            self.end_ns, self.steps = last_ns, count
            yield step

    def _register(self, step: Step) -> tuple[Register, dict[str, int]]:
        place, record = step.place, step.record
        assert place is not None
        key = place.name, bool(record.flags & WRITE)
        if key not in self._named and len(self._named) >= REGISTERS_MAX:
            key = OTHERS, key[1]
        if key not in self._named:
            self._named[key] = Register(key[0], place.node if key[0] != OTHERS else "", key[1])
        register = self._named[key]
        found = register, register.ways
        if len(self._registers) < REGISTERS_MAX:
            self._registers[record.one << 5 | record.flags & 31] = found
        return found

    def _synchronous(self, step: Step, register: Register) -> None:
        place = step.place
        if step.end_ns and place is not None:
            took_ns = step.end_ns - step.begin_ns
            register.waited.add(took_ns)
            waited = self.waited.get(place.node)
            if waited is None:
                waited = self.waited[place.node] = Histogram()
            waited.add(took_ns)

    def _frame(self, step: Step) -> None:
        key = step.record.name, step.ring.name
        pair = self.pairs.get(key)
        if pair is None:
            if len(self.pairs) >= PAIRS_MAX:
                key = OTHERS, OTHERS
            pair = self.pairs.setdefault(key, Pair(*key))
        items = step.items
        row = TABLE.get(items[KIND]) if items is not None else None
        kind = row[0].__name__ if row is not None else "?"
        pair.kinds[kind] = pair.kinds.get(kind, 0) + 1
        pair.size += step.record.number
        if step.queued_ns:
            pair.queued.add(step.begin_ns - step.queued_ns)
        if step.ring.cpu:
            return
        if step.end_ns:
            pair.handled.add(step.end_ns - step.begin_ns)
            self.activity.busy(step.ring.node, step.begin_ns, step.end_ns)
        else:
            pair.undone += 1

    def _process(self, step: Step) -> None:
        if step.way:  # it goes on with what the one before it had begun
            return
        before, after = self._pids.get(step.ring.name), step.record.number
        self._pids[step.ring.name] = after
        if before is not None and len(self.replaced) < PROCESSES_MAX:
            title = step.record.name
            self.replaced.append(Replaced(step.ring.name, before, after, step.begin_ns, title))

    # --- chains

    def chain(self, chain: Chain) -> None:
        self.chains += 1
        complete = chain.complete
        root = chain.steps[0]
        accesses = 0
        if chain.id == 0:
            self.alone += 1
            accesses = root.kind in ("access", "open-bus")
        else:
            accesses = sum(step.kind == "access" for step in chain.steps)
            kind = self._kind(root)
            took_ns = chain.end_ns - root.begin_ns
            kind.took.add(took_ns)
            kind.incomplete += not complete
            if len(kind.slowest) < OF_A_KIND or took_ns > kind.slowest[0][0]:
                kept = chain if len(chain.steps) <= LONG_CHAIN else shown(chain, kind.name)
                entry = took_ns, -self.chains, kept
                if len(kind.slowest) < OF_A_KIND:
                    heappush(kind.slowest, entry)
                else:
                    heappushpop(kind.slowest, entry)
        self.accesses += accesses
        if not complete:
            self.incomplete += 1
            self.accesses_incomplete += accesses
            self._reason(chain)

    def _kind(self, root: Step) -> Kind:
        node, record, kind = root.node, root.record, root.kind
        if (place := root.place) is not None:
            node = place.node or node
            name = f"{place.name} {'written' if record.flags & WRITE else 'read'}"
        elif kind == "frame":
            name = f"{node} {_frame_name(root)} from {record.name}"
        elif kind == "vector":
            name = f"{node} vector {record.flags:#x}"
        else:
            name = f"{node} {kind} {record.name}".rstrip()
        found = self.kinds.get(name)
        if found is None:
            if len(self.kinds) >= KINDS_MAX:
                name, node = OTHERS, ""
            found = self.kinds.setdefault(name, Kind(name, node))
        return found

    def _reason(self, chain: Chain) -> None:
        why = chain.why_not
        general = _NUMBER.sub("…", why)
        if general not in self.reasons and len(self.reasons) >= REASONS_MAX:
            general = OTHERS
        reason = self.reasons.get(general)
        if reason is None:
            self.reasons[general] = Reason(general, 1, why, chain.begin_ns, chain.id)
        else:
            reason.count += 1


def _frame_name(step: Step) -> str:
    row = TABLE.get(step.items[KIND]) if step.items is not None else None
    return row[0].__name__ if row is not None else "frame"


def explain(trace: Trace, symbols: NamesSymbols | None = None) -> Explained:
    """Reads all of the trace, up to its damage if it has any: that is in `complaints`."""
    found = Explained(trace)
    collecting = gc.isenabled()
    gc.disable()  # what passes by holds no circles, and looking for some takes a third of the time
    try:
        for chain in chains(found.watch(steps(trace, symbols))):
            found.chain(chain)
    finally:
        if collecting:
            gc.enable()
    found.interrupts.end()
    found.complaints = list(trace.complaints)
    return found
