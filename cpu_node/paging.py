"""The page walk: guest page tables read and their accessed and dirty bits set, and guest memory by address.

Source: Intel SDM vol. 3A chapter 4, 32-bit paging (4 KiB and 4 MiB pages, WP, U/S, R/W; reserved bits).
Left out: PAE, PSE-36, PAT and cache control (all memory is write-back), SMEP and SMAP.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from cpu_node.errors import PF, GuestFault

if TYPE_CHECKING:
    from mmap import mmap

    from cpu_node.touched import Touched

P, RW, US, A, D, PS, G = 0x01, 0x02, 0x04, 0x20, 0x40, 0x80, 0x100
ERR_PRESENT, ERR_WRITE, ERR_USER, ERR_RESERVED = 1, 2, 4, 8
FRAME, BIG_FRAME = 0xFFFFF000, 0xFFC00000
BIG_RESERVED = 0x003FE000  # bits 21..13 of a 4 MiB entry without PSE-36 [table 4-4]

_unpack_i = struct.Struct("<I").unpack_from
_unpack_h = struct.Struct("<H").unpack_from
_unpack_q = struct.Struct("<Q").unpack_from
_pack_i = struct.Struct("<I").pack_into
_pack_h = struct.Struct("<H").pack_into


class PhysicalMemory:
    """The machine's RAM as this process maps it. Beyond it nothing is memory."""

    def __init__(self, ram: mmap) -> None:
        self.ram = ram
        self.size = len(ram)
        self.dwords = memoryview(ram).cast("I")

    def entry(self, pa: int) -> int:
        """A page-table entry; nothing answers beyond RAM, and an open bus reads as ones."""
        return int(self.dwords[pa >> 2]) if pa < self.size else 0xFFFFFFFF

    def table(self, pa: int) -> list[int]:
        """The 1024 entries of a table; fewer where RAM ends."""
        return self.dwords[pa >> 2 : (pa >> 2) + 1024].tolist()


class Walker:
    """Translates linear addresses; control registers are copied in by `configure`."""

    def __init__(self, memory: PhysicalMemory) -> None:
        self.memory = memory
        self.touched: Touched | None = None  # the current space's map, set by who changes spaces
        self.paging = False
        self.cr3 = 0
        self.write_protect = False
        self.big_pages = False

    def configure(self, cr0: int, cr3: int, cr4: int) -> bool:
        """Take over what CR0.PG, CR0.WP, CR3 and CR4.PSE say; True when entries mean something else now."""
        before = self.write_protect, self.big_pages
        self.paging = bool(cr0 & 0x8000_0000)
        self.write_protect = bool(cr0 & 0x1_0000)
        self.cr3 = cr3 & FRAME
        self.big_pages = bool(cr4 & 0x10)
        return before != (self.write_protect, self.big_pages)

    def walk(self, va: int, write: bool, user: bool) -> tuple[int, int, int, int]:
        """(pa, leaf entry, entry's pa or -1, page size) after setting A and D.

        Raises GuestFault(PF). The entry combines R/W and U/S of both levels.
        """
        touched = self.touched
        if not self.paging:
            return va, P | RW | US | A | D, -1, 1 << 32
        memory = self.memory
        error = (ERR_WRITE if write else 0) | (ERR_USER if user else 0)
        pde_pa = self.cr3 + (va >> 22 << 2)
        pde = memory.entry(pde_pa)
        if not pde & P:
            raise GuestFault(PF, error, va)
        if pde & PS and self.big_pages:
            if pde & BIG_RESERVED:
                raise GuestFault(PF, error | ERR_PRESENT | ERR_RESERVED, va)
            self._check(pde, error, write, user, va)
            wanted = A | D if write else A
            if pde & wanted != wanted:
                pde |= wanted
                memory.dwords[pde_pa >> 2] = pde
            if touched is not None:
                touched.mark(va, 1 << 22)
            return pde & BIG_FRAME | va & 0x3FFFFF, pde, pde_pa, 1 << 22
        pte_pa = (pde & FRAME) + (va >> 10 & 0xFFC)
        pte = memory.entry(pte_pa)
        if not pte & P:
            raise GuestFault(PF, error, va)
        both = pte & (pde | ~(RW | US))
        self._check(both, error, write, user, va)
        if not pde & A:
            memory.dwords[pde_pa >> 2] = pde | A
        wanted = A | D if write else A
        if pte & wanted != wanted:
            memory.dwords[pte_pa >> 2] = pte | wanted
            both |= wanted
        if touched is not None:
            touched.pages[va >> 12] = 1
        return pte & FRAME | va & 0xFFF, both, pte_pa, 1 << 12

    def _check(self, entry: int, error: int, write: bool, user: bool, va: int) -> None:
        if user and not entry & US:
            raise GuestFault(PF, error | ERR_PRESENT, va)
        if write and not entry & RW and (user or self.write_protect):
            raise GuestFault(PF, error | ERR_PRESENT, va)


