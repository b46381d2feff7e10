"""Windows: guest address spaces as host mappings of the memory file, filled on demand.

A Space is one page directory seen from two privileges, a window each: the kernel's shows every page, the
user's only pages with U/S. A window is a cache of the page tables as a TLB is: entries may vanish at any
time, must be gone after INVLPG or a CR3 load, and are never wider than the guest's rights with A (and, for
writing, D) set. Pages that hold translated code are mapped read-only.
A space that was left is kept; `resync` compares the page-table pages it was filled from before it is used
again. A page that is dropped is made inaccessible and remembered ("hidden"): guests often want it back as it
was, and rights are changed at a quarter of the price of a mapping. Hidden pages are unmapped in bulk.
Left out: mappings shared between windows; write tracking of page tables (comparing is cheaper than a fault).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from cpu_node import host_unsafe as host
from cpu_node import layout as at
from cpu_node.code_pages import CodePages, runs
from cpu_node.direct.policy import Pace
from cpu_node.mmu_choice import GOAL_NS
from cpu_node.paging import FRAME, PS, RW, US, A, D, P, PhysicalMemory, Walker
from cpu_node.touched import Touched
from cpu_node.watch import RIGHTS, Watch, claims_more

if TYPE_CHECKING:
    from cpu_node.dispatch import Table

_AHEAD = 64  # pages mapped along with one that faulted, at most
_HIDDEN = 256  # pages of a window that are hidden, at most, before they are unmapped
_free: list[int] = list(range(at.WINDOW_COUNT - 2, 0, -1))


class Window:
    """4 GiB of host addresses for one guest address space at one privilege.

    What is shown where is kept here; the methods that tell the host (`open` to `hide`) are replaced where
    the addresses are another process's (direct/window.py).
    """

    def __init__(self, ram_fd: int, memory: PhysicalMemory, code: CodePages, user: bool) -> None:
        self.user = user
        self.fd = ram_fd
        self.memory = memory
        self.code = code
        self.small: dict[int, tuple[int, bool, int]] = {}  # linear page -> (physical page, writable, entry)
        self.big: dict[int, tuple[int, bool, int]] = {}  # linear 4 MiB page -> (frame, writable, entry)
        self.hidden: dict[int, int] = {}  # linear page -> physical page: still mapped, without any right
        self.open()

    def open(self) -> None:
        """Take host addresses."""
        self.index = _free.pop()
        self.ha = at.WINDOWS + self.index * at.WINDOW_STRIDE
        host.reserve(self.ha, 1 << 32)

    def show(self, va: int, length: int, pa: int, writable: bool, populate: bool) -> None:
        """Map memory from `pa` on at `va`."""
        prot = host.PROT_READ | (host.PROT_WRITE if writable else 0)
        host.map_file(self.ha + va, length, prot, self.fd, pa, populate)

    def reveal(self, va_page: int, pa_page: int, writable: bool) -> None:
        """Show a hidden page again."""
        self.protect(va_page << 12, 4096, writable)

    def protect(self, va: int, length: int, writable: bool) -> None:
        """Change the rights of what is shown."""
        host.protect(self.ha + va, length, host.PROT_READ | (host.PROT_WRITE if writable else 0))

    def hide(self, va: int, length: int, unmap: bool) -> None:
        """Make accesses fault; without `unmap` what was shown stays mapped."""
        if unmap:
            host.reserve(self.ha + va, length)
        else:
            host.protect(self.ha + va, length, host.PROT_NONE)

    def set_writable(self, va_page: int, pa_page: int, writable: bool) -> None:
        """Change the rights of a small page that is mapped."""
        entry = self.small[va_page][2]
        self.small[va_page] = (pa_page, writable, entry)
        self.protect(va_page << 12, 4096, writable)

    def map_small(self, va_page: int, pa_page: int, count: int, writable: bool, entries: list[int]) -> None:
        """Map a run of pages, contiguous on both sides."""
        small, rmap, hidden = self.small, self.code.small, self.hidden
        if count == 1 and hidden.get(va_page) == pa_page:
            self.reveal(va_page, pa_page, writable)
        else:
            self.show(va_page << 12, count << 12, pa_page << 12, writable, True)
        for k in range(count):
            old = small.get(va_page + k)
            if old is not None and old[0] != pa_page + k:
                self._not_at(old[0], va_page + k)
            small[va_page + k] = (pa_page + k, writable, entries[k])
            if hidden:
                hidden.pop(va_page + k, None)
            where = rmap.get(pa_page + k)
            if where is None:
                rmap[pa_page + k] = {(self, va_page + k)}
            else:
                where.add((self, va_page + k))

    def _not_at(self, pa_page: int, va_page: int) -> None:
        """A physical page is no longer mapped there."""
        rmap = self.code.small
        if len(rmap[pa_page]) == 1:
            del rmap[pa_page]
        else:
            rmap[pa_page].discard((self, va_page))

    def map_big(self, va_big: int, frame: int, count: int, writable: bool, entries: list[int]) -> None:
        """Map `count` 4 MiB pages in one go; the last may end where RAM ends."""
        va, pa = va_big << 22, frame << 22
        length = min(count << 22, self.memory.size - pa)
        if self.hidden:
            self._unmap_hidden()
        self.show(va, length, pa, writable, False)
        host.advise(self.ha + va, length, host.MADV_HUGEPAGE)
        for k in range(count):
            self.big[va_big + k] = (frame + k, writable, entries[k])
            self.code.big.setdefault(frame + k, set()).add((self, va_big + k))
        if writable:
            first, last = pa >> 12, (pa + length) >> 12
            pages = sorted(p for p in self.code.lines if first <= p < last and p not in self.code.mixed)
            for page, run in runs(pages):
                self.protect(va + (page - first << 12), run << 12, False)

    def drop_small(self, pages: Iterable[int]) -> None:
        """Hide pages, if they are mapped."""
        small, hidden = self.small, self.hidden
        gone = sorted(p for p in pages if p in small)
        for va_page in gone:
            pa_page = hidden[va_page] = small.pop(va_page)[0]
            self._not_at(pa_page, va_page)
        for va_page, run in runs(gone):
            self.hide(va_page << 12, run << 12, False)
        if len(hidden) > _HIDDEN:
            self._unmap_hidden()

    def _unmap_hidden(self) -> None:
        """Each is a mapping of the host's; where nothing else lies between them one call unmaps many."""
        taken = [*self.small]
        for va_big in self.big:
            taken += (va_big << 10, va_big << 10 | 0x3FF)  # nothing that begins outside reaches in
        pages = sorted([*((page, True) for page in self.hidden), *((page, False) for page in taken)])
        first = last = -1
        for page, is_hidden in [*pages, (1 << 20, False)]:
            if is_hidden:
                first, last = page if first < 0 else first, page
            elif first >= 0:
                self.hide(first << 12, last + 1 - first << 12, True)
                first = -1
        self.hidden.clear()

    def drop_big(self, va_big: int) -> None:
        """Unmap whatever a page-directory entry mapped."""
        old = self.big.pop(va_big, None)
        if old is not None:
            self.code.big[old[0]].discard((self, va_big))
            self.hide(va_big << 22, 1 << 22, True)
            for va_page in [p for p in self.hidden if p >> 10 == va_big]:
                del self.hidden[va_page]
        if self.small:
            first = va_big << 10
            self.drop_small([p for p in range(first, first + 1024) if p in self.small]
                            if len(self.small) > 1024 else [p for p in self.small if p >> 10 == va_big])

    def outdated(self, va_page: int, pte: int) -> bool:
        """Does the mapping of a page, made from an older entry, claim more than `pte` grants?"""
        old = self.small.get(va_page)
        if old is None:
            return False
        return bool(pte >> 12 != old[0] or old[2] & ~pte & (P | RW | US | A) or (old[1] and not pte & D))

    def update(self, changed: Iterable[tuple[int, int]]) -> None:
        """Take from mappings, made from older entries, what entries (linear page, entry) no longer grant.

        One that has lost nothing but the right to write stays readable: that is what fork does to all pages.
        """
        small, gone, kept = self.small, [], []
        for va_page, pte in changed:
            old = small.get(va_page)
            if old is None:
                continue
            pa_page, writable, entry = old
            if pte >> 12 != pa_page or entry & ~pte & (P | US | A):
                gone.append(va_page)
            elif entry & ~pte & RW or (writable and not pte & D):
                small[va_page] = (pa_page, False, entry & (pte | ~(RW | D)))
                if writable:
                    kept.append(va_page)
        if kept:
            for va_page, run in runs(sorted(kept)):
                self.protect(va_page << 12, run << 12, False)
        if gone:
            self.drop_small(gone)

    def mappings(self) -> int:
        """Host mappings, at most: each page is one, and so is the nothing between two pages."""
        small, hidden = self.small, self.hidden
        gaps = sum(p - 1 not in small and p - 1 not in hidden for pages in (small, hidden) for p in pages)
        return len(small) + len(hidden) + gaps + 2 * len(self.big) + 1

    def clear(self) -> None:
        """Unmap all."""
        for va_page, (pa_page, _, _) in self.small.items():
            self._not_at(pa_page, va_page)
        for va_big, (frame, _, _) in self.big.items():
            self.code.big[frame].discard((self, va_big))
        self.small.clear()
        self.big.clear()
        self.hidden.clear()
        self.hide(0, 1 << 32, True)

    def close(self) -> None:
        """Give the address space back."""
        self.clear()
        _free.append(self.index)


