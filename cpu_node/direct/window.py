"""The window of a child: what it shows of guest memory, by the rules of every other window.

A Window of Space like the kernel's and the user's (INVLPG, resynchronisation and the protection of pages
that hold translated code reach it on the same paths), but its addresses are the child's own, 0 to 4 GiB,
and requests are queued until the child runs. In addition a page is either writable or executable for the
host, never both, so that what is executed has been looked at: where a page has an instruction that must not
run natively (CPUID, say; see `Forbidden`) there is a breakpoint on it, or, when those are used up, the page
isn't executable and its code runs translated.
Left out: large pages (they are shown in small pieces); such an instruction across a page border, the second
half of which is not looked for.
"""

from __future__ import annotations

from collections.abc import Iterable

from cpu_node.code_pages import CodePages
from cpu_node.direct.exits import Child, TrapBackend
from cpu_node.host_unsafe import PROT_EXEC, PROT_READ, PROT_WRITE
from cpu_node.paging import PhysicalMemory
from cpu_node.window import Window

CPUID, XGETBV = b"\x0f\xa2", b"\x0f\x01\xd0"
SYSCALL, SYSENTER = b"\x0f\x05", b"\x0f\x34"
MAX_PAGES = 30_000  # host mappings of one child, at most; the host allows 65,530


class Forbidden:
    """Byte sequences that no directly executed page may hold.

    CPUID and XGETBV would tell of the host's processor. SYSCALL and SYSENTER are #UD to the guest or need
    their EIP, which the host's kernel loses; where the host's processor refuses them they may stay.
    """

    def __init__(self, ram: PhysicalMemory, sequences: Iterable[bytes]) -> None:
        self._find = ram.ram.find
        self.sequences = tuple(sequences)

    def within(self, pa: int, length: int) -> bool:
        """Is there one in these bytes, at any offset?"""
        find, end = self._find, pa + length
        return any(find(sequence, pa, end) >= 0 for sequence in self.sequences)

    def places(self, pa: int) -> list[int]:
        """Offsets in the 4 KiB page where one begins."""
        out = []
        for sequence in self.sequences:
            place = self._find(sequence, pa, pa + 4096)
            while place >= 0:
                out.append(place - pa)
                place = self._find(sequence, place + 1, pa + 4096)
        return out


class ChildWindow(Window):
    """4 GiB of a child's addresses."""

    def __init__(self, backend: TrapBackend, forbidden: Forbidden, lowest: int, memory: PhysicalMemory,
                 code: CodePages) -> None:
        self._backend = backend
        self.forbidden = forbidden
        self.lowest = lowest  # the host maps nothing below
        self.closed = False
        self.executable: set[int] = set()  # linear pages
        self.behind = True  # the guest's code has run elsewhere and touched pages that aren't shown
        self.missed: int | None = None  # where the guest has just had a #PF
        self.unfit: set[int] = set()  # linear pages whose code must run translated
        self.stops: dict[int, list[int]] = {}  # linear pages that are executable but for these addresses
        super().__init__(-1, memory, code, user=True)

    def open(self) -> None:
        self.child: Child = self._backend.spawn()
        self._free_stops = self.child.breakpoints
        self.id_flag = 0  # EFLAGS.ID as its code has left it; nobody else can set it

    def replace(self) -> None:
        """The child has died: another one, empty."""
        self.child.close()
        self.open()
        self.clear()

    def show(self, va: int, length: int, pa: int, writable: bool, populate: bool) -> None:
        if va < self.lowest:
            cut = self.lowest - va
            va, pa, length = va + cut, pa + cut, length - cut
        first = va
        while length > 0:
            fit = self._fit(pa, writable)
            run = 4096
            while run < length and self._fit(pa + run, writable) == fit:
                run += 4096
            prot = PROT_READ | (PROT_WRITE if writable else PROT_EXEC if fit else 0)
            self.child.map(va, run, prot, pa, populate)
            pages = range(va >> 12, va + run >> 12)
            (self.executable.update if fit else self.executable.difference_update)(pages)
            va, pa, length = va + run, pa + run, length - run
        self._forget(range(first >> 12, va >> 12))

    def _fit(self, pa: int, writable: bool) -> bool:
        """May a page of memory be executed as it is?"""
        return not writable and not self.forbidden.within(pa, 4096)

    def protect(self, va: int, length: int, writable: bool) -> None:
        for page in range(va >> 12, va + length >> 12):
            shown = self.small.get(page)
            fit = shown is not None and self._fit(shown[0] << 12, writable)
            (self.executable.add if fit else self.executable.discard)(page)
            if page << 12 >= self.lowest:
                rights = PROT_READ | (PROT_WRITE if writable else PROT_EXEC if fit else 0)
                self.child.protect(page << 12, 4096, rights)
        self._forget(range(va >> 12, va + length >> 12))

    def reveal(self, va_page: int, pa_page: int, writable: bool) -> None:
        self.show(va_page << 12, 4096, pa_page << 12, writable, True)

    def hide(self, va: int, length: int, unmap: bool) -> None:
        self.child.unmap(va, length)
        pages = range(va >> 12, va + length >> 12)
        if len(pages) > len(self.executable):
            self.executable = {page for page in self.executable if page not in pages}
        else:
            self.executable.difference_update(pages)
        self._forget(pages)

    def _forget(self, pages: range) -> None:
        """What these pages hold may be something else now."""
        if self.unfit:
            self.unfit = {page for page in self.unfit if page not in pages}
        for page in [p for p in self.stops if p in pages]:
            self._free_stops += len(self.stops.pop(page))
            self._set_stops()

    def _set_stops(self) -> None:
        self.child.set_breakpoints(tuple(address for stops in self.stops.values() for address in stops))

    def allow_execution(self, va_page: int) -> bool:
        """Make a page that is shown executable, and so read-only. False: its code must run translated."""
        pa_page, _, entry = self.small[va_page]
        va = va_page << 12
        if va < self.lowest:
            self.unfit.add(va_page)
            return False
        places = self.forbidden.places(pa_page << 12)
        self.small[va_page] = (pa_page, False, entry)
        self.protect(va, 4096, False)
        if places:
            if len(places) > self._free_stops:
                self.unfit.add(va_page)
                return False
            self._free_stops -= len(places)
            self.stops[va_page] = [va + place for place in places]
            self._set_stops()
            self.executable.add(va_page)
            self.child.protect(va, 4096, PROT_READ | PROT_EXEC)
        return True

    def copy(self, other: Window) -> None:
        """Show the small pages that another window of the same space shows."""
        pages = sorted(p for p in other.small if p not in self.small)
        start = 0
        while start < len(pages):
            first = pages[start]
            pa_page, writable, _ = other.small[first]
            end = start + 1
            while end < len(pages) and pages[end] - first == end - start:
                shown = other.small[pages[end]]
                if shown[0] - pa_page != end - start or shown[1] != writable:
                    break
                end += 1
            entries = [other.small[p][2] for p in pages[start:end]]
            self.map_small(first, pa_page, end - start, writable, entries)
            start = end

    def close(self) -> None:
        self.closed = True
        self.clear()
        self.child.close()
