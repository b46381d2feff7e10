"""Who answers at which port, memory-mapped address and interrupt line.

The launcher builds the map from the machine file and the devices' declarations; the CPU node gets it as
plain data. Overlaps and a second driver of an ISA line are refused by name.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec.structs import asdict

from bus.mirror import slots
from bus.ranges import WIDTHS, IoRange, MmioRange, PortRange, Space

LIMIT: dict[Space, int] = {"port": 0x1_0000, "mmio": 0x1_0000_0000}
ISA_LINES = 16


class MapConflict(ValueError):
    """Two devices claim the same addresses or the same line, or a claim lies outside the space."""


class Entry(msgspec.Struct, frozen=True):
    """One register range of one device at its place. `mirror_slots`: slot in the device's mirror page by
    offset; `mirror_page`: index of that page, None for a device without mirrored registers."""

    node: str
    base: int
    range: IoRange
    mirror_page: int | None
    mirror_slots: dict[int, int]

    @property
    def space(self) -> Space:
        return self.range.SPACE

    @property
    def end(self) -> int:
        """First address after the range."""
        return self.base + self.range.length

    def __str__(self) -> str:
        digits = 4 if self.space == "port" else 8
        return f"{self.space} {self.base:0{digits}x}-{self.end - 1:0{digits}x}"


class AddressMap:
    """Ports, memory-mapped ranges and ISA lines of one machine."""

    def __init__(self) -> None:
        self._entries: dict[Space, list[Entry]] = {"port": [], "mmio": []}  # sorted by base
        self._bases: dict[Space, list[int]] = {"port": [], "mmio": []}
        self._lines: dict[int, tuple[str, str]] = {}

    def add_device(
        self, node: str, ranges: Iterable[IoRange], bases: dict[str, int], mirror_page: int | None
    ) -> None:
        """Place all ranges of a device; `bases` gives the base address of each by name.

        Raises MapConflict; a missing or unknown region name is one, too.
        """
        ranges = tuple(ranges)
        names = [r.name for r in ranges]
        if set(names) != set(bases):
            wrong = sorted(set(names) ^ set(bases))
            raise MapConflict(f"{node}: base addresses wanted for regions {names}, wrong or missing: {wrong}")
        slot_of = slots(ranges)
        for r in ranges:
            own = {offset: slot for (region, offset), slot in slot_of.items() if region == r.name}
            self._add(Entry(node, bases[r.name], r, mirror_page if own else None, own))

    def add_line(self, node: str, line: str, irq: int) -> None:
        """Make `node` the driver of an ISA line. ISA lines are edge-triggered, so they are exclusive."""
        if not 0 <= irq < ISA_LINES or irq == 2:
            raise MapConflict(f"{node}: IRQ {irq} of line {line!r} is not an ISA line (0, 1, 3 to 15)")
        if irq in self._lines:
            other_node, other_line = self._lines[irq]
            raise MapConflict(f"IRQ {irq}: both {other_node} ({other_line}) and {node} ({line}) drive it")
        self._lines[irq] = (node, line)

    def find(self, space: Space, address: int) -> Entry | None:
        """The entry that contains the address."""
        i = bisect_right(self._bases[space], address) - 1
        if i < 0:
            return None
        entry = self._entries[space][i]
        return entry if address < entry.end else None

    def entries(self, space: Space) -> tuple[Entry, ...]:
        return tuple(self._entries[space])

    def lines(self) -> dict[int, tuple[str, str]]:
        """ISA line -> (node, line name)."""
        return dict(sorted(self._lines.items()))

    def describe(self) -> str:
        """The table that `launcher check` prints."""
        rows = [("where", "device", "region", "widths", "class of I/O")]
        for space in ("port", "mmio"):
            rows += [
                (str(e), e.node, e.range.name, ",".join(map(str, e.range.widths)), _classes(e.range))
                for e in self._entries[space]
            ]
        rows += [(f"IRQ {irq}", node, line, "", "edge, ISA") for irq, (node, line) in self.lines().items()]
        sizes = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(map(str.ljust, row, sizes)).rstrip() for row in rows)

    def to_plain(self) -> dict[str, Any]:
        """Plain data for from_plain in another process."""
        return {
            "entries": [
                {
                    "node": e.node,
                    "base": e.base,
                    "space": e.space,
                    "mirror_page": e.mirror_page,
                    "mirror_slots": [list(pair) for pair in e.mirror_slots.items()],
                    "range": {k: _plain(v) for k, v in asdict(e.range).items()},
                }
                for space in ("port", "mmio")
                for e in self._entries[space]
            ],
            "lines": [[irq, node, line] for irq, (node, line) in self.lines().items()],
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> AddressMap:
        new = cls()
        for e in plain["entries"]:
            kind = PortRange if e["space"] == "port" else MmioRange
            r = dict(e["range"])
            r["widths"] = tuple(r["widths"])
            for label in ("posted", "prompt", "mirrored", "relaxed", "own"):
                r[label] = frozenset(r[label])
            r["latched"] = tuple((offset, setter) for offset, setter in r["latched"])
            r["names"] = dict(r.get("names", ()))
            slot_of = dict(e["mirror_slots"])
            new._add(Entry(e["node"], e["base"], kind(**r), e["mirror_page"], slot_of))
        for irq, node, line in plain["lines"]:
            new.add_line(node, line, irq)
        return new

    def _add(self, entry: Entry) -> None:
        name, space = f"{entry.node}.{entry.range.name}", entry.space
        if entry.base < 0 or entry.end > LIMIT[space]:
            raise MapConflict(f"{name}: {entry} lies outside the {space} space")
        if entry.base % max(w for w in WIDTHS if w in entry.range.widths):
            raise MapConflict(f"{name}: base {entry.base:#x} is not aligned to its widest access")
        for other in self._entries[space]:
            low, high = max(entry.base, other.base), min(entry.end, other.end)
            if low < high:
                raise MapConflict(
                    f"{space} {low:#x}-{high - 1:#x}: both {other.node}.{other.range.name} ({other}) "
                    f"and {name} ({entry}) claim it"
                )
        i = bisect_right(self._bases[space], entry.base)
        self._bases[space].insert(i, entry.base)
        self._entries[space].insert(i, entry)


def _plain(value: Any) -> Any:
    if isinstance(value, frozenset):
        return sorted(value)
    return [list(pair) for pair in value.items()] if isinstance(value, dict) else value


def _classes(r: IoRange) -> str:
    latched = {offset for offset, _ in r.latched}
    parts = [
        f"{label} +{','.join(f'{offset:x}' for offset in sorted(offsets))}"
        for label, offsets in (("posted", r.posted), ("mirrored", r.mirrored), ("latched", latched))
        if offsets
    ]
    return "; ".join(parts) or "synchronous"
