"""Runs a case in the CPU node's engine, in this process: paged, CPL 3 or 0, without the rest of the machine.

The case's pages are guest physical pages behind real page tables.  At CPL 3 every event goes through the
IDT and the TSS to a ring-0 handler that is just HLT, and the outcome is read from the frame that was pushed;
at CPL 0, where a frame would go to the case's own stack, the fault is taken when it is raised.

With `simulate` the simulator runs every instruction instead of the translator.

Every fourth case starts with its code pages as "mixed" (self-verifying translations), every eighth with
accessed and dirty bits clear.
Source: Intel SDM volume 3, 6.11 to 6.13 (gates and frames), 4.3 (32-bit paging).
"""

from __future__ import annotations

import os
import struct
import time
from dataclasses import dataclass
from mmap import mmap
from typing import Any
from zlib import crc32

from cpu_node import layout as at
from cpu_node import stubs_unsafe
from cpu_node.cpu import CR0_AM, CR0_NE, CR0_PE, CR0_PG, CR0_WP, CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_PSE
from cpu_node.cpuid import CpuModel
from cpu_node.descriptor import INTERRUPT_GATE32, null, pack, pack_gate, parse
from cpu_node.engine import Engine
from cpu_node.errors import GuestFault
from cpu_node.paging import RW, US, A, D, P
from tests.insn.segments import CS, LDT, SS, USER_CODE, USER_DATA, base_of, ldt_selector
from tests.insn.state import (
    ESP,
    FX_SIZE,
    HLT,
    PAGE_FAULT,
    PAGE_SIZE,
    VECTORS_WITH_ERROR,
    Case,
    CpuState,
    Stop,
)

RAM_SIZE = 4 << 20
IF = 0x200
VECTORS = 32

# The supervisor's own pages, where random addresses seldom hit, and at the bottom of RAM.
SYSTEM = 0x5E3A0000
GDT, IDT, TSS, HANDLERS, RING0_STACK, LDT_VA = (SYSTEM + n * PAGE_SIZE for n in range(6))
SYSTEM_PAGES = 6
PAGE_DIRECTORY = SYSTEM_PAGES * PAGE_SIZE  # pa; page tables and the cases' pages follow
TSS_SIZE = 104
FRAME_TOP = RING0_STACK + PAGE_SIZE

KERNEL_CODE, KERNEL_DATA, TASK, LDT_AT = 0x10, 0x18, 0x30, 0x38
DESCRIPTORS = {
    KERNEL_CODE: pack(0, 0xFFFFF, 0xC09B),
    KERNEL_DATA: pack(0, 0xFFFFF, 0xC093),
    USER_CODE & ~3: pack(0, 0xFFFFF, 0xC0FB),
    USER_DATA & ~3: pack(0, 0xFFFFF, 0xC0F3),
    TASK: pack(TSS, TSS_SIZE - 1, 0x008B),
    LDT_AT: pack(LDT_VA, 8 * len(LDT) - 1, 0x0082),
}

KERNEL_FLAT = (KERNEL_DATA, KERNEL_CODE, KERNEL_DATA, KERNEL_DATA, 0, 0)


class RunnerPlatform:
    """No devices, no interrupts; HLT ends the run."""

    intr = False

    def __init__(self) -> None:
        self.engine: Engine | None = None

    def port_read(self, port: int, width: int) -> int:
        return (1 << 8 * width) - 1

    def port_write(self, port: int, width: int, value: int) -> None:
        pass

    def port_in_string(self, port: int, width: int, count: int) -> bytes:
        return b"\xff" * width * count

    def port_out_string(self, port: int, width: int, data: bytes) -> None:
        pass

    def mmio_read(self, pa: int, width: int) -> int:
        raise AssertionError(f"read of {pa:#x}, which is no RAM")

    def mmio_write(self, pa: int, width: int, value: int) -> None:
        raise AssertionError(f"write to {pa:#x}, which is no RAM")

    def int_ack(self) -> int | None:
        return None

    def eoi(self, vector: int) -> None:
        pass

    def poll(self) -> None:
        pass

    def idle(self, deadline_ns: int | None) -> None:
        assert self.engine is not None
        self.engine.stopping = True

    def set_alarm(self, deadline_ns: int | None) -> None:
        pass

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def rdtsc(self) -> int:
        return time.monotonic_ns()

    def report(self, kind: str, text: str, data: dict[str, Any]) -> None:
        pass


class CaseEngine(Engine):
    """At CPL 0 a fault of the case ends the run where it is raised."""

    caught: GuestFault | None = None

    def fault(self, fault: GuestFault) -> None:
        if self.cpu.cpl == 0:
            self.caught = fault
            self.stopping = True
        else:
            super().fault(fault)


