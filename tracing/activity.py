"""How much each process did over time, in bins that get wider as the trace gets longer."""

from __future__ import annotations

from dataclasses import dataclass, field

BINS = 480  # at most; at least half of them are used of a trace longer than BINS * FIRST_NS
FIRST_NS = 100_000
NODES_MAX = 200


@dataclass(slots=True)
class Row:
    steps: list[int] = field(default_factory=lambda: [0] * BINS)
    busy_ns: list[int] = field(default_factory=lambda: [0] * BINS)  # handled frames


class Activity:
    """`rows`: by node. The first bin begins at `begin_ns`."""

    def __init__(self) -> None:
        self.begin_ns = 0
        self.bin_ns = FIRST_NS
        self.rows: dict[str, Row] = {}
        self._used = 0

    @property
    def bins(self) -> int:
        """How many are in use."""
        return self._used

    def add(self, node: str, at_ns: int) -> None:
        row = self.rows.get(node)
        if row is None:
            row = self._row(node, at_ns)
        place = (at_ns - self.begin_ns) // self.bin_ns
        if place >= self._used:
            place = self._grow(at_ns)
        row.steps[max(place, 0)] += 1

    def busy(self, node: str, begin_ns: int, end_ns: int) -> None:
        """Of a step that add() was told of."""
        row = self._row(node, begin_ns)
        at_ns = max(begin_ns, self.begin_ns)
        while at_ns < end_ns:
            place = (at_ns - self.begin_ns) // self.bin_ns
            if place >= self._used:
                place = self._grow(at_ns)
            until_ns = min(end_ns, self.begin_ns + (place + 1) * self.bin_ns)
            row.busy_ns[place] += until_ns - at_ns
            at_ns = until_ns

    def _row(self, node: str, at_ns: int) -> Row:
        if not self.rows:
            self.begin_ns = at_ns
        if node not in self.rows and len(self.rows) >= NODES_MAX:
            node = "others"
        return self.rows.setdefault(node, Row())

    def _grow(self, at_ns: int) -> int:
        while (place := (at_ns - self.begin_ns) // self.bin_ns) >= BINS:
            self.bin_ns *= 2
            for row in self.rows.values():
                row.steps = _halved(row.steps)
                row.busy_ns = _halved(row.busy_ns)
            self._used = (self._used + 1) // 2
        self._used = max(self._used, place + 1)
        return place


def _halved(bins: list[int]) -> list[int]:
    return [a + b for a, b in zip(bins[::2], bins[1::2], strict=True)] + [0] * (BINS // 2)