class Space:
    """One page directory (cr3 None: paging off) and its two windows."""

    def __init__(self, cr3: int | None, ram_fd: int, memory: PhysicalMemory, code: CodePages) -> None:
        self.cr3 = cr3
        self.memory = memory
        self.code = code
        self.kernel = Window(ram_fd, memory, code, user=False)
        self._user: Window | None = None
        self.direct: Window | None = None  # of the process in which user code runs directly
        self.begin(False)
        self._ram_fd = ram_fd
        self.touched = Touched(self.kernel.index)
        self.tables: dict[int, Table] = {}  # dispatch tables of user code, by mode
        self.hidden: frozenset[int] = frozenset()  # linear pages that are never mapped
        self.watch = Watch(memory)

    def begin(self, soft: bool) -> None:
        """A program is new here: how its user code runs, and what is known of its ways."""
        self.pace = Pace()
        self.soft = soft and self.cr3 is not None  # it uses the TLB (tlb.py), not a window
        self.balance_ns, self.goal_ns = 0, GOAL_NS  # mmu_choice.py

    @property
    def user(self) -> Window:
        """The window of CPL 3, made when first needed."""
        if self._user is None:
            self._user = Window(self._ram_fd, self.memory, self.code, user=True)
        return self._user

    @property
    def windows(self) -> tuple[Window, ...]:
        both = (self.kernel,) if self._user is None else (self.kernel, self._user)
        return both if self.direct is None else (*both, self.direct)

    def pages_for_child(self) -> int:
        """How many pages, about, the process that is to run user code must be shown before it starts."""
        if self._user is None:
            return 0
        return max(0, len(self._user.small) - (len(self.direct.small) if self.direct is not None else 0))

    def hides(self, va_big: int) -> bool:
        """Is a hidden page among these 4 MiB?"""
        return any(page >> 10 == va_big for page in self.hidden)

    def mappings(self, split: int) -> int:
        """Host mappings held, at most; `split`: what CodePages.splits says."""
        ours = [w for w in self.windows if w is not self.direct]
        return sum(w.mappings() + (split if w.big else 0) for w in ours)

    def fill(self, walker: Walker, va: int, write: bool, user: bool, walked: tuple[int, int, int, int]
             ) -> bool:
        """Map what `va` needs, `walked` being what the walker found. False: no RAM there."""
        pa, entry, entry_pa, size = walked
        if pa >= self.memory.size:
            return False
        window = self.user if user else self.kernel
        if entry_pa < 0:
            count = (self.memory.size + (1 << 22) - 1) >> 22
            if 0 not in window.big:
                window.map_big(0, 0, count, True, [entry] * count)
            if write:
                self._unprotect(window, va, pa)
            return True
        may_write = bool(entry & D and (entry & RW or not (user or walker.write_protect)))
        if size == 1 << 22:
            self._fill_big(window, walker, va, pa, entry, entry_pa, may_write)
            if write:
                self._unprotect(window, va, pa)
        else:
            self._fill_small(window, walker, va, pa, entry, entry_pa, may_write, write)
        return True

    def fill_direct(self, walker: Walker, va: int, write: bool, walked: tuple[int, int, int, int]) -> bool:
        """The same for the process that runs user code: small pages only."""
        window = self.direct
        assert window is not None
        pa, entry, entry_pa, size = walked
        if pa >= self.memory.size:
            return False
        may_write = bool(entry & D and entry & RW)
        if size == 1 << 12:
            self._fill_small(window, walker, va, pa, entry, entry_pa, may_write, write)
            return True
        if entry_pa >= 0:
            self.watch.add(va, entry_pa, walker.cr3)
        writable = may_write and not self.code.protected(pa >> 12)
        window.map_small(va >> 12, pa >> 12, 1, writable, [entry & ~FRAME | pa & FRAME])
        return True

    def _unprotect(self, window: Window, va: int, pa: int) -> None:
        """A write is due: undo a protection that is no longer needed."""
        if not self.code.protected(pa >> 12):
            window.protect(va & FRAME, 4096, True)

    def _fill_big(self, window: Window, walker: Walker, va: int, pa: int, entry: int, entry_pa: int,
                  may_write: bool) -> None:
        self.watch.add(va, entry_pa, walker.cr3)
        va_big, frame = va >> 22, pa >> 22
        old = window.big.get(va_big)
        if old is not None and old[0] == frame and old[1] == may_write:
            return
        entries = [entry]
        rights = entry & (RIGHTS | A | D)
        dwords, base = self.memory.dwords, walker.cr3 >> 2
        while (va_big + len(entries) < 1024 and frame + len(entries) << 22 < self.memory.size
               and va_big + len(entries) not in window.big and not self.hides(va_big + len(entries))):
            pde = int(dwords[base + va_big + len(entries)])
            if pde >> 22 != frame + len(entries) or pde & (RIGHTS | A | D) != rights:
                break
            entries.append(pde)
        for k in range(len(entries)):
            if window.small:
                window.drop_big(va_big + k)
        self.touched.mark_big(va_big, len(entries))
        window.map_big(va_big, frame, len(entries), may_write, entries)

    def _fill_small(self, window: Window, walker: Walker, va: int, pa: int, entry: int, entry_pa: int,
                    may_write: bool, write: bool) -> None:
        self.watch.add(va, entry_pa, walker.cr3)
        va_page, pa_page = va >> 12, pa >> 12
        code = self.code
        writable = may_write and (pa_page not in code.lines or pa_page in code.mixed)
        old = window.small.get(va_page)
        if old is not None and old[0] == pa_page:
            if old[1] != writable:
                window.small[va_page] = (pa_page, old[1], entry)
                window.set_writable(va_page, pa_page, writable)
            return
        entries = [entry]
        dwords, index = self.memory.dwords, entry_pa >> 2
        if index & 1023 != 1023 and dwords[index + 1] >> 12 == pa_page + 1 and (writable or not may_write):
            self._neighbours(window, entries, va_page, pa_page, index, may_write)
            if len(entries) > 1:
                self.watch.add(va, entry_pa, walker.cr3, len(entries))
                self.touched.pages[va_page : va_page + len(entries)] = b"\1" * len(entries)
        window.map_small(va_page, pa_page, len(entries), writable, entries)

    def _neighbours(self, window: Window, entries: list[int], va_page: int, pa_page: int, index: int,
                    may_write: bool) -> None:
        """Add pages above, while contiguous and already accessed (and dirty, if this one is writable)."""
        code, dwords, last = self.code, self.memory.dwords, self.memory.size >> 12
        need = entries[0] & (RIGHTS & ~PS) | A | (D if may_write else 0)
        for k in range(1, min(_AHEAD, 1024 - (index & 1023))):
            pte = int(dwords[index + k])
            if (pte >> 12 != pa_page + k or pte & need != need or pa_page + k >= last
                    or va_page + k in window.small or va_page + k in self.hidden
                    or code.protected(pa_page + k) or (not may_write and pte & D)):
                break
            entries.append(pte)

    def invlpg(self, va: int) -> list[int]:
        """Drop what maps `va` beyond what its page-table entries say now; returns pages that were dropped.

        Pages behind it whose turn comes next are dropped with it, in one go: the guest changes entries in a
        row and then says INVLPG for each, or does both page by page.
        """
        if self.cr3 is None:
            return []
        memory, va_big, va_page = self.memory, va >> 22, va >> 12
        dropped: list[int] = []
        for window in self.windows:
            big = window.big.get(va_big)
            if big is not None:
                if claims_more(big[2], memory.entry(self.cr3 + 4 * va_big)):
                    window.drop_big(va_big)
            elif va_page in window.small:
                pde = memory.entry(self.cr3 + 4 * va_big)
                table, mask = (pde & FRAME, pde | ~(RW | US)) if pde & P and not pde & PS else (-1, 0)
                pte = memory.entry(table + (va_page & 0x3FF) * 4) & mask if table >= 0 else 0
                if window.outdated(va_page, pte):
                    run = self._run_behind(window, va_page, table, mask, pte)
                    window.update(run)
                    dropped += [page for page, _ in run]
        return dropped

    def _run_behind(self, window: Window, va_page: int, table: int, mask: int, pte: int
                    ) -> list[tuple[int, int]]:
        """(page, entry) of `va_page` and those behind it; entry 0 to drop it whatever it says."""
        run, small, memory = [(va_page, pte)], window.small, self.memory
        for page in range(va_page + 1, min(va_page + _AHEAD, (va_page | 0x3FF) + 1)):
            if page not in small:
                break
            if pte & P:
                entry = memory.entry(table + (page & 0x3FF) * 4) & mask
                if not window.outdated(page, entry):
                    break
                run.append((page, entry))
            else:
                run.append((page, 0))
        return run

    def resync(self) -> tuple[list[tuple[int, int]], list[int]]:
        """Drop what the page tables no longer say; returns what Watch.changes found."""
        if self.cr3 is None:
            return [], []
        pages, bigs = self.watch.changes(self.cr3)
        for va_big in bigs:
            for window in self.windows:
                window.drop_big(va_big)
        if pages:
            for window in self.windows:
                window.update(pages)
        return pages, bigs

    def close(self) -> None:
        """Give everything back."""
        for table in self.tables.values():
            table.close()
        self.touched.close()
        for window in self.windows:
            window.close()
