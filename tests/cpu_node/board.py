"""A CPU with memory and nothing else on its board, for tests of the engine: one process, the test drives it.

The guest program is assembly; it ends with HLT while interrupts are off, or with the first exception when
there is no IDT. Must be made in a process where stubs_unsafe.install() has run (child.isolated).
"""

from __future__ import annotations

import functools
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from keystone import KS_ARCH_X86, KS_MODE_16, KS_MODE_32, Ks

from cpu_node import layout as at
from cpu_node import mode as modes
from cpu_node.cpu import CR0_ET, CR0_NE, CR0_PE, CR0_PG, CR0_WP, CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_PSE, ESP
from cpu_node.cpuid import CpuModel
from cpu_node.descriptor import (
    CS,
    INTERRUPT_GATE32,
    TSS32_BUSY,
    Segment,
    pack,
    pack_gate,
    parse,
)
from cpu_node.engine import Engine
from cpu_node.errors import GuestFault
from cpu_node.lapic import LocalApic
from cpu_node.literals import hexadecimal

RAM = 16 << 20
GDT, IDT, TSS = 0x1000, 0x2000, 0x3000
STACK, STACK3 = 0x9000, 0xB000  # tops, of the kernel and of CPL 3
HANDLERS = 0x6000  # room for more handlers
DIRECTORY, TABLES = 0x10000, 0x11000  # page directory, page tables
CODE, DATA = 0x100000, 0x200000
MMIO = 0xF000_0000  # no RAM: 64 KiB of registers that hold what was written

HANDLER = 0x110000  # of vectors that Board.handler made: 256 bytes each
VECTOR = 0x40  # an ordinary one
COUNTER = 0x210000  # what COUNT counts
COUNT = f"inc dword ptr [{COUNTER:#x}]"
IRET = ".byte 0xcf"
# IRET to the next instruction, with more flags set
IRET_WITH = "pushfd\nor dword ptr [esp], {}\n.byte 0x0e\ncall next\nnext: add dword ptr [esp], 5\n.byte 0xcf"

CODE0, DATA0, CODE3, DATA3, TSS_SEL = 0x08, 0x10, 0x1B, 0x23, 0x28
FIRST_FREE = 0x30
FLAT = 0xFFFFF

HOST_FLAGS = ("fpu", "tsc", "cx8", "cmov", "clflush", "mmx", "fxsr", "sse", "sse2", "pni", "ssse3", "sse4_1",
              "sse4_2", "popcnt")
P, RW, US, A, D, PS, G = 1, 2, 4, 0x20, 0x40, 0x80, 0x100


@functools.cache
def _keystone(bits: int) -> Ks:
    return Ks(KS_ARCH_X86, KS_MODE_16 if bits == 16 else KS_MODE_32)


@functools.cache
def asm(text: str, va: int = CODE, bits: int = 32) -> bytes:
    """Guest machine code at `va`."""
    code, _ = _keystone(bits).asm(hexadecimal(text), va)
    assert code is not None, f"no code from {text!r}"
    return bytes(code)


@dataclass(frozen=True)
class Fault:
    vector: int
    error: int | None
    cr2: int | None
    eip: int


class BoardEngine(Engine):
    """Records faults; delivers them only where the board has an IDT."""

    board: Board

    def fault(self, fault: GuestFault) -> None:
        board = self.board
        board.faults.append(Fault(fault.vector, fault.error, fault.cr2, self.cpu.eip))
        if board.delivers:
            super().fault(fault)
        else:
            self.stopping = True


