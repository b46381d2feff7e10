"""Runs a case in the CPU node's engine, in this process: paged, CPL 3 or 0, without the rest of the machine.

The case's pages are guest physical pages behind real page tables.  At CPL 3 every event goes through the
IDT and the TSS to a ring-0 handler that is just HLT, and the outcome is read from the frame that was pushed;
at CPL 0, where a frame would go to the case's own stack, the fault is taken when it is raised.

Five ways to run the same case differently, none of which may change its outcome:
`simulate`: the simulator runs every instruction, the translator none.
`base`: all segments start there (those of the LDT so much higher), and all pages lie so much higher.
`on_demand`: no page is present until it is touched, and none writable until it is written; the page fault
is then served here and the instruction restarted.
`direct`: user code runs untouched in a child of the trap back end of that name.
`soft`: user code finds its data by the software TLB.

Every fourth family of cases starts with its code pages as "mixed" (self-verifying translations), every eighth
with accessed and dirty bits clear.
Source: Intel SDM volume 3, 6.11 to 6.13 (gates and frames), 4.3 (32-bit paging).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap

from cpu_node import layout as at
from cpu_node import mode as modes
from cpu_node import stubs_unsafe
from cpu_node.cpu import CR0_AM, CR0_NE, CR0_PE, CR0_PG, CR0_WP, CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_PSE
from cpu_node.cpuid import CpuModel
from cpu_node.descriptor import INTERRUPT_GATE32, null, pack, pack_gate, parse
from cpu_node.direct.choose import start
from cpu_node.direct.window import ChildWindow
from cpu_node.engine import Engine
from cpu_node.errors import GuestFault
from cpu_node.paging import ERR_WRITE, RW, US, A, D, P
from tests.insn.platform import RunnerPlatform
from tests.insn.segments import CS, LDT, SS, USER_CODE, USER_DATA, base_of, ldt_selector
from tests.insn.state import (
    ESP,
    FX_SIZE,
    HLT,
    PAGE_FAULT,
    PAGE_SIZE,
    TRANSLATED_INSTEAD,
    VECTORS_WITH_ERROR,
    Case,
    CpuState,
    Stop,
)

RAM_SIZE = 4 << 20
IF = 0x200
VECTORS = 32
MASK = 0xFFFFFFFF

# The supervisor's own pages, where random addresses seldom hit, and at the bottom of RAM.
SYSTEM = 0x5E3A0000
GDT, IDT, TSS, HANDLERS, RING0_STACK, LDT_VA = (SYSTEM + n * PAGE_SIZE for n in range(6))
SYSTEM_PAGES = 6
PAGE_DIRECTORY = SYSTEM_PAGES * PAGE_SIZE  # pa; page tables and the cases' pages follow
TSS_SIZE = 104
FRAME_TOP = RING0_STACK + PAGE_SIZE

KERNEL_CODE, KERNEL_DATA, TASK, LDT_AT, CASE_CODE, CASE_DATA = 0x10, 0x18, 0x30, 0x38, 0x40, 0x48
# What kernel code of a case has in ES, CS, SS, DS, FS, GS.
KERNEL_SELECTORS = (CASE_DATA, CASE_CODE, CASE_DATA, CASE_DATA, 0, 0)
FLAT_LIMIT = 0xFFFFF


def _descriptors(base: int) -> dict[int, int]:
    return {
        KERNEL_CODE: pack(0, FLAT_LIMIT, 0xC09B),
        KERNEL_DATA: pack(0, FLAT_LIMIT, 0xC093),
        USER_CODE & ~3: pack(base, FLAT_LIMIT, 0xC0FB),
        USER_DATA & ~3: pack(base, FLAT_LIMIT, 0xC0F3),
        TASK: pack(TSS, TSS_SIZE - 1, 0x008B),
        LDT_AT: pack(LDT_VA, 8 * len(LDT) - 1, 0x0082),
        CASE_CODE: pack(base, FLAT_LIMIT, 0xC09B),
        CASE_DATA: pack(base, FLAT_LIMIT, 0xC093),
    }


class CaseEngine(Engine):
    """At CPL 0 a fault of the case ends the run where it is raised.  `serve` may take page faults."""

    caught: GuestFault | None = None
    simulate = False
    was_soft = False
    serve: Callable[[GuestFault], bool] | None = None

    def fault(self, fault: GuestFault) -> None:
        if fault.vector == PAGE_FAULT and self.serve is not None and self.serve(fault):
            return
        if self.cpu.cpl == 0:
            self.caught = fault
            self.stopping = True
        else:
            super().fault(fault)
            if self.serve is not None:
                self.assists._forget_gates()  # the next page fault comes here too, not to an assist

    def _set_mode(self) -> None:
        super()._set_mode()
        if self.simulate:
            self.mode |= modes.STEP
        self.was_soft |= bool(self.mode & modes.SOFT)


@dataclass(slots=True)
class Frame:
    """A guest page of the cases: where it is in RAM, where its page-table entry is, what it holds."""

    va: int
    pa: int
    entry_pa: int
    held: bytes | None = None


class GuestRunner:
    """`run(case) -> CpuState` in the engine.  One per process, for good (it installs signal handlers)."""

    def __init__(
        self, simulate: bool = False, base: int = 0, on_demand: bool = False, direct: str = "",
        soft: bool = False,
    ) -> None:  # fmt: skip
        stubs_unsafe.install()
        fd = os.memfd_create("case-ram")
        os.ftruncate(fd, RAM_SIZE)
        self._ram = mmap(fd, RAM_SIZE)
        platform = RunnerPlatform()
        self._engine = CaseEngine(fd, self._ram, platform, CpuModel(10**9, False, frozenset()), None)
        platform.engine = self._engine
        self._engine.simulate = simulate
        self._soft = self._engine.contexts.soft = soft
        self._base = base
        self._on_demand = on_demand
        self._next_pa = PAGE_DIRECTORY + PAGE_SIZE
        self._served = 0  # page faults of this run
        self._frames: dict[int, Frame] = {}  # by linear address
        self._present: dict[int, bool] = {}  # linear address -> writable
        self._descriptors = _descriptors(base)
        self._ldt = [entry._replace(base=entry.base + base & MASK).descriptor() for entry in LDT]
        self._segments = {selector: parse(selector, raw) for selector, raw in self._descriptors.items()}
        for selector in (USER_CODE, USER_DATA):
            self._segments[selector] = parse(selector, self._descriptors[selector & ~3])
        for number, raw in enumerate(self._ldt):
            self._segments[ldt_selector(number)] = parse(ldt_selector(number), raw)
        self._segments[0] = null(0)
        self._set_up_system()
        if direct:
            self._engine.direct = start(self._engine, fd, "direct", direct)
            assert self._engine.direct is not None, "no trap back end works here"

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
            frame = self._frames[va] = Frame(va, self._take_page(), entry_pa)
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
        for selector, raw in self._descriptors.items():
            struct.pack_into("<Q", ram, GDT - SYSTEM + selector, raw)
        for number, raw in enumerate(self._ldt):
            struct.pack_into("<Q", ram, LDT_VA - SYSTEM + 8 * number, raw)
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
        cpu.tr = parse(TASK, self._descriptors[TASK])
        cpu.ldtr = parse(LDT_AT, self._descriptors[LDT_AT])
        self._engine.flush_tlb(True)

    # One case

    def run(self, case: Case) -> CpuState:
        variant = (case.eip + 0x51 * case.code_length) * 0x9E3779B1 >> 13  # the same for a family
        self._place(case, mixed=variant & 3 == 0, clear_bits=variant & 0x1C == 0)
        self._set_registers(case)
        engine = self._engine
        engine.caught = None
        self._served = 0
        engine.stopping = engine.was_soft = False
        if self._on_demand:
            wanted = {page.va + self._base & MASK: page.writable for page in case.pages}
            engine.serve = lambda fault: self._serve(fault, wanted)
        direct = engine.direct
        before = 0 if direct is None else direct.translated_ns
        engine.run()
        engine.serve = None
        if direct is not None:
            assert direct.broken is None, direct.broken
            child = engine.contexts.space.direct
            if isinstance(child, ChildWindow) and child.id_flag:
                child.replace()  # no child can be given EFLAGS.ID, nor have it taken away
            if direct.translated_ns != before:
                self._outcome(case)  # notes what has changed
                return CpuState(Stop(TRANSLATED_INSTEAD))
        assert engine.was_soft or not self._soft, "it ran in a window"
        assert not (engine.simulate and engine.exits), "translated code ran in the simulator's run"
        return self._outcome(case)

    def _place(self, case: Case, mixed: bool, clear_bits: bool) -> None:
        """Pages, page tables, and no translation left that depends on former contents."""
        base = self._base
        wanted = {page.va + base & MASK for page in case.pages}
        if self._on_demand:
            wanted.clear()
        edited = False
        for va in [va for va in self._present if va not in wanted]:
            self._dword(self._frames[va].entry_pa, 0)
            del self._present[va]
            edited = True
        for page in case.pages:
            va = page.va + base & MASK
            frame = self._frames.get(va) or self._frame_of(va)
            if self._on_demand:
                pass
            elif clear_bits or self._present.get(va) != page.writable:
                self._grant(va, page.writable, 0 if clear_bits else A | D)
                edited = True
            if frame.held is not page.data:
                self._fill(frame, page.data, mixed)
        if edited:
            self._engine.flush_tlb(True)

    def _grant(self, va: int, writable: bool, bits: int) -> None:
        frame = self._frames[va]
        self._dword(frame.entry_pa, frame.pa | P | US | (RW if writable else 0) | bits)
        self._present[va] = writable

    def _fill(self, frame: Frame, data: bytes, mixed: bool) -> None:
        contexts, number = self._engine.contexts, frame.pa >> 12
        if self._engine.direct is not None:
            self._hide(frame)
        self._ram[frame.pa : frame.pa + PAGE_SIZE] = frame.held = data
        contexts.code_written(number)
        contexts.writes.pop(number, None)
        if mixed:
            contexts.code.mixed.add(number)
        else:
            contexts.code.mixed.discard(number)

    def _hide(self, frame: Frame) -> None:
        """Memory changes behind the engine's back: no child may go on executing the page unseen."""
        child = self._engine.contexts.space.direct
        if isinstance(child, ChildWindow) and frame.va >> 12 in child.executable:
            (entry,) = struct.unpack_from("<I", self._ram, frame.entry_pa)
            self._dword(frame.entry_pa, 0)
            self._engine.invlpg(frame.va)
            self._dword(frame.entry_pa, entry)

    def _serve(self, fault: GuestFault, wanted: dict[int, bool]) -> bool:
        """What a kernel does on a page fault; False where the case has no such page or right."""
        va = (fault.cr2 or 0) & -PAGE_SIZE
        if va not in wanted or self._present.get(va):
            return False
        writes = bool((fault.error or 0) & ERR_WRITE)
        if va in self._present and not (writes and wanted[va]):
            return False
        self._grant(va, writes and wanted[va], 0)
        self._served += 1
        return True

    def _set_registers(self, case: Case) -> None:
        engine, segments = self._engine, self._segments
        cpu = engine.cpu
        for index, selector in enumerate(case.selectors if case.cpl == 3 else KERNEL_SELECTORS):
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
                stop, eip = Stop("hlt"), eip - 1 & MASK
            else:
                stop = self._fault_stop(fault.vector, fault.error or 0, fault.cr2 or 0)
        else:
            stop, eip, eflags = self._from_frame(regs, selectors)
        changed = {}
        for page in case.pages:
            frame = self._frames[page.va + self._base & MASK]
            data = self._ram[frame.pa : frame.pa + PAGE_SIZE]
            if data != page.data:
                changed[page.va] = data
                frame.held = None
        fx = bytes(engine.record.b[at.FX : at.FX + FX_SIZE])
        return CpuState(stop, eip, tuple(regs), eflags, fx, changed, tuple(selectors), self._served)

    def _fault_stop(self, vector: int, error: int, cr2: int) -> Stop:
        return Stop("fault", vector, error, cr2 - self._base & MASK if vector == PAGE_FAULT else 0)

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
        if vector == 13 and self._byte_at(base_of(selectors[CS]) + eip + self._base & MASK) == HLT:
            return Stop("hlt"), eip, eflags
        return self._fault_stop(vector, error, cpu.cr2), eip, eflags

    def _byte_at(self, va: int) -> int:
        frame = self._frames.get(va & -PAGE_SIZE)
        if frame is None or va & -PAGE_SIZE not in self._present:
            return -1
        return self._ram[frame.pa + va % PAGE_SIZE]
