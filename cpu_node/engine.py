"""The CPU's main loop: find the translation of EIP, enter it, see why it came back.

Each exit (layout.EXIT_*) has one method. Guest faults are GuestFault exceptions from the simulator, the
page walk or a host fault, and end in gates.deliver. Interrupts are looked at when a signal said so, and
where the guest sets IF.
User code may run directly instead (direct/execution.py): `run` asks before it looks for a translation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from mmap import mmap
from time import thread_time_ns
from typing import TYPE_CHECKING

from cpu_node import gates
from cpu_node import layout as at
from cpu_node import mode as modes
from cpu_node.alignment import checked
from cpu_node.assists import Assists
from cpu_node.breakpoints import Breakpoints
from cpu_node.contexts import Contexts, Filled
from cpu_node.cpu import (
    CR0_AM,
    CR0_ET,
    CR0_PE,
    DR6_BS,
    REGISTER_NAMES,
    Cpu,
)
from cpu_node.describe import describe_instruction
from cpu_node.descriptor import CS, FS, GS, parse
from cpu_node.errors import DB, PF, UD, GuestFault
from cpu_node.flags import AC, OF, RF, TF
from cpu_node.interrupts import Interrupts
from cpu_node.line import PAGE, Line
from cpu_node.mmu_choice import MmuChoice
from cpu_node.msr import MASK64
from cpu_node.paging import GuestMemory, PhysicalMemory, Walker
from cpu_node.record_unsafe import Record
from cpu_node.rollback import roll_back
from cpu_node.simulate import Simulator, handler_of
from cpu_node.single import Single, guest_fault
from cpu_node.tlb import Tlb

if TYPE_CHECKING:
    from cpu_node.cpuid import CpuModel
    from cpu_node.direct.execution import Direct
    from cpu_node.lapic import LocalApic
    from cpu_node.platform import Platform
    from cpu_node.table import Row

_NONE: frozenset[int] = frozenset()
_MODE, _LEVEL, _SPACE = 1, 2, 4  # changed: anything; the privilege level; the address space
_SPECIAL_FLAGS = TF | RF | AC
_PAGE_FAULT = 14
_SPLIT_LOCK = 17  # #AC of the host: LOCK across cache lines, where its kernel forbids that
_CS_LIKE_INT = frozenset(("int", "int3", "into", "int1"))


class HostFault(AssertionError):
    """A host fault in generated code that no guest instruction explains."""


class Engine:
    """One CPU over a memory file. stubs_unsafe.install() must have run in this thread."""

    def __init__(self, ram_fd: int, ram: mmap, platform: Platform, model: CpuModel,
                 apic: LocalApic | None, code_fd: int | None = None) -> None:
        self.platform = platform
        self.apic = apic
        self.record = Record()
        self.physical = PhysicalMemory(ram)
        self.walker = Walker(self.physical)
        tlb = Tlb(self.record, ram_fd, self.physical.size, code_fd)
        self.contexts = Contexts(ram_fd, self.physical, self.walker, tlb)
        self.memory = GuestMemory(self.walker, self.contexts.code.lines, self._code_written,
                                  self._mmio_read, self._mmio_write)
        self.cpu = Cpu(self.record, self.memory, self, model)
        self.assists = Assists(self.record, self.cpu, self.contexts)
        self.single = Single(self.record, self.contexts.cache.code, self.cpu)
        self.simulator = Simulator(self.cpu, self.memory, self.single, platform)
        self.breakpoints = Breakpoints(self.cpu, self.memory)
        self.interrupts = Interrupts(self)
        self.mmu_choice: MmuChoice | None = None  # None: spaces keep what they begin with
        self.simulator.kick = self._kick
        self.direct: Direct | None = None  # runs user code untranslated where it can
        self.simulator.on_port = self.breakpoints.note_port
        self.stopping = False
        self.mode = modes.STEP
        self.exits: Counter[int] = Counter()
        self._dirty = _MODE  # what `_set_mode` has to do
        self._traced = _NONE  # linear pages with breakpoints on instructions
        self.after_ss = False  # the instruction before this one loaded SS
        self.record.d[at.KICK // 4] = 0
        for index in range(6):
            self.segments_changed(index)

    def use_tlb(self, choose: bool) -> None:
        """New address spaces use the software TLB; `choose`: until a window is found to serve them better.

        The host must have tlb.HOST_FLAG.
        """
        self.contexts.soft = True
        if choose:
            self.mmu_choice = MmuChoice(self.contexts)

    def start(self, registers: Mapping[str, int]) -> None:
        """RESET, then the state a boot plan gives: flat 32-bit protected mode by the GDT in memory."""
        cpu = self.cpu
        cpu.reset()
        self.record.reset_fpu()
        if self.apic is not None:
            self.apic.reset()
            self.apic.virtual_wire()
        self.contexts.forget_all()
        self.memory.forget()
        for index, name in enumerate(REGISTER_NAMES):
            cpu.regs[index] = registers[name]
        cpu.eip = registers["eip"]
        cpu.cr0 = CR0_PE | CR0_ET
        cpu.gdt_base, cpu.gdt_limit = registers["gdt_base"], registers["gdt_limit"]
        self.flush_tlb(True)
        for index in range(6):
            selector = registers["cs"] if index == CS else registers["ds"]
            cpu.seg[index] = parse(selector, self.memory.read64(cpu.gdt_base + selector))
            self.segments_changed(index)
        self.mode_changed()

    # ---- cpu.Hooks

    def flush_tlb(self, global_too: bool) -> None:
        """Global pages are compared too: that is cheap, and an early flush is never wrong."""
        self.memory.forget()
        if self.walker.configure(self.cpu.cr0, self.cpu.cr3, self.cpu.cr4):
            self.contexts.configuration_changed()
        self.contexts.flush()
        self._dirty |= _SPACE

    def invlpg(self, va: int) -> None:
        self.memory.forget()
        self.contexts.invlpg(va)

    def _kick(self) -> None:
        self.record.d[at.KICK // 4] = 1

    def mode_changed(self) -> None:
        self._dirty = _MODE

    def privilege_changed(self) -> None:
        self._dirty |= _LEVEL

    def segments_changed(self, index: int) -> None:
        segment = self.cpu.seg[index]
        record = self.record
        place = at.SELECTORS + 2 * index
        record.b[place : place + 2] = segment.selector.to_bytes(2, "little")
        if index in (FS, GS):
            base, pointer = (at.FS_BASE, at.FS_POINTER) if index == FS else (at.GS_BASE, at.GS_POINTER)
            plain = (segment.usable and segment.writable and segment.lowest == 0
                     and segment.highest == 0xFFFFFFFF and self.cpu.cr0 & 1)
            record.d[base // 4] = segment.base
            record.q[pointer // 8] = at.RECORD + base if plain else 0
        self.assists.segment_changed(index)

    def segment_loaded(self, index: int, selector: int) -> None:
        self.assists.loaded(index, selector)

    def interrupted(self, vector: int, cpl: int) -> None:
        self.assists.interrupted(vector, cpl)

    def rdtsc(self) -> int:
        return self.platform.rdtsc() + self.cpu.tsc_offset & MASK64

    def unknown_msr(self, index: int, is_write: bool, value: int) -> None:
        what = f"WRMSR {index:#x} = {value:#x}" if is_write else f"RDMSR {index:#x}"
        self.report("unknown-msr", f"{what}: no such MSR, #GP", at_next=True)

    # ---- memory beyond RAM

    def _mmio_read(self, pa: int, width: int) -> int:
        apic = self.apic
        if apic is not None and apic.enabled and pa & ~0xFFF == apic.mmio_base:
            return apic.read(pa & 0xFFF)
        return self.platform.mmio_read(pa, width)

    def _mmio_write(self, pa: int, width: int, value: int) -> None:
        apic = self.apic
        if apic is not None and apic.enabled and pa & ~0xFFF == apic.mmio_base:
            broadcast = apic.write(pa & 0xFFF, value)
            self.record.d[at.KICK // 4] = 1
            if broadcast is not None:
                self.platform.eoi(broadcast)
            return
        self.platform.mmio_write(pa, width, value)

    def _code_written(self, pa_page: int) -> None:
        self.contexts.code_written(pa_page)

    # ---- the loop

    def run(self) -> None:
        """Until `stopping`. Raises TripleFault."""
        record, cpu = self.record, self.cpu
        d, q, enter, exits = record.d, record.q, record.enter, self.exits
        contexts, simulator, interrupts = self.contexts, self.simulator, self.interrupts
        kick, entry, reason_at, eip_at = at.KICK // 4, at.ENTRY // 8, at.REASON // 4, at.EIP // 4
        changed = at.CHANGED // 8
        system_flags, pending, interrupt_flag = at.SYSTEM_FLAGS // 4, at.PENDING // 4, at.INTERRUPT_FLAG // 4
        handlers, direct, choice = self._handlers(), self.direct, self.mmu_choice
        page_faults = at.PAGE_FAULTS // 8
        if direct is not None:
            enter = direct.timed(enter)
        reason = at.EXIT_SIMULATE
        d[kick] = 1
        while not self.stopping:
            try:
                if d[kick] or cpu.halted or (d[pending] and d[interrupt_flag]):
                    if choice is not None and choice.look(thread_time_ns(), cpu.cpl == 3, q[page_faults]):
                        self.mode_changed()
                    interrupts.take_in(reason)
                    if cpu.halted or self.stopping:
                        continue
                if self._dirty:
                    self._set_mode()
                if (self.mode & modes.INTERPRETED or cpu.inhibit_interrupts
                        or (d[system_flags] & _SPECIAL_FLAGS and self._needs_steps())):
                    self.interpreted()
                    continue
                if direct is not None and self.mode & ~modes.SOFT == modes.USER and direct.run():
                    continue
                if self._traced and cpu.eip >> 12 in self._traced:
                    self.interpreted()
                    continue
                q[entry] = at.CODE + contexts.find(cpu.eip)
                if d[kick]:
                    continue
                enter()
                reason = d[reason_at]
                exits[reason] += 1
                if q[changed]:
                    self._adopt()
                if reason <= at.EXIT_INDIRECT:  # chain, indirect
                    cpu.eip = d[eip_at]
                elif reason == at.EXIT_SIMULATE:
                    eip = cpu.eip = d[eip_at]
                    if self.mode & modes.WATCHED:
                        self.interpreted()
                        continue
                    line = contexts.table.lines.get(eip >> 12)
                    known = line.simulated.get(eip & 0xFFF) if line is not None else None
                    if known is None:
                        self._simulate_new(line)
                    else:
                        handler, insn, simulator.text, cpu.eip = known
                        simulator.at = eip
                        try:
                            handler(simulator, insn)
                        except GuestFault:
                            cpu.eip = eip
                            raise
                    if cpu.pending_debug:
                        self._debug_trap()
                else:
                    handlers[reason]()
            except GuestFault as fault:
                self.fault(fault)

    def _simulate_new(self, line: Line | None) -> None:
        """An instruction of translated code that meets the simulator for the first time; keep what it is."""
        simulator, eip = self.simulator, self.cpu.eip
        insn = simulator.fetch()
        if line is not None and (eip & 0xFFF) + insn.length <= PAGE:
            following = eip + insn.length & 0xFFFFFFFF
            line.simulated[eip & 0xFFF] = (handler_of(insn.row), insn, simulator.text, following)
        simulator.step()

    def _handlers(self) -> dict[int, Callable[[], None]]:
        return {at.EXIT_STALE: self._stale, at.EXIT_FAULT: self._host_fault, at.EXIT_SIGNAL: self._signal,
                at.EXIT_UNENTERED: lambda: None, at.EXIT_ASSIST: self._assist_fault,
                at.EXIT_TLB: self._tlb_miss}

    def fault(self, fault: GuestFault) -> None:
        """Deliver an exception of the instruction at cpu.eip."""
        self.cpu.pending_debug = 0
        if fault.vector == UD:
            self.report("bad-opcode", "#UD")
        page_fault = fault.vector == PF and self.cpu.cpl == 3
        gates.deliver_fault(self.cpu, fault)
        if page_fault:
            self.record.q[at.PAGE_FAULTS // 8] += 1
            if self.mode & modes.SOFT:
                self.assists.interrupted(PF, 3)

    def interpreted(self) -> None:
        """One instruction in the simulator, with the debug facilities."""
        cpu, breakpoints = self.cpu, self.breakpoints
        flags = cpu.eflags
        armed = cpu.dr[7] & 0xFF
        shadow, cpu.inhibit_interrupts = cpu.inhibit_interrupts, False
        after_ss, self.after_ss = self.after_ss, False
        if armed and not flags & RF and not after_ss:
            breakpoints.check_execution()
        if armed:
            breakpoints.watch()
        try:
            row = self._step_checking_alignment() if self._checks_alignment() else self.simulator.step()
        finally:
            if armed:
                breakpoints.unwatch()
        if flags & RF and cpu.eflags & RF and row.mnemonic != "iret":
            cpu.eflags &= ~RF
        if flags & TF and (row.mnemonic not in _CS_LIKE_INT or (row.mnemonic == "into" and not flags & OF)):
            cpu.pending_debug |= DR6_BS
        if armed:
            cpu.pending_debug |= breakpoints.hits
        if cpu.inhibit_interrupts and row.action != "sti":
            self.after_ss = True  # MOV SS and POP SS hold debug exceptions off too [6.8.3]
        elif cpu.pending_debug:
            self._debug_trap()
        if shadow:
            self.interrupts.shadow_over = True
            self.record.d[at.KICK // 4] = 1

    def _needs_steps(self) -> bool:
        """TF, AC or RF is set: must instructions be run one by one?"""
        d, system_flags = self.record.d, at.SYSTEM_FLAGS // 4
        if not self.mode & (modes.INTERPRETED | modes.WATCHED):
            d[system_flags] &= ~RF  # no breakpoint is armed in this mode: RF is as good as over
        return bool(d[system_flags] & (TF | RF)) or self._checks_alignment()

    def _checks_alignment(self) -> bool:
        cpu = self.cpu
        return cpu.cpl == 3 and bool(cpu.cr0 & CR0_AM and self.record.d[at.SYSTEM_FLAGS // 4] & AC)

    def _step_checking_alignment(self) -> Row:
        with checked(self.memory):
            return self.simulator.step()

    def _debug_trap(self) -> None:
        cpu = self.cpu
        cpu.dr[6] |= cpu.pending_debug
        cpu.pending_debug = 0
        gates.deliver(cpu, DB)

    # ---- exits

    def _stale(self) -> None:
        self.cpu.eip = self.record.d[at.EIP // 4]
        self.contexts.stale(self.cpu.eip)

    def _signal(self) -> None:
        _, self.cpu.eip = roll_back(self.record, self.contexts.cache, self.record.q[at.FAULT_RIP // 8])

    def _assist_fault(self) -> None:
        """An assist met memory that isn't mapped: map it for the next time, let the simulator do it now."""
        q, cpu = self.record.q, self.cpu
        cpu.eip = self.record.d[at.EIP // 4]
        va = q[at.FAULT_ADDRESS // 8] - q[at.KERNEL_WINDOW // 8]
        if 0 <= va < 1 << 32:
            with suppress(GuestFault):
                self.contexts.fill(va, bool(q[at.FAULT_ERROR // 8] & 2), False, None)
        self._simulate()

    def _simulate(self) -> None:
        """One instruction of translated code by the simulator."""
        if self.mode & modes.WATCHED:
            self.interpreted()
            return
        self.simulator.step()
        if self.cpu.pending_debug:
            self._debug_trap()

    def _host_fault(self) -> None:
        record, cpu, contexts = self.record, self.cpu, self.contexts
        q = record.q
        rip, trap, ha = q[at.FAULT_RIP // 8], q[at.FAULT_TRAP // 8], q[at.FAULT_ADDRESS // 8]
        line, cpu.eip = roll_back(record, contexts.cache, rip)
        if trap == _SPLIT_LOCK:
            self._simulate()
            return
        if trap != _PAGE_FAULT:
            fault = guest_fault(trap, cpu)
            if fault is None:
                raise HostFault(f"host trap {trap} at {rip:#x}, guest eip {cpu.eip:#x}")
            raise fault
        va = ha - q[at.WINDOW // 8]
        if not 0 <= va < 1 << 32:
            self._simulate()  # FS or GS not plain, or an operand that wraps
            return
        write = bool(q[at.FAULT_ERROR // 8] & 2)
        user = cpu.cpl == 3
        filled = contexts.fill(va, write, user, line)
        if filled is not Filled.MAPPED:
            start = cpu.eip
            self._simulate()
            if filled is Filled.NO_MEMORY:
                contexts.device_access(line, start)

    def _tlb_miss(self) -> None:
        """A miss that tlb_stubs.py leaves to Python."""
        record, cpu, contexts = self.record, self.cpu, self.contexts
        d, rip = record.d, record.q[at.FAULT_RIP // 8]
        line, cpu.eip = roll_back(record, contexts.cache, rip)
        contexts.tlb.learn(rip, cpu.eip)
        va, write = d[at.TLB_VA // 4], bool(d[at.TLB_IS_WRITE // 4])
        last = va + d[at.TLB_LAST // 4]
        filled = contexts.fill_tlb(va, write, line) if last < 1 << 32 else Filled.WRAPS
        if last >> 12 != va >> 12 and filled is not Filled.WRAPS:
            with suppress(GuestFault):  # the simulator's, after what comes before it
                contexts.fill_tlb(last & ~0xFFF, write, line)
        elif filled is Filled.MAPPED:
            return
        start = cpu.eip
        self._simulate()
        if filled is Filled.NO_MEMORY:
            contexts.device_access(line, start)

    # ---- mode and context

    def _set_mode(self) -> None:
        """Find the code mode and enter its window and dispatch table, with no more work than must be."""
        dirty, self._dirty = self._dirty, 0
        cpl = self.cpu.cpl
        known = None if dirty & _MODE or self.direct is not None else self.assists.modes.get(cpl)
        mode = self.mode = self.contexts.softened(modes.of(self.cpu, cpl) if known is None else known)
        if mode & modes.WATCHED or self._traced or self.contexts.hidden:
            data, self._traced = self.breakpoints.pages() if mode & modes.WATCHED else (_NONE, _NONE)
            self.contexts.hide(data, self._traced)
        window, table = self.contexts.enter(mode, cpl == 3)
        self.record.q[at.WINDOW // 8] = window
        self.record.q[at.TABLE // 8] = table
        if known is None or not self.assists.same_but_for(cpl, bool(dirty & _SPACE)):
            self.assists.refresh(mode)
        if self.direct is not None and self.direct.wanted():
            self.record.q[at.USER_TABLE // 8] = 0  # assists leave where they would go to CPL 3

    def _adopt(self) -> None:
        """Assists changed segment registers, perhaps the privilege level."""
        cpl = self.assists.adopt()
        if cpl is not None:
            self.mode = self.assists.modes[cpl]
            self.contexts.enter(self.mode, cpl == 3)

    # ---- reports

    def where(self, at_next: bool = False) -> str:
        """'cs:eip: bytes  disassembly' of the current instruction."""
        return describe_instruction(self, at_next)

    def report(self, kind: str, text: str, at_next: bool = False) -> None:
        """One line to the launcher, with where it happened."""
        self.platform.report(kind, f"{text} at {self.where(at_next)}", self.cpu.dump())
