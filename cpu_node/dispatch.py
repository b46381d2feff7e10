"""Dispatch tables: guest address to host code, 8 bytes for each of the 4 Gi addresses of a context.

An entry is a cache of "this linear address is this line's code"; it falls with the mapping (as a TLB entry
does) or with the line. An empty entry is zero: jumping there faults at address 0, which is the miss.
Most of a table is never touched and costs no memory.
"""

from __future__ import annotations

from cpu_node import host_unsafe as host
from cpu_node import layout as at
from cpu_node.line import Line
from cpu_node.paging import US, P

_free: list[int] = list(range(at.TABLE_COUNT - 1, -1, -1))


class Table:
    """The dispatch table of one context (an address space at one privilege level and code mode)."""

    def __init__(self) -> None:
        self.index = _free.pop()
        self.ha = at.TABLES + self.index * at.TABLE_SIZE
        host.map_anonymous(self.ha, at.TABLE_SIZE, host.PROT_READ | host.PROT_WRITE)
        self.entries = host.view64(self.ha, 1 << 32)
        self.lines: dict[int, Line] = {}  # by linear page number
        self.crossing: dict[int, Line] = {}  # by linear address
        self.crossing_into: dict[int, set[int]] = {}  # second page -> addresses
        self.filled: dict[int, list[int]] = {}  # linear page number -> addresses with an entry

    def set(self, va: int, host_offset: int) -> None:
        """Enter host code for `va`, whose entry is empty."""
        self.entries[va] = at.CODE + host_offset
        filled = self.filled.get(va >> 12)
        if filled is None:
            self.filled[va >> 12] = [va]
        else:
            filled.append(va)

    def add(self, line: Line) -> None:
        """Take a line in: its page is mapped there now. What is known to be jumped to gets its entry."""
        line.tables.add(self)
        if line.starts == 1:
            self.crossing[line.va] = line
            self.crossing_into.setdefault((line.va >> 12) + 1 & 0xFFFFF, set()).add(line.va)
            return
        self.lines[line.va >> 12] = line
        if line.entries:
            entries, va, filled = self.entries, line.va, self.filled.setdefault(line.va >> 12, [])
            for offset, place in line.entries.items():
                if not entries[va + offset]:
                    entries[va + offset] = at.CODE + place
                    filled.append(va + offset)

    def drop_page(self, va_page: int) -> None:
        """The mapping of a page may have changed: forget its entries."""
        line = self.lines.pop(va_page, None)
        if line is not None:
            line.tables.discard(self)
        entries = self.entries
        for va in self.filled.pop(va_page, ()):
            entries[va] = 0
            crossing = self.crossing.pop(va, None)
            if crossing is not None:
                crossing.tables.discard(self)
        for va in self.crossing_into.pop(va_page, ()):
            crossing = self.crossing.pop(va, None)
            if crossing is not None:
                crossing.tables.discard(self)
                entries[va] = 0

    def drop_unless(self, va_page: int, pa_page: int) -> None:
        """Forget a page's entries unless its code is that of `pa_page` and no instruction runs into it."""
        line = self.lines.get(va_page)
        if line is None or line.pa_pages[0] != pa_page or va_page in self.crossing_into:
            self.drop_page(va_page)

    def drop_changed(self, pages: list[tuple[int, int]], bigs: list[int], user: bool) -> None:
        """Forget pages whose page-table entries no longer lead to their code; `bigs`: 4 MiB pages, wholly."""
        for va_page, entry in pages:
            if va_page in self.filled or va_page in self.crossing_into:
                kept = entry & P and (entry & US or not user)
                self.drop_unless(va_page, entry >> 12 if kept else -1)
        if bigs:
            gone = set(bigs)
            for va_page in [p for p in {*self.lines, *self.crossing_into, *self.filled} if p >> 10 in gone]:
                self.drop_page(va_page)

    def drop_line(self, line: Line) -> None:
        """A line is no more."""
        if line.starts == 1:
            if self.crossing.pop(line.va, None) is not None:
                self.entries[line.va] = 0
        elif self.lines.get(line.va >> 12) is line:
            self.drop_page(line.va >> 12)

    def clear(self) -> None:
        """Forget everything."""
        for line in (*self.lines.values(), *self.crossing.values()):
            line.tables.discard(self)
        self.lines.clear()
        self.crossing.clear()
        self.crossing_into.clear()
        self.filled.clear()
        host.map_anonymous(self.ha, at.TABLE_SIZE, host.PROT_READ | host.PROT_WRITE)

    def close(self) -> None:
        """Give the address space back."""
        self.clear()
        self.entries.release()
        host.reserve(self.ha, at.TABLE_SIZE)
        _free.append(self.index)
