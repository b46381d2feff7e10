"""Which page-table pages something was derived from, and what of it they no longer support.

Write-protecting page tables would cost a fault for each write; comparing the few pages a context depends on
with copies costs a quarter of a microsecond each, when a TLB flush says that it must be done.
"""

from __future__ import annotations

from cpu_node.paging import FRAME, PS, RW, US, A, D, P, PhysicalMemory

RIGHTS = P | RW | US | PS
_MOST_AGREED = 64  # directories, each of 4 KiB


class Watch:
    """The page-table entries behind a set of linear pages."""

    def __init__(self, memory: PhysicalMemory) -> None:
        self.memory = memory
        self.pdes: dict[int, int] = {}  # linear 4 MiB page -> its directory entry
        self._tables: dict[int, bytearray] = {}  # page table (pa) -> content last compared or derived from
        self._covers: dict[int, set[int]] = {}  # page table (pa) -> linear 4 MiB pages it maps
        self._agreed: dict[int, bytes] = {}  # cr3 -> a content that grants all that `pdes` do
        # What was derived from an entry that had become another when it was used again, before a comparison:
        self._again: set[tuple[int, int]] = set()  # (page table, index)
        self._bigs_again: set[int] = set()  # linear 4 MiB pages

    def add(self, va: int, entry_pa: int, cr3: int, count: int = 1) -> None:
        """`va` was walked in directory `cr3`; `count` leaf entries from `entry_pa` on are made use of.

        What they are now is what later changes are measured against: an entry that came and went between two
        comparisons must not look as if nothing had happened.
        """
        va_big, table = va >> 22, entry_pa & FRAME
        pde = int(self.memory.dwords[(cr3 >> 2) + va_big])
        old = self.pdes.get(va_big)
        if old != pde:
            if old is not None and claims_more(old, pde):
                self._bigs_again.add(va_big)
            self.pdes[va_big] = pde
            self._agreed.clear()
        if not pde & PS:
            ram, copy = self.memory.ram, self._tables.get(table)
            if copy is None:
                self._tables[table] = bytearray(ram[table : table + 4096])
            else:
                first, last = entry_pa - table, entry_pa - table + 4 * count
                now = ram[entry_pa : table + last]
                if copy[first:last] != now:
                    if count > 1 or copy[first] & P:  # one that wasn't there is what a page fault leaves
                        self._note_replaced(table, first >> 2, copy[first:last], now)
                    copy[first:last] = now
            covers = self._covers.get(table)
            if covers is None:
                self._covers[table] = {va_big}
            elif va_big not in covers:
                covers.add(va_big)

    def _note_replaced(self, table: int, index: int, before: bytearray, now: bytes) -> None:
        pairs = zip(memoryview(before).cast("I"), memoryview(now).cast("I"), strict=True)
        for k, (old, new) in enumerate(pairs):
            if old & P and ((old ^ new) & FRAME or old & ~new & (P | RW | US | A | D)):
                self._again.add((table, index + k))

    def changes(self, cr3: int) -> tuple[list[tuple[int, int]], list[int]]:
        """What differs from the last call, seen through directory `cr3`.

        (linear page, its entry now) for changed entries of page tables, and the linear 4 MiB pages whose
        directory entries grant something else; those are forgotten.
        """
        ram = self.memory.ram
        if not self._again and ram[cr3 : cr3 + 4096] == self._agreed.get(cr3):
            for table, copy in self._tables.items():
                if ram[table : table + 4096] != copy:
                    break
            else:
                return [], []
        pages = [(va_big << 10 | index, int(self.memory.dwords[(table >> 2) + index]))
                 for table, index in self._again for va_big in self._covers.get(table, ())]
        for table, copy in list(self._tables.items()):
            now = ram[table : table + 4096]
            if now != copy:
                self._tables[table] = bytearray(now)
                changed = [d for d in _differences(copy, now) if (table, d[0]) not in self._again]
                for va_big in self._covers[table]:
                    pages += [(va_big << 10 | index, new) for index, new in changed]
        self._again.clear()
        now = ram[cr3 : cr3 + 4096]
        if now == self._agreed.get(cr3):
            return pages, []
        if len(self._agreed) >= _MOST_AGREED:
            self._agreed.clear()
        self._agreed[cr3] = now
        entries = memoryview(now).cast("I")
        bigs = [va_big for va_big, old in self.pdes.items()
                if va_big in self._bigs_again or claims_more(old, entries[va_big])]
        self._bigs_again.clear()
        for va_big in bigs:
            self._forget(va_big)
        return pages, bigs

    def _forget(self, va_big: int) -> None:
        del self.pdes[va_big]
        for table, covered in list(self._covers.items()):
            covered.discard(va_big)
            if not covered:
                del self._covers[table], self._tables[table]

    def clear(self) -> None:
        """Forget everything."""
        self.pdes.clear()
        self._tables.clear()
        self._covers.clear()
        self._agreed.clear()
        self._again.clear()
        self._bigs_again.clear()


def claims_more(old: int, new: int) -> bool:
    """Did a directory entry change in what it grants or where it points?"""
    return bool((old ^ new) & (RIGHTS | FRAME) or (old & PS and old & ~new & (A | D)))


def _differences(old: bytearray, new: bytes) -> list[tuple[int, int]]:
    """(index, entry now) where page-table pages differ."""
    out = []
    for base in range(0, 4096, 256):
        if old[base : base + 256] != new[base : base + 256]:
            a, b = memoryview(old[base : base + 256]).cast("I"), memoryview(new[base : base + 256]).cast("I")
            out += [(base // 4 + k, int(b[k])) for k in range(64) if a[k] != b[k]]
    return out