class Board:
    """Implements cpu_node.platform.Platform."""

    def __init__(self, memory: int = RAM, with_apic: bool = False,
                 engine: type[BoardEngine] = BoardEngine) -> None:
        self.fd = os.memfd_create("board")
        os.ftruncate(self.fd, memory)
        self.ram = mmap.mmap(self.fd, memory)
        self.intr = False
        self.vectors: list[int] = []  # what the 8259 will answer
        self.time_ns = 0
        self.ports: list[tuple[str, int, int, int]] = []  # ("in" or "out", port, width, value)
        self.strings: list[tuple[str, int, int, int]] = []  # string accesses: direction, port, width, count
        self.port_values: dict[int, int] = {}
        self.registers: dict[int, int] = {}  # MMIO bytes by address
        self.mmio: list[tuple[str, int, int, int]] = []
        self.reports: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.delivers = False
        self.idles = 0
        self.on_idle: Callable[[], None] | None = None  # else HLT ends the run
        self.on_poll: Callable[[], None] | None = None
        self.on_port: Callable[[int, int], None] | None = None
        self.alarms: list[int | None] = []
        model = CpuModel(tsc_hz=2_000_000_000, has_apic=with_apic, host=frozenset(HOST_FLAGS))
        apic = LocalApic(0, model.crystal_hz, model.tsc_hz, self.now_ns) if with_apic else None
        self.engine = engine(self.fd, self.ram, self, model, apic)
        self.engine.board = self
        self.cpu = self.engine.cpu
        self.regs = self.cpu.regs
        self._tables = 0
        self.flat()

    def forget(self) -> None:
        """RESET, for tests that run several programs: memory is the caller's."""
        self._tables = 0
        self.faults.clear()
        self.registers.clear()
        self.ports.clear()
        self.mmio.clear()
        self.vectors.clear()
        self.intr = False
        self.delivers = False
        self.cpu.reset()
        self.regs[:] = [0] * 8
        self.engine.record.reset_fpu()
        self.engine.contexts.forget_all()
        self.flat()

    # ---- the guest's tables

    def flat(self, cpl: int = 0) -> None:
        """Protected mode with flat segments and a TSS, at `cpl`; paging as it is."""
        for selector, raw in ((CODE0, pack(0, FLAT, 0xC09B)), (DATA0, pack(0, FLAT, 0xC093)),
                              (CODE3, pack(0, FLAT, 0xC0FB)), (DATA3, pack(0, FLAT, 0xC0F3)),
                              (TSS_SEL, pack(TSS, 0x2067, 0x80 | TSS32_BUSY))):
            self.describe(selector, raw)
        self.poke32(TSS + 4, STACK)
        self.poke32(TSS + 8, DATA0)
        self.poke32(TSS + 0x64, 0x68 << 16)  # I/O map base, 8 KiB of zeros: every port allowed
        cpu = self.cpu
        cpu.gdt_base, cpu.gdt_limit = GDT, 0xFFF
        cpu.idt_base, cpu.idt_limit = IDT, 0x7FF
        cpu.tr = parse(TSS_SEL, self.peek64(GDT + TSS_SEL))
        cpu.cr0 |= CR0_PE | CR0_ET | CR0_NE | CR0_WP
        cpu.cr4 |= CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_PSE
        cpu.cr0 &= ~0x6000_0000
        self.flat_segments(cpl)
        self.engine.flush_tlb(True)

    def flat_segments(self, cpl: int) -> None:
        """Flat segments and the stack of `cpl`; nothing is flushed."""
        code, data = (CODE3, DATA3) if cpl == 3 else (CODE0, DATA0)
        self.cpu.cpl = cpl
        for index in range(6):
            selector = code if index == CS else data
            self.segment(index, parse(selector, self.peek64(GDT + (selector & ~7))))
        self.regs[ESP] = STACK3 if cpl == 3 else STACK
        self.engine.mode_changed()

    def segment(self, index: int, segment: Segment) -> None:
        """Load a segment register behind the guest's back."""
        self.cpu.seg[index] = segment
        self.engine.segments_changed(index)
        self.engine.mode_changed()

    def describe(self, selector: int, raw: int) -> None:
        """Write a descriptor into the GDT."""
        struct.pack_into("<Q", self.ram, GDT + (selector & 0xFFF8), raw)

    def gate(self, vector: int, va: int, dpl: int = 0, kind: int = INTERRUPT_GATE32,
             selector: int = CODE0) -> None:
        """An IDT entry; exceptions are delivered from now on."""
        struct.pack_into("<Q", self.ram, IDT + 8 * vector, pack_gate(kind, selector, va, dpl=dpl))
        self.delivers = True

    def handler(self, body: str = COUNT, vector: int = VECTOR, dpl: int = 0) -> None:
        """An interrupt handler that does something (counts) and returns."""
        va = HANDLER + 0x100 * vector
        self.load(f"{body}\n{IRET}", va)
        self.gate(vector, va, dpl)

    def paging(self, cr4: int = CR4_PSE) -> None:
        """Identity-map all RAM by 4 KiB pages with all rights, and switch paging on."""
        for va in range(0, len(self.ram), 1 << 12):
            self.map(va, va)
        cpu = self.cpu
        cpu.cr3 = DIRECTORY
        cpu.cr4 = cpu.cr4 & ~CR4_PSE | cr4
        cpu.cr0 |= CR0_PG
        self.engine.flush_tlb(True)

    def map(self, va: int, pa: int, rights: int = P | RW | US, directory: int = DIRECTORY,
            pde: int = P | RW | US) -> int:
        """Write a page-table entry (and its directory entry); no flush. Returns the entry's address."""
        pde_pa = directory + (va >> 22 << 2)
        if not self.peek32(pde_pa) & P:
            table = TABLES + self._tables * 0x1000
            assert table < CODE
            self._tables += 1
            self.ram[table : table + 4096] = bytes(4096)
            self.poke32(pde_pa, table | pde)
        pte_pa = (self.peek32(pde_pa) & ~0xFFF) + (va >> 10 & 0xFFC)
        self.poke32(pte_pa, pa | rights)
        return pte_pa

    def new_directory(self, directory: int) -> None:
        """A second page directory, a copy of the first: the tables are shared."""
        self.ram[directory : directory + 4096] = self.ram[DIRECTORY : DIRECTORY + 4096]

    def flush(self) -> None:
        self.engine.flush_tlb(True)

    # ---- memory, as the test sees it

    def peek32(self, pa: int) -> int:
        return int(struct.unpack_from("<I", self.ram, pa)[0])

    def peek64(self, pa: int) -> int:
        return int(struct.unpack_from("<Q", self.ram, pa)[0])

    def poke32(self, pa: int, value: int) -> None:
        struct.pack_into("<I", self.ram, pa, value)

    def load(self, text: str | bytes, va: int = CODE, bits: int = 32) -> int:
        """Put code at `va` (= pa); returns the address behind it."""
        code = text if isinstance(text, bytes) else asm(text, va, bits)
        self.ram[va : va + len(code)] = code
        for page in range(va >> 12, (va + len(code) >> 12) + 1):
            self.engine.contexts.code_written(page)
        return va + len(code)

    # ---- running

    def run(self, text: str | bytes | None = None, va: int = CODE, bits: int = 32) -> Board:
        """Load `text` at `va` and run from there until HLT, or the first exception without an IDT."""
        if text is not None:
            self.load(text, va, bits)
        self.cpu.eip = va
        self.cpu.halted = False
        return self.resume()

    def resume(self) -> Board:
        self.engine.stopping = False
        self.engine.run()
        return self

    @property
    def fault(self) -> Fault:
        """The one exception there was."""
        (fault,) = self.faults
        return fault

    @property
    def translated(self) -> bool:
        """Does the current mode run translated code?"""
        return not self.engine.mode & modes.INTERPRETED

    def exits(self, reason: int) -> int:
        return self.engine.exits[reason]

    def raise_interrupt(self, vector: int) -> None:
        """The 8259 asks for service."""
        self.vectors.append(vector)
        self.intr = True
        self.engine.record.d[at.KICK // 4] = 1

    # ---- cpu_node.platform.Platform

    def port_read(self, port: int, width: int) -> int:
        value = self.port_values.get(port, 0xFFFF_FFFF) & (1 << 8 * width) - 1
        self.ports.append(("in", port, width, value))
        return value

    def port_write(self, port: int, width: int, value: int) -> None:
        self.ports.append(("out", port, width, value))
        if self.on_port is not None:
            self.on_port(port, value)

    def port_in_string(self, port: int, width: int, count: int) -> bytes:
        self.strings.append(("in", port, width, count))
        return b"".join(self.port_read(port, width).to_bytes(width, "little") for _ in range(count))

    def port_out_string(self, port: int, width: int, data: bytes) -> None:
        self.strings.append(("out", port, width, len(data) // width))
        for at_byte in range(0, len(data), width):
            self.port_write(port, width, int.from_bytes(data[at_byte : at_byte + width], "little"))

    def mmio_read(self, pa: int, width: int) -> int:
        value = int.from_bytes(bytes(self.registers.get(pa + i, 0xFF) for i in range(width)), "little")
        self.mmio.append(("r", pa, width, value))
        return value

    def mmio_write(self, pa: int, width: int, value: int) -> None:
        self.mmio.append(("w", pa, width, value))
        for i in range(width):
            self.registers[pa + i] = value >> 8 * i & 0xFF

    def int_ack(self) -> int | None:
        vector = self.vectors.pop(0) if self.vectors else None
        self.intr = bool(self.vectors)
        return vector

    def eoi(self, vector: int) -> None:
        pass

    def poll(self) -> None:
        if self.on_poll is not None:
            self.on_poll()

    def idle(self, deadline_ns: int | None) -> None:
        self.idles += 1
        if self.on_idle is not None:
            self.on_idle()
        else:
            self.engine.stopping = True

    def set_alarm(self, deadline_ns: int | None) -> None:
        self.alarms.append(deadline_ns)

    def now_ns(self) -> int:
        return self.time_ns

    def rdtsc(self) -> int:
        return 0x1_0000_0000

    def report(self, kind: str, text: str, data: dict[str, Any]) -> None:
        self.reports.append((kind, text))


