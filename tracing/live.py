"""The steps of a machine that runs, a moment after they were done: for `launcher trace --follow`.

In turns: what has settled in each ring since the last turn is read, joined, and put in order of time. A step
whose batch or answer comes in the next turn comes with that, so a step may come behind a later one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from bus import recorder
from bus.recorder import BLOCK_BEGINS
from tracing.drain import SETTLE_NS
from tracing.joining import Filter, Linker, kept
from tracing.meta import Meta
from tracing.records import Damage, Reader, Record
from tracing.rings import Ring
from tracing.ringsteps import CpuSteps, device_steps
from tracing.steps import NamesSymbols, Naming, RingOf, Step

BEGINS = (recorder.FRAME, recorder.TIMER, recorder.INPUT, recorder.DISK_DONE, recorder.PROCESS)


class Tail:
    """The records of one ring, as they settle. `lost`: so many were overwritten before they were read."""

    def __init__(self, ring: Ring, position: int) -> None:
        """From a position on at which a block begins."""
        self._ring, self._position = ring, position
        self._reader = Reader()
        self._counted: int | None = None  # records before the next one; None: not known yet
        self.lost = 0

    def records(self, upto: int) -> Iterator[Record]:
        """Those before a position. Where some are lost comes a BLOCK_BEGINS; its `number` says how many."""
        for position, data in self._ring.pieces(self._position, upto):
            self._position = position
            try:
                for record in self._reader.records(data):
                    if record.kind != BLOCK_BEGINS:
                        self._counted = None if self._counted is None else self._counted + 1
                        yield record
                        continue
                    lost = 0 if self._counted is None else record.one - self._counted
                    self._counted = record.one
                    if lost > 0:
                        self.lost += lost
                        yield record._replace(number=lost)
            except Damage:  # overwritten while it was copied
                continue
        self._position = upto


class Live:
    """All rings of a machine. `records` are those of the last turn, by ring, in the order of each ring."""

    def __init__(
        self,
        rings: Sequence[Ring],
        meta: Meta,
        symbols: NamesSymbols | None = None,
        keep: Filter | None = None,
    ) -> None:
        self._rings = rings
        self._tails = [Tail(ring, ring.oldest) for ring in rings]
        self._seen: deque[tuple[int, list[int]]] = deque()  # when, where the rings ended
        naming = Naming(meta, symbols)
        self._of = [RingOf(name, naming) for name in meta.rings]
        self._cpus = {number: CpuSteps(ring) for number, ring in enumerate(self._of) if ring.cpu}
        self._carried: list[list[Record]] = [[] for _ in rings]  # the last step, which may not be complete
        self._linker = Linker(meta.rings)
        self._since_ns, self._keep = meta.since_ns, keep
        self.records: list[list[Record]] = [[] for _ in rings]

    @property
    def lost(self) -> int:
        return sum(tail.lost for tail in self._tails)

    def read(self, finish: bool = False) -> None:
        """Read what has settled; with `finish` everything. In `records`."""
        now_ns = time.monotonic_ns()
        self._seen.append((now_ns, [ring.tail for ring in self._rings]))
        settled = self._seen[-1][1] if finish else None
        while not finish and self._seen[0][0] <= now_ns - SETTLE_NS:
            settled = self._seen.popleft()[1]
        for number, tail in enumerate(self._tails):
            self.records[number] = [] if settled is None else list(tail.records(settled[number]))

    def steps(self, finish: bool = False) -> Iterator[Step]:
        """Of what was read last, in order of time."""
        found: list[Step] = []
        for number, records in enumerate(self.records):
            if number in self._cpus:
                found += self._cpus[number].steps(iter(records), more=not finish)
            else:
                found += device_steps(self._of[number], iter(self._whole(number, records, finish)))
        found.sort(key=lambda step: step.begin_ns)
        linked: Iterable[Step] = (s for s in self._linker.link(found) if s.begin_ns >= self._since_ns)
        yield from linked if self._keep is None else kept(linked, self._keep)

    def _whole(self, number: int, records: list[Record], finish: bool) -> list[Record]:
        """With what was carried over; without the last step, unless nothing came behind it."""
        carried, self._carried[number] = self._carried[number], []
        if finish or not records:
            return carried + records
        all_of_it = carried + records
        last = max((n for n, record in enumerate(all_of_it) if record.kind in BEGINS), default=0)
        self._carried[number] = all_of_it[last:]
        return all_of_it[:last]
