"""The plainest implementations of what a Cpu is built on: registers in a list, memory in a bytearray.

For tests and for trying system instructions at a Python prompt. FlatMemory has no page tables; pages can be
declared absent, read-only or supervisor-only, and fault with a 4 KiB page's error code [SDM vol. 3A 4.7].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpu_node.cpu import LinearMemory
from cpu_node.errors import PF, GuestFault
from cpu_node.flags import FIXED

if TYPE_CHECKING:
    from cpu_node.lapic import LocalApic

ERROR_PRESENT, ERROR_WRITE, ERROR_USER = 1, 2, 4


class PlainRegisters:
    def __init__(self) -> None:
        self._regs = [0] * 8
        self._eflags = FIXED
        self.cr2 = 0

    @property
    def regs(self) -> list[int]:
        return self._regs

    def get_eflags(self) -> int:
        return self._eflags

    def set_eflags(self, value: int) -> None:
        self._eflags = value


class FlatMemory(LinearMemory):
    """Linear addresses are offsets into one bytearray, modulo its size (a power of two)."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.size = size
        self.absent: set[int] = set()  # page numbers
        self.read_only: set[int] = set()  # even to the supervisor, as with CR0.WP
        self.supervisor: set[int] = set()

    def _check(self, va: int, length: int, user: bool, write: bool) -> None:
        if not (self.absent or self.read_only or self.supervisor):
            return
        for page in range(va >> 12, (va + length - 1 >> 12) + 1):
            error = (ERROR_WRITE if write else 0) | (ERROR_USER if user else 0)
            cr2 = max(va, page << 12) & 0xFFFFFFFF
            number = page & 0xFFFFF
            if number in self.absent:
                raise GuestFault(PF, error, cr2)
            if (user and number in self.supervisor) or (write and number in self.read_only):
                raise GuestFault(PF, error | ERROR_PRESENT, cr2)

    def _read(self, va: int, length: int, user: bool) -> int:
        self._check(va, length, user, write=False)
        start = va % self.size
        piece = self.data[start : start + length]
        return int.from_bytes(piece + self.data[: length - len(piece)], "little")

    def _write(self, va: int, value: int, length: int, user: bool) -> None:
        self._check(va, length, user, write=True)
        start = va % self.size
        head = min(length, self.size - start)
        piece = value.to_bytes(length, "little")
        self.data[start : start + head] = piece[:head]
        self.data[: length - head] = piece[head:]

    def read8(self, va: int, user: bool = False) -> int:
        return self._read(va, 1, user)

    def read16(self, va: int, user: bool = False) -> int:
        return self._read(va, 2, user)

    def read32(self, va: int, user: bool = False) -> int:
        return self._read(va, 4, user)

    def write8(self, va: int, value: int, user: bool = False) -> None:
        self._write(va, value, 1, user)

    def write16(self, va: int, value: int, user: bool = False) -> None:
        self._write(va, value, 2, user)

    def write32(self, va: int, value: int, user: bool = False) -> None:
        self._write(va, value, 4, user)

    def probe_write(self, va: int, length: int, user: bool = False) -> None:
        self._check(va, length, user, write=True)


class RecordingHooks:
    """Writes down every call as a tuple; RDTSC counts up by one."""

    def __init__(self, apic: LocalApic | None = None) -> None:
        self._apic = apic
        self.calls: list[tuple[str, *tuple[int, ...]]] = []
        self.tsc = 0

    @property
    def apic(self) -> LocalApic | None:
        return self._apic

    def flush_tlb(self, global_too: bool) -> None:
        self.calls.append(("flush_tlb", global_too))

    def invlpg(self, va: int) -> None:
        self.calls.append(("invlpg", va))

    def mode_changed(self) -> None:
        self.calls.append(("mode_changed",))

    def privilege_changed(self) -> None:
        self.calls.append(("privilege_changed",))

    def segments_changed(self, index: int) -> None:
        self.calls.append(("segments_changed", index))

    def segment_loaded(self, index: int, selector: int) -> None:
        """Not written down: segments_changed is."""

    def interrupted(self, vector: int, cpl: int) -> None:
        """Not written down."""

    def rdtsc(self) -> int:
        self.tsc += 1
        return self.tsc

    def unknown_msr(self, index: int, is_write: bool, value: int) -> None:
        self.calls.append(("unknown_msr", index, is_write, value))
