"""Address spaces and dispatch tables: which window and which table a mode uses, and what code lies where.

A space per page directory, kept when left. Kernel code has one dispatch table per mode for all spaces (their
kernel halves agree; a Watch sees where they don't); user code has one per space and mode.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from contextlib import suppress
from enum import Enum, auto

from cpu_node import layout as at
from cpu_node import mode as modes
from cpu_node.cache import CodeCache
from cpu_node.code_pages import CodePages
from cpu_node.decode import MAX_LENGTH, decode
from cpu_node.dispatch import Table
from cpu_node.errors import UD, GuestFault
from cpu_node.line import PADDING, PAGE, Line, page_line, single_line
from cpu_node.paging import FRAME, PS, RW, US, D, P, PhysicalMemory, Walker
from cpu_node.tlb import Tlb
from cpu_node.touched import KERNEL_CODE, Touched
from cpu_node.watch import Watch, claims_more
from cpu_node.window import Space, Window

MAX_SPACES = 48
MAX_MAPPINGS = 40_000  # the host allows 65,530
COUNT_EVERY = 6000  # changes of windows
MAPPINGS_OF_A_CHANGE = 3  # at most
DEVICE_AFTER = 8  # accesses to devices before an instruction is left to the simulator
MIXED_AFTER = 4  # writes to a page's code before its translations verify themselves


SpaceKey = tuple[int | None, frozenset[int]]  # page directory (None: no paging), hidden pages


class Filled(Enum):
    """What became of a data access that faulted."""

    MAPPED = auto()  # try again
    OWN_PAGE = auto()  # mapped; but it writes to the page its own instruction is on: simulate it
    NO_MEMORY = auto()  # a device's: simulate it
    HIDDEN = auto()  # a breakpoint may be there: simulate it
    WRAPS = auto()  # it goes on at 0: simulate it, #GP and #SS come before #PF


class Contexts:
    """All spaces, tables and lines of one CPU."""

    def __init__(self, ram_fd: int, memory: PhysicalMemory, walker: Walker, tlb: Tlb) -> None:
        self.ram_fd = ram_fd
        self.memory = memory
        self.walker = walker
        self.cache = CodeCache()
        self.tlb = tlb
        self.soft = False  # new spaces use the TLB
        self.code = CodePages(tlb)
        self.max_spaces = MAX_SPACES
        self.max_mappings = MAX_MAPPINGS
        self.count_every = self._until_count = COUNT_EVERY
        self.spaces: OrderedDict[SpaceKey, Space] = OrderedDict()
        self.hidden: frozenset[int] = frozenset()  # linear pages with data breakpoints
        self._watched: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())
        self.kernel_tables: dict[int, Table] = {}
        self.kernel_watch = Watch(memory)
        self.kernel_touched = Touched(KERNEL_CODE)
        self.writes: Counter[int] = Counter()  # physical page -> writes to it while it held code
        self.device_sites: Counter[tuple[int, int]] = Counter()  # (physical page, offset) -> device accesses
        self.fills = 0
        self.flushes = 0
        self._kernel_cr3: int | None = None
        self.mode = 0
        self.space = self._space()
        self.table = self.table_of(0)

    # ---- entering

    def _space(self) -> Space:
        key = (self.walker.cr3 if self.walker.paging else None, self.hidden)
        space = self.spaces.get(key)
        if space is None:
            self._make_room()
            space = self.spaces[key] = Space(key[0], self.ram_fd, self.memory, self.code)
            space.hidden = self.hidden
            space.begin(self.soft)
        self.spaces.move_to_end(key)
        self.walker.touched = space.touched
        return space

    def _make_room(self) -> None:
        """For one more space, which is going to take some mappings: close those used longest ago."""
        while len(self.spaces) >= self.max_spaces:
            self._close_oldest()
        if self.spaces:
            self._changed_windows(self.code.splits() // MAPPINGS_OF_A_CHANGE)

    def _close_oldest(self) -> None:
        _, old = self.spaces.popitem(last=False)
        old.close()

    def _mappings(self) -> int:
        """Estimate of the host mappings that all windows take."""
        split = self.code.splits()
        return sum(space.mappings(split) for space in self.spaces.values())

    def _changed_windows(self, changes: int) -> None:
        """Count the host's mappings now and then: it allows a process only so many."""
        self._until_count -= changes
        if self._until_count > 0:
            return
        self._until_count = self.count_every
        while len(self.spaces) > 1 and self._mappings() > self.max_mappings:
            self._close_oldest()
        if self._mappings() > self.max_mappings:
            for window in self.space.windows:
                window.clear()

    def table_of(self, mode: int) -> Table:
        """The dispatch table of a mode in the current space."""
        tables = self.space.tables if mode & modes.USER else self.kernel_tables
        table = tables.get(mode)
        if table is None:
            table = tables[mode] = Table()
        return table

    def all_tables(self) -> list[Table]:
        """Of all modes and spaces."""
        user = [table for space in self.spaces.values() for table in space.tables.values()]
        return [*self.kernel_tables.values(), *user]

    def enter(self, mode: int, user: bool) -> tuple[int, int]:
        """(window, dispatch table), host addresses, for a mode in the current space."""
        self.mode = mode
        if mode & modes.SOFT:
            ha = at.TLB_BASE
        else:
            ha = self.space.user.ha if user else self.space.kernel.ha
        if not mode & modes.INTERPRETED:
            self.table = self.table_of(mode)
        return ha, self.table.ha

    def softened(self, mode: int) -> int:
        """The same mode, with SOFT where the current space's user code uses the TLB."""
        if self.space.soft and mode & modes.USER and not mode & (modes.INTERPRETED | modes.WATCHED):
            return mode | modes.SOFT
        return mode & ~modes.SOFT

    def user_table_if_any(self, mode: int) -> Table | None:
        """The same for CPL 3, if it was used already."""
        return self.space.tables.get(mode)

    def flush(self) -> None:
        """A TLB flush: CR3, or paging in CR0 or CR4, was written; enter the space it selects."""
        self.tlb.flush()
        self.flushes += 1
        space = self.space = self._space()
        self._resync(space)
        cr3 = space.cr3
        if cr3 is None or self._kernel_cr3 is None:
            if cr3 != self._kernel_cr3:
                for table in self.kernel_tables.values():
                    table.clear()
                self.kernel_watch.clear()
        else:
            pages, bigs = self.kernel_watch.changes(cr3)
            if pages or bigs:
                for table in self.kernel_tables.values():
                    table.drop_changed(pages, bigs, False)
        self._kernel_cr3 = cr3

    def hide(self, data: frozenset[int], code: frozenset[int]) -> bool:
        """Breakpoints lie on these linear pages now; True where another space was entered.

        A space with hidden pages is one of its own, and so are the dispatch tables of mode.WATCHED; they hold
        no code of pages with breakpoints. Both are kept while the breakpoints come and go, as a debugger's
        do with each change of task.
        """
        if (data or code) and (data, code) != self._watched:
            self._watched = (data, code)
            watched = [t for mode, t in self.kernel_tables.items() if mode & modes.WATCHED]
            for space in self.spaces.values():
                watched += [t for mode, t in space.tables.items() if mode & modes.WATCHED]
            for table in watched:
                table.clear()
        if data == self.hidden:
            return False
        self.hidden = data
        self.flush()
        return True

    def _resync(self, space: Space) -> None:
        pages, bigs = space.resync()
        if pages or bigs:
            for table in space.tables.values():
                table.drop_changed(pages, bigs, True)
        if bigs and not any(pde & US for pde in space.watch.pdes.values()):
            space.begin(self.soft)  # nothing of the user's is left: another program has the page directory

    def configuration_changed(self) -> None:
        """CR0.WP or CR4.PSE changed: nothing may be kept that was derived from page tables."""
        self.tlb.flush()
        for space in self.spaces.values():
            for window in space.windows:
                window.clear()
            space.watch.clear()
        for table in self.all_tables():
            table.clear()
        self.kernel_watch.clear()

    def invlpg(self, va: int) -> None:
        """Forget one page wherever it is cached, unless the page tables still say the same."""
        space, va_page = self.space, va >> 12
        self.tlb.drop(va_page)
        if space.touched.pages[va_page]:
            dropped = space.invlpg(va)
            tables = [*space.tables.values()]
            self._drop_code(tables, space.watch, va, True)
            self._unmark(space.touched, space.watch, [va_page, *dropped], space.windows, tables)
        if self.kernel_touched.pages[va_page]:
            tables = [*self.kernel_tables.values()]
            self._drop_code(tables, self.kernel_watch, va, False)
            self._unmark(self.kernel_touched, self.kernel_watch, [va_page], (), tables)

    def _drop_code(self, tables: list[Table], watch: Watch, va: int, user: bool) -> None:
        """Forget code of the page at `va` in these tables, unless it is still there."""
        va_page, bigs = va >> 12, self._big_moved(watch, va >> 22)
        for table in tables:
            if bigs:
                table.drop_changed([], bigs, user)
            elif va_page in table.filled or va_page in table.crossing_into:
                pa_page, user_may = self._look_up(va)
                table.drop_unless(va_page, pa_page if user_may or not user else -1)

    @staticmethod
    def _unmark(touched: Touched, watch: Watch, pages: list[int], windows: tuple[Window, ...],
                tables: list[Table]) -> None:
        """Take marks back from pages that are in none of these."""
        for page in pages:
            if watch.pdes.get(page >> 10, 0) & PS:
                continue
            if any(page in w.small or page >> 10 in w.big for w in windows):
                continue
            if any(page in t.lines or page in t.filled or page in t.crossing_into for t in tables):
                continue
            touched.pages[page] = 0

    def _big_moved(self, watch: Watch, va_big: int) -> list[int]:
        """[va_big] where code may come from a 4 MiB page that is no more: INVLPG drops all of it."""
        old, cr3 = watch.pdes.get(va_big, 0), self.space.cr3
        if cr3 is None or not old & PS or not claims_more(old, self.memory.entry(cr3 + 4 * va_big)):
            return []
        return [va_big]

    def _look_up(self, va: int) -> tuple[int, bool]:
        """(physical page or -1, is it the user's) by the page tables as they are, nothing set or raised."""
        cr3 = self.space.cr3
        if cr3 is None:
            return va >> 12, True
        memory = self.memory
        pde = memory.entry(cr3 + (va >> 22 << 2))
        if not pde & P:
            return -1, False
        if pde & PS and self.walker.big_pages:
            return pde >> 22 << 10 | va >> 12 & 0x3FF, bool(pde & US)
        pte = memory.entry((pde & FRAME) + (va >> 10 & 0xFFC))
        return (pte >> 12 if pte & P else -1), bool(pde & pte & US)

    # ---- code

    def find(self, va: int) -> int:
        """Offset in the code cache of the host code for `va` in the current context. Raises GuestFault."""
        table = self.table
        line = table.lines.get(va >> 12)
        if line is None:
            line = self._line(va)
        offset = va & 0xFFF
        place = line.host.get(offset)
        if place is None and line.kept is not None:
            place = line.entries.get(offset)
            if place is None:
                line.unfold()
                place = line.host.get(offset)
        if place is None:
            if self.cache.full:
                self.flush_cache()
                return self.find(va)
            if va in table.crossing:
                return self._crossing(va)
            place = self._translate(line, offset)
            if place is None:
                return self._crossing(va)
        if not table.entries[va]:
            line.entries[offset] = place
            table.set(va, place)
        return place

    def _translate(self, line: Line, offset: int) -> int | None:
        made = self.cache.translate(line, offset)
        table, host = self.table, line.host
        for behind in made.returns:
            place = host.get(behind)
            if place is not None and not table.entries[line.va + behind]:
                line.entries[behind] = place
                table.set(line.va + behind, place)
        return host.get(offset)

    def _fetch(self, va: int) -> int:
        """Physical page of code at `va`; what depends on its page tables is noted."""
        user = bool(self.mode & modes.USER)
        pa, _, entry_pa, size = self.walker.walk(va, False, user)
        if pa >= self.memory.size:
            raise GuestFault(UD)
        if entry_pa >= 0:
            watch = self.space.watch if user else self.kernel_watch
            watch.add(va, entry_pa, self.walker.cr3)
            if not user:
                self.kernel_touched.mark(va, size)
        return pa >> 12

    def _line(self, va: int) -> Line:
        pa_page = self._fetch(va)
        mode = self.mode & ~modes.WATCHED  # the same code
        key = (va & FRAME, pa_page, mode)
        line = self.cache.lines.get(key)
        if line is None:
            mixed = pa_page in self.code.mixed
            code = self.memory.ram[pa_page << 12 : (pa_page << 12) + PAGE]
            line = page_line(va >> 12, pa_page, mode, code, mixed)
            self.cache.add(line)
            if self.device_sites:
                sites = self.device_sites.items()
                line.devices = {o for (page, o), n in sites if page == pa_page and n >= DEVICE_AFTER}
            if self.writes[pa_page] <= MIXED_AFTER:  # what is written anew all the time is new each time
                self.cache.take_over(line)
            self._register(line)
        self.table.add(line)
        return line

    def _crossing(self, va: int) -> int:
        """Host code for an instruction that crosses into the next page."""
        table = self.table
        line = table.crossing.get(va)
        if line is None:
            following = (va | 0xFFF) + 1 & 0xFFFFFFFF
            first = self._fetch(va)
            page = table.lines.get(va >> 12)
            if page is not None and page.verify:  # does it cross still?
                tail = self.memory.ram[first << 12 | va & 0xFFF : (first + 1) << 12]
                if page.code[va & 0xFFF : PAGE] != tail:
                    self.code_written(first)
                    return self.find(va)
            pages = (first, self._fetch(following))
            mode = self.mode & ~modes.WATCHED
            key = (va, pages[0], mode)
            line = self.cache.lines.get(key)
            if line is None or line.pa_pages != pages:
                ram = self.memory.ram
                start = pages[0] << 12 | va & 0xFFF
                code = ram[start : (pages[0] + 1) << 12] + ram[pages[1] << 12 : (pages[1] << 12) + 15]
                mixed = pages[0] in self.code.mixed or pages[1] in self.code.mixed
                line = single_line(va, pages, mode, code, mixed)
                self.cache.add(line)
                self.cache.take_over(line)
                self._register(line)
            table.add(line)
        line.unfold()
        place = line.host.get(0)
        if place is None:
            place = self._translate(line, 0)
            assert place is not None
        if not table.entries[va]:
            line.entries[0] = place
            table.set(va, place)
        return place

    def _register(self, line: Line) -> None:
        for pa_page in line.pa_pages:
            if self.code.add(pa_page, line):
                self._changed_windows(len(self.spaces))

    def dma_written(self, pa_pages: list[int]) -> None:
        """Devices have written to these pages: what they held is gone, as in memory that is used anew."""
        for pa_page in pa_pages:
            self.tlb.guarded[pa_page] = int(self.code.protected(pa_page))
            writes = self.writes[pa_page]
            self.code_written(pa_page)
            self.writes[pa_page] = writes  # it is not code and data at once

    def code_written(self, pa_page: int) -> None:
        """Bytes of a page that holds code change: its translations are void."""
        lines = self.code.remove(pa_page)
        if lines is None:
            return
        for line in lines:
            assert isinstance(line, Line)
            for other in line.pa_pages:
                if other != pa_page and other in self.code.lines:
                    self.code.lines[other].discard(line)
        self.cache.forget(lines)  # type: ignore[arg-type]
        for site in [s for s in self.device_sites if s[0] == pa_page]:
            del self.device_sites[site]
        self.writes[pa_page] += 1
        if self.writes[pa_page] >= MIXED_AFTER:
            self.code.mixed.add(pa_page)

    def stale(self, va: int) -> None:
        """A self-verifying translation found other bytes at `va`."""
        line, offset = self.table.lines.get(va >> 12), va & 0xFFF
        if line is not None:
            start = line.pa_pages[0] << 12 | offset
            text = self.memory.ram[start : start + min(PAGE - offset, MAX_LENGTH)] + PADDING
            if self.cache.renew(line, offset, text):
                return
        pa_page = self._fetch(va)
        self.code_written(pa_page)
        if (va & 0xFFF) > 0xFF0:
            with suppress(GuestFault):  # no instruction can cross into a page that isn't there
                self.code_written(self._fetch((va | 0xFFF) + 1 & 0xFFFFFFFF))

    def flush_cache(self) -> None:
        """Drop every translation."""
        self.cache.keep()
        self.cache.flush()
        for table in self.all_tables():
            table.clear()
        self.tlb.forget_sites()
        self.code.clear()
        self.writes.clear()
        self.device_sites.clear()

    def forget_all(self) -> None:
        """RESET: memory was loaded anew behind our back."""
        self.flush_cache()
        for space in self.spaces.values():
            space.close()
        self.spaces.clear()
        self.kernel_watch.clear()

    # ---- data

    def device_access(self, line: Line | None, va: int) -> None:
        """A plain instruction at `va` touched a device: after a few times, translate it as an exit.

        That spares the host fault. It stays right where the instruction's operand is memory next time.
        """
        if line is None or line.starts == 1:
            return
        offset = va & 0xFFF
        site = (line.pa_pages[0], offset)
        self.device_sites[site] += 1
        if self.device_sites[site] == DEVICE_AFTER and decode(line.code, offset).row.action != "string":
            self.cache.forget([line])
            self.code.lines[line.pa_pages[0]].discard(line)

    def fill(self, va: int, write: bool, user: bool, line: Line | None) -> Filled:
        """Map what a data access at `va` needs, for an instruction of `line`. Raises GuestFault."""
        self.fills += 1
        self._until_count -= 1
        if self._until_count <= 0:
            self._changed_windows(0)
        walked = self.walker.walk(va, write, user)
        if self.hidden and (va >> 12 in self.hidden or (walked[3] == 1 << 22 and self.space.hides(va >> 22))):
            return Filled.HIDDEN
        filled = self._may_write(walked[0] >> 12, line) if write else Filled.MAPPED
        return filled if self.space.fill(self.walker, va, write, user, walked) else Filled.NO_MEMORY

    def fill_tlb(self, va: int, write: bool, line: Line | None) -> Filled:
        """The same for the TLB and an access at CPL 3. Raises GuestFault."""
        pa, entry, _, _ = self.walker.walk(va, write, True)
        if pa >= self.memory.size:
            return Filled.NO_MEMORY
        filled = self._may_write(pa >> 12, line) if write else Filled.MAPPED
        writable = entry & D and entry & RW and not self.code.protected(pa >> 12)
        self.tlb.enter(va, pa, bool(writable))
        return filled

    def _may_write(self, pa_page: int, line: Line | None) -> Filled:
        """A write to a page is due: its code is void."""
        if not self.code.protected(pa_page):
            return Filled.MAPPED
        own = line is None or pa_page in line.pa_pages
        self.code_written(pa_page)
        return Filled.OWN_PAGE if own else Filled.MAPPED
