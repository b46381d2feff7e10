"""Hardware breakpoints: DR0 to DR3 as DR7 arms them.

Source: Intel SDM vol. 3B 17.2.4 (DR7), 17.2.5 (addresses and lengths), 17.3.1 (faults and traps). While one
is armed, the pages of data breakpoints are in no window, and those of instruction breakpoints are not
translated (mode.WATCHED): the simulator does what meets them. Accesses are seen in its memory and where its
port instructions check permission.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpu_node.cpu import CR4_DE
from cpu_node.descriptor import CS
from cpu_node.errors import DB, GuestFault
from cpu_node.observe import observe, stop

if TYPE_CHECKING:
    from cpu_node.cpu import Cpu
    from cpu_node.paging import GuestMemory

EXECUTION, WRITES, PORTS, ACCESSES = range(4)  # R/W fields
_LENGTHS = (1, 2, 8, 4)  # by LEN field


class Breakpoints:
    """Finds what an instruction hits."""

    def __init__(self, cpu: Cpu, memory: GuestMemory) -> None:
        self.cpu = cpu
        self.memory = memory
        self.hits = 0  # DR6 bits of data breakpoints since `watch`
        self._data: list[tuple[int, int, int, bool]] = []  # first and last address, DR6 bit, reads too

    def check_execution(self) -> None:
        """#DB, a fault, where DR0 to DR3 say so. For EFLAGS.RF clear."""
        cpu = self.cpu
        va = cpu.seg[CS].base + cpu.eip & 0xFFFFFFFF
        hits = sum(1 << n for n, kind, _ in self._armed() if kind == EXECUTION and cpu.dr[n] == va)
        if hits:
            cpu.dr[6] |= hits
            raise GuestFault(DB)

    def _armed(self) -> list[tuple[int, int, int]]:
        """(number, R/W field, length)."""
        dr7 = self.cpu.dr[7]
        fields = [(n, dr7 >> 16 + 4 * n) for n in range(4) if dr7 >> 2 * n & 3]
        return [(n, field & 3, _LENGTHS[field >> 2 & 3]) for n, field in fields]

    def pages(self) -> tuple[frozenset[int], frozenset[int]]:
        """The linear pages with breakpoints on data, and those with breakpoints on instructions."""
        armed = [(kind, self.cpu.dr[n] >> 12) for n, kind, _ in self._armed()]
        data = frozenset(page for kind, page in armed if kind in (WRITES, ACCESSES))
        return data, frozenset(page for kind, page in armed if kind == EXECUTION)

    def watch(self) -> None:
        """From here on, until `unwatch`, note what data accesses hit."""
        self.hits = 0
        self._data = []
        for n, kind, length in self._armed():
            if kind in (WRITES, ACCESSES):
                first = self.cpu.dr[n] & -length & 0xFFFFFFFF
                self._data.append((first, first + length - 1, 1 << n, kind == ACCESSES))
        if self._data:
            observe(self.memory, self._note)

    def unwatch(self) -> None:
        """The memory as it was."""
        if self._data:
            stop(self.memory)

    def note_port(self, port: int, width: int) -> None:
        """An IN, OUT, INS or OUTS accesses a port [17.2.4: R/W = 2 means ports where CR4.DE is set]."""
        if not self.cpu.cr4 & CR4_DE:
            return
        for n, kind, length in self._armed():
            first = self.cpu.dr[n] & -length & 0xFFFFFFFF
            if kind == PORTS and port < first + length and first < port + width:
                self.hits |= 1 << n

    def _note(self, va: int, width: int, writes: bool, user: bool) -> None:
        for low, high, bit, reads_too in self._data:
            if va <= high and low < va + width and (writes or reads_too):
                self.hits |= bit