class GuestMemory:
    """Guest memory by linear address for the simulator; implements cpu.LinearMemory.

    Keeps translations of its own, which fall with `forget`. `mmio_read(pa, width)` and
    `mmio_write(pa, width, value)` get what is no RAM; `code_written(page)` is told of writes to pages in
    `code_pages`.
    """

    def __init__(self, walker: Walker, code_pages: Mapping[int, object],
                 code_written: Callable[[int], None],
                 mmio_read: Callable[[int, int], int], mmio_write: Callable[[int, int, int], None]) -> None:
        self.walker = walker
        self.physical = walker.memory
        self.ram = walker.memory.ram
        self._known: dict[int, int] = {}  # page << 2 | user << 1 | write -> pa of the page
        self._code_pages = code_pages
        self._code_written = code_written
        self._mmio_read = mmio_read
        self._mmio_write = mmio_write
        self.forget = self._known.clear

    def translate(self, va: int, write: bool, user: bool) -> int:
        """pa of `va`; raises GuestFault."""
        pa, _, _, _ = self.walker.walk(va, write, user)
        if pa < self.physical.size:
            self._known[va >> 12 << 2 | user << 1 | write] = pa & FRAME
        return pa

    def read(self, va: int, length: int, user: bool = False) -> bytes:
        """Bytes, across pages and past 4 GiB."""
        if (va & 0xFFF) + length > 0x1000:
            first = 0x1000 - (va & 0xFFF)
            return self.read(va, first, user) + self.read(va + first & 0xFFFFFFFF, length - first, user)
        pa = self._known.get(va >> 12 << 2 | user << 1)
        pa = self.translate(va, False, user) if pa is None else pa | va & 0xFFF
        if pa + length <= self.physical.size:
            return self.ram[pa : pa + length]
        return self._device_bytes(pa, length)

    def _device_bytes(self, pa: int, length: int) -> bytes:
        if length in (1, 2, 4):
            return self._mmio_read(pa, length).to_bytes(length, "little")
        step = 4 if length % 4 == 0 else 1
        pieces = (self._mmio_read(pa + i, step) for i in range(0, length, step))
        return b"".join(piece.to_bytes(step, "little") for piece in pieces)

    def write(self, va: int, data: bytes, user: bool = False) -> None:
        """Bytes; a fault on the second page leaves the first unwritten."""
        if (va & 0xFFF) + len(data) > 0x1000:
            first = 0x1000 - (va & 0xFFF)
            second = va + first & 0xFFFFFFFF
            self.translate(va, True, user)
            self.translate(second, True, user)
            self.write(va, data[:first], user)
            self.write(second, data[first:], user)
            return
        pa = self._known.get(va >> 12 << 2 | user << 1 | 1)
        pa = self.translate(va, True, user) if pa is None else pa | va & 0xFFF
        length = len(data)
        if pa + length > self.physical.size:
            step = length if length in (1, 2, 4) else 4 if length % 4 == 0 else 1
            for i in range(0, length, step):
                self._mmio_write(pa + i, step, int.from_bytes(data[i : i + step], "little"))
            return
        self.ram[pa : pa + length] = data
        if pa >> 12 in self._code_pages:
            self._code_written(pa >> 12)

    def read8(self, va: int, user: bool = False) -> int:
        return self.read(va, 1, user)[0]

    def read16(self, va: int, user: bool = False) -> int:
        pa = self._known.get(va >> 12 << 2 | user << 1)
        if pa is not None and va & 0xFFF != 0xFFF:
            return int(_unpack_h(self.ram, pa | va & 0xFFF)[0])
        return int.from_bytes(self.read(va, 2, user), "little")

    def read32(self, va: int, user: bool = False) -> int:
        pa = self._known.get(va >> 12 << 2 | user << 1)
        if pa is not None and va & 0xFFF <= 0xFFC:
            return int(_unpack_i(self.ram, pa | va & 0xFFF)[0])
        return int.from_bytes(self.read(va, 4, user), "little")

    def read64(self, va: int, user: bool = False) -> int:
        pa = self._known.get(va >> 12 << 2 | user << 1)
        if pa is not None and va & 0xFFF <= 0xFF8:
            return int(_unpack_q(self.ram, pa | va & 0xFFF)[0])
        return int.from_bytes(self.read(va, 8, user), "little")

    def write8(self, va: int, value: int, user: bool = False) -> None:
        self.write(va, bytes((value & 0xFF,)), user)

    def write16(self, va: int, value: int, user: bool = False) -> None:
        self.write(va, (value & 0xFFFF).to_bytes(2, "little"), user)

    def write32(self, va: int, value: int, user: bool = False) -> None:
        pa = self._known.get(va >> 12 << 2 | user << 1 | 1)
        if pa is not None and va & 0xFFF <= 0xFFC and pa >> 12 not in self._code_pages:
            _pack_i(self.ram, pa | va & 0xFFF, value & 0xFFFFFFFF)
            return
        self.write(va, (value & 0xFFFFFFFF).to_bytes(4, "little"), user)

    def probe_write(self, va: int, length: int, user: bool = False) -> None:
        """Raise what a write of these bytes would raise."""
        if va >> 12 << 2 | user << 1 | 1 not in self._known:
            self.translate(va, True, user)
        last = va + length - 1 & 0xFFFFFFFF
        if last >> 12 != va >> 12 and length:
            self.translate(last & FRAME, True, user)

    def read32s(self, va: int, count: int, user: bool = False) -> Sequence[int]:
        """`count` dwords from ascending addresses."""
        return struct.unpack(f"<{count}I", self.read(va, 4 * count, user))

    def write32s(self, va: int, values: Sequence[int], user: bool = False) -> None:
        """Dwords to ascending addresses, all of them or, with a fault, none."""
        self.write(va, struct.pack(f"<{len(values)}I", *values), user)
