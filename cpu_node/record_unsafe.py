"""The CPU state record: what generated code and Python share, at a fixed address (layout.py).

General registers are 8 qwords of which the low halves count. EFLAGS is kept in two words: what the host's
flags hold while the guest runs (status flags and DF), and the rest. Left out: registers above SSE.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, MutableSequence
from typing import overload

from cpu_node import host_unsafe as host
from cpu_node import layout as at

HOST_MXCSR_DEFAULT = 0x1F80
_REG0 = at.REGS // 4


class Registers(MutableSequence[int]):
    """EAX..EDI in the record."""

    __slots__ = ("_d",)

    def __init__(self, dwords: memoryview) -> None:
        self._d = dwords

    @overload
    def __getitem__(self, i: int) -> int: ...
    @overload
    def __getitem__(self, i: slice) -> MutableSequence[int]: ...
    def __getitem__(self, i: int | slice) -> int | MutableSequence[int]:
        if isinstance(i, slice):
            return [self._d[_REG0 + 2 * n] for n in range(8)[i]]
        return self._d[_REG0 + 2 * i]

    @overload
    def __setitem__(self, i: int, value: int) -> None: ...
    @overload
    def __setitem__(self, i: slice, value: Iterable[int]) -> None: ...
    def __setitem__(self, i: int | slice, value: int | Iterable[int]) -> None:
        if isinstance(i, slice):
            assert not isinstance(value, int)
            for n, v in zip(range(8)[i], value, strict=True):
                self[n] = v
            return
        assert isinstance(value, int)
        self._d[_REG0 + 2 * i] = value
        self._d[_REG0 + 2 * i + 1] = 0

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])

    def __delitem__(self, i: int | slice) -> None:
        raise TypeError("registers can't be deleted")

    def insert(self, index: int, value: int) -> None:
        raise TypeError("registers can't be inserted")


class Record:
    """The record. stubs_unsafe.install() must have run."""

    def __init__(self) -> None:
        self.b = host.view8(at.RECORD, at.RECORD_SIZE)
        self.d = host.view32(at.RECORD, at.RECORD_SIZE // 4)
        self.q = host.view64(at.RECORD, at.RECORD_SIZE // 8)
        self.w = host.view16(at.RECORD, at.RECORD_SIZE // 2)
        self.loadable_d = host.view32(at.LOADABLE, at.LOADABLE_SIZE // 4)
        self.loadable_q = host.view64(at.LOADABLE, at.LOADABLE_SIZE // 8)
        self._regs = Registers(self.d)
        self.d[at.HOST_MXCSR // 4] = HOST_MXCSR_DEFAULT
        self.enter = host.function(at.CODE + at.STUB_ENTER)
        self.q[at.SIMULATE_SLOT // 8] = at.CODE + at.exit_stub(at.EXIT_SIMULATE)
        self.q[at.STALE_SLOT // 8] = at.CODE + at.exit_stub(at.EXIT_STALE)
        self.q[at.CHAIN_SLOT // 8] = at.CODE + at.exit_stub(at.EXIT_CHAIN)
        self.reset_fpu()

    def reset_fpu(self) -> None:
        """FNINIT and MXCSR's reset value, registers zero."""
        self.b[at.FX : at.FX + 512] = bytes(512)
        struct.pack_into("<H", self.b, at.FX, 0x37F)
        struct.pack_into("<II", self.b, at.FX + 24, 0x1F80, 0xFFFF)

    @property
    def cr2(self) -> int:
        """CR2: translated code reads it."""
        return int(self.d[at.CR2 // 4])

    @cr2.setter
    def cr2(self, value: int) -> None:
        self.d[at.CR2 // 4] = value

    @property
    def regs(self) -> Registers:
        return self._regs

    def get_eflags(self) -> int:
        d = self.d
        status = d[at.EFLAGS // 4] & at.STATUS_FLAGS
        return int(status | d[at.SYSTEM_FLAGS // 4] | d[at.INTERRUPT_FLAG // 4] | 2)

    def set_eflags(self, value: int) -> None:
        d = self.d
        d[at.EFLAGS // 4] = value & at.STATUS_FLAGS | 0x202  # the host's IF reads as one
        d[at.SYSTEM_FLAGS // 4] = value & at.OTHER_FLAGS
        d[at.INTERRUPT_FLAG // 4] = value & 0x200
        if value & 0x200 and d[at.PENDING // 4]:
            d[at.KICK // 4] = 1  # an interrupt waited for this

    def scratch(self, n: int) -> int:
        """r8..r13 at the last exit; n from 8."""
        return int(self.q[at.SCRATCH_REGS // 8 + n - 8])
