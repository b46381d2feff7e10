"""The software TLB: where data of user code lies, for address spaces that don't live long.

A window (window.py) costs microseconds for every page that comes or goes, and nothing for an access; this is
the other way round. Two tables, of reads and of writes, hold a qword for each linear page: 0, or
E = host address of the page - linear address of the page + 1, so that the byte at `va` lies at va + E - 1.
Code in mode.SOFT asks them at each access (emit_soft.py), misses are walked by tlb_stubs.py. As in a real one
entries stay until INVLPG of the page or a change of CR3; one pair of tables serves the CPU, and is emptied
when the space is left. Entries are never wider than the guest's rights with A (and, for writing, D) set, and
pages whose writes must be noticed (GUARDED: they hold translated code) have none for writing.
Left out: global pages (an early flush is never wrong), 4 MiB pages (their entries are for 4 KiB).
"""

from __future__ import annotations

from bus.codemap import PAGE as CODE_PAGE
from bus.codemap import size_of
from cpu_node import host_unsafe as host
from cpu_node import layout as at
from cpu_node.record_unsafe import Record

_COUNT = at.TLB_COUNT // 4
HOST_FLAG = "bmi2"  # of /proc/cpuinfo: probes shift by SHRX
_RW = host.PROT_READ | host.PROT_WRITE


class Tlb:
    """Of one CPU."""

    def __init__(self, record: Record, ram_fd: int, size: int, code_fd: int | None = None) -> None:
        """`code_fd`: the region that tells devices of GUARDED pages (bus/codemap.py)."""
        self._d = record.d
        host.map_file(at.RAM, size, _RW, ram_fd, 0, populate=False)
        host.map_anonymous(at.GUARDED, at.GUARDED_SIZE, _RW)
        if code_fd is not None:
            length = size_of(size)
            host.map_file(at.GUARDED, length - CODE_PAGE, _RW, code_fd, 0, populate=False)
            host.view8(at.GUARDED, length - CODE_PAGE)[:] = bytes(length - CODE_PAGE)
        host.map_anonymous(at.TLB_PAGES, 4 * at.TLB_PAGES_MAX, _RW)
        host.map_anonymous(at.TLB_SITES, 16 * at.TLB_SITES_COUNT, _RW)
        host.map_anonymous(at.TLB_READ, at.TLB_SIZE, _RW)
        self.reads = host.view64(at.TLB_READ, 1 << 20)
        self.writes = host.view64(at.TLB_WRITE, 1 << 20)
        self.guarded = host.view8(at.GUARDED, at.GUARDED_SIZE)
        self._pages = host.view32(at.TLB_PAGES, at.TLB_PAGES_MAX)
        self._sites = host.view64(at.TLB_SITES, 2 * at.TLB_SITES_COUNT)
        record.q[at.RAM_SIZE // 8] = size
        self._d[_COUNT] = 0
        self.flush = host.function64(at.CODE + at.STUB_TLB_FLUSH)  # forgets all entries

    def enter(self, va: int, pa: int, writable: bool) -> None:
        """Make the entry of a page: `va` is allowed to be read, or written too."""
        page = va >> 12
        entry = at.RAM + (pa & ~0xFFF) - (page << 12) + 1
        if not self.reads[page]:
            count = self._d[_COUNT]
            if count >= at.TLB_PAGES_MAX:
                self.flush()
                count = 0
            self._pages[count] = page
            self._d[_COUNT] = count + 1
        self.reads[page] = entry
        if writable:
            self.writes[page] = entry

    def drop(self, va_page: int) -> None:
        """Forget a page."""
        if self.reads[va_page]:
            self.reads[va_page] = self.writes[va_page] = 0

    def drop_writes(self) -> None:
        """Writes of all pages have to ask again."""
        writes = self.writes
        for page in self._pages[: self._d[_COUNT]]:
            writes[page] = 0

    def learn(self, rip: int, eip: int) -> None:
        """The probe at host address `rip` belongs to the instruction at `eip`."""
        index = 2 * (rip & at.TLB_SITES_COUNT - 1)
        self._sites[index] = rip
        self._sites[index + 1] = eip

    def forget_sites(self) -> None:
        """Host code is dropped: its addresses will mean something else."""
        host.map_anonymous(at.TLB_SITES, 16 * at.TLB_SITES_COUNT, _RW)