@dataclass(slots=True)
class Frame:
    """A guest page of the cases: where it is in RAM, and where its page-table entry is."""

    pa: int
    entry_pa: int


class TranslatedRunner:
    """`run(case) -> CpuState` in the translator.  One per process, for good (it installs signal handlers)."""

    def __init__(self, simulate: bool = False) -> None:
        stubs_unsafe.install()
        fd = os.memfd_create("case-ram")
        os.ftruncate(fd, RAM_SIZE)
        self._ram = mmap(fd, RAM_SIZE)
        platform = RunnerPlatform()
        self._engine = CaseEngine(fd, self._ram, platform, CpuModel(10**9, False, frozenset()), None)
        platform.engine = self._engine
        self._next_pa = PAGE_DIRECTORY + PAGE_SIZE
        self._frames: dict[int, Frame] = {}
        self._present: dict[int, bool] = {}  # va -> writable
        self._segments = {selector: parse(selector, raw) for selector, raw in DESCRIPTORS.items()}
        for selector in (USER_CODE, USER_DATA):
            self._segments[selector] = parse(selector, DESCRIPTORS[selector & ~3])
        for number, entry in enumerate(LDT):
            self._segments[ldt_selector(number)] = parse(ldt_selector(number), entry.descriptor())
        self._segments[0] = null(0)
        self._set_up_system()
        if simulate:  # an armed breakpoint (never reached): every instruction runs in the simulator
            self._engine.cpu.dr[0], self._engine.cpu.dr[7] = SYSTEM + PAGE_SIZE - 1, 0x401
            self._engine.mode_changed()

    def _dword(self, pa: int, value: int) -> None:
        struct.pack_into("<I", self._ram, pa, value)

    def _frame_of(self, va: int) -> Frame:
        frame = self._frames.get(va)
        if frame is None:
            directory_entry = PAGE_DIRECTORY + (va >> 22 << 2)
            (table,) = struct.unpack_from("<I", self._ram, directory_entry)
            if not table:
                table = self._take_page()
                self._dword(directory_entry, table | P | RW | US)
            entry_pa = (table & -PAGE_SIZE) + (va >> 12 & 0x3FF) * 4
            frame = self._frames[va] = Frame(self._take_page(), entry_pa)
        return frame

    def _take_page(self) -> int:
        pa = self._next_pa
        self._next_pa += PAGE_SIZE
        assert self._next_pa <= RAM_SIZE
        return pa

    def _set_up_system(self) -> None:
        ram = self._ram
        for n in range(SYSTEM_PAGES):
            self._dword(self._frame_of(SYSTEM + n * PAGE_SIZE).entry_pa, n * PAGE_SIZE | P | RW)
        for selector, raw in DESCRIPTORS.items():
            struct.pack_into("<Q", ram, GDT - SYSTEM + selector, raw)
        for number, entry in enumerate(LDT):
            struct.pack_into("<Q", ram, LDT_VA - SYSTEM + 8 * number, entry.descriptor())
        for vector in range(VECTORS):
            gate = pack_gate(INTERRUPT_GATE32, KERNEL_CODE, HANDLERS + vector, dpl=3)
            struct.pack_into("<Q", ram, IDT - SYSTEM + 8 * vector, gate)
            ram[HANDLERS - SYSTEM + vector] = HLT
        struct.pack_into("<II", ram, TSS - SYSTEM + 4, FRAME_TOP, KERNEL_DATA)  # ESP0, SS0
        struct.pack_into("<H", ram, TSS - SYSTEM + 102, TSS_SIZE)  # no I/O permission bitmap
        cpu = self._engine.cpu
        cpu.cr0 = CR0_PE | CR0_PG | CR0_WP | CR0_NE | CR0_AM
        cpu.cr3 = PAGE_DIRECTORY
        cpu.cr4 = CR4_PSE | CR4_OSFXSR | CR4_OSXMMEXCPT
        cpu.gdt_base, cpu.gdt_limit = GDT, PAGE_SIZE - 1
        cpu.idt_base, cpu.idt_limit = IDT, 8 * VECTORS - 1
        cpu.tr = parse(TASK, DESCRIPTORS[TASK])
        cpu.ldtr = parse(LDT_AT, DESCRIPTORS[LDT_AT])
        self._engine.flush_tlb(True)

    # One case

    def run(self, case: Case) -> CpuState:
        variant = crc32(case.code())
        self._place(case, mixed=variant & 3 == 0, clear_bits=variant & 0x1C == 0)
        self._set_registers(case)
        engine = self._engine
        engine.caught = None
        engine.stopping = False
        engine.run()
        return self._outcome(case)

    def _place(self, case: Case, mixed: bool, clear_bits: bool) -> None:
        """Pages, page tables, and no translation left that depends on former contents."""
        ram, contexts = self._ram, self._engine.contexts
        wanted = {page.va: page.writable for page in case.pages}
        edited = False
        for va in [va for va in self._present if va not in wanted]:
            self._dword(self._frames[va].entry_pa, 0)
            del self._present[va]
            edited = True
        for page in case.pages:
            frame = self._frame_of(page.va)
            if clear_bits or self._present.get(page.va) != page.writable:
                bits = P | US | (RW if page.writable else 0) | (0 if clear_bits else A | D)
                self._dword(frame.entry_pa, frame.pa | bits)
                self._present[page.va] = page.writable
                edited = True
            number = frame.pa >> 12
            if ram[frame.pa : frame.pa + PAGE_SIZE] != page.data:
                ram[frame.pa : frame.pa + PAGE_SIZE] = page.data
            contexts.code_written(number)
            contexts.writes.pop(number, None)
            if mixed:
                contexts.code.mixed.add(number)
            else:
                contexts.code.mixed.discard(number)
        if edited:
            self._engine.flush_tlb(True)

    def _set_registers(self, case: Case) -> None:
        engine, segments = self._engine, self._segments
        cpu = engine.cpu
        for index, selector in enumerate(case.selectors if case.cpl == 3 else KERNEL_FLAT):
            segment = segments[selector]
            if cpu.seg[index] is not segment:
                cpu.seg[index] = segment
                engine.segments_changed(index)
                engine.mode_changed()
        if cpu.cpl != case.cpl:
            cpu.cpl = case.cpl
            engine.mode_changed()
        for number, value in enumerate(case.regs):
            cpu.regs[number] = value
        cpu.eip = case.eip
        cpu.eflags = case.eflags | IF | 2
        cpu.halted = cpu.inhibit_interrupts = False
        cpu.pending_debug = 0
        cpu.dr[6] = 0xFFFF0FF0
        engine.record.b[at.FX : at.FX + FX_SIZE] = case.fx

    def _outcome(self, case: Case) -> CpuState:
        engine = self._engine
        cpu = engine.cpu
        regs = list(cpu.regs)
        selectors = [segment.selector for segment in cpu.seg]
        eip, eflags = cpu.eip, cpu.eflags
        if case.cpl == 0:
            fault = engine.caught
            if fault is None:
                stop, eip = Stop("hlt"), eip - 1 & 0xFFFFFFFF
            else:
                stop = Stop("fault", fault.vector, fault.error or 0, fault.cr2 or 0)
        else:
            stop, eip, eflags = self._from_frame(regs, selectors)
        changed = {}
        for page in case.pages:
            pa = self._frames[page.va].pa
            data = self._ram[pa : pa + PAGE_SIZE]
            if data != page.data:
                changed[page.va] = data
        fx = bytes(engine.record.b[at.FX : at.FX + FX_SIZE])
        return CpuState(stop, eip, tuple(regs), eflags, fx, changed, tuple(selectors))

    def _from_frame(self, regs: list[int], selectors: list[int]) -> tuple[Stop, int, int]:
        """(stop, eip, eflags) from the ring-0 stack; puts the case's ESP, CS and SS into place."""
        cpu = self._engine.cpu
        vector = cpu.eip - 1 - HANDLERS
        assert 0 <= vector < VECTORS, f"halted at {cpu.eip:#x}"
        with_error = vector in VECTORS_WITH_ERROR
        assert regs[ESP] == FRAME_TOP - (24 if with_error else 20), f"frame at {regs[ESP]:#x}"
        pa = regs[ESP] - SYSTEM
        error = 0
        if with_error:
            (error,) = struct.unpack_from("<I", self._ram, pa)
            pa += 4
        eip, selectors[CS], eflags, regs[ESP], selectors[SS] = struct.unpack_from("<5I", self._ram, pa)
        if vector == 13 and self._byte_at(base_of(selectors[CS]) + eip & 0xFFFFFFFF) == HLT:
            return Stop("hlt"), eip, eflags
        return Stop("fault", vector, error, cpu.cr2 if vector == PAGE_FAULT else 0), eip, eflags

    def _byte_at(self, va: int) -> int:
        frame = self._frames.get(va & -PAGE_SIZE)
        if frame is None or va & -PAGE_SIZE not in self._present:
            return -1
        return self._ram[frame.pa + va % PAGE_SIZE]
