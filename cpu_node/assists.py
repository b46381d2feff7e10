"""What Python tells the assists (assist_stubs.py) through the record, and what it takes over from them.

The assists work from facts written here: the windows and dispatch tables of both privileges of the current
context, what SYSENTER, SYSEXIT and IRET land on, which selectors were loaded without a fault. Each fact holds
until something that it depends on changes; whoever changes that calls Hooks.mode_changed, and `refresh` runs
before translated code is entered again. Descriptors in memory are compared by the assists themselves.
"""

from __future__ import annotations

from cpu_node import descriptor
from cpu_node import layout as at
from cpu_node import mode as modes
from cpu_node.assist_stubs import ASSIST_NAMES, OUTER_SLOTS, assist_slot
from cpu_node.assist_text import LANDED_FAULT, LANDED_GATE, LANDED_IRET, LANDED_SYSENTER, LANDED_SYSEXIT
from cpu_node.contexts import Contexts
from cpu_node.cpu import CR0_PE, Cpu
from cpu_node.descriptor import (
    CS,
    INTERRUPT_GATE32,
    SELECTOR_INDEX,
    SELECTOR_TI,
    SS,
    TRAP_GATE32,
    TSS32_BUSY,
    Segment,
    gate,
    null,
    parse,
)
from cpu_node.errors import PF
from cpu_node.far import CODE32_RING0, CODE32_RING3, DATA32_RING0, DATA32_RING3
from cpu_node.flags import VM
from cpu_node.record_unsafe import Record
from cpu_node.stubs_unsafe import assist_addresses

NO_VECTOR = 0xFFFFFFFF
NO_SELECTOR = 0xFFFFFFFF  # 0 is one that IRET may find on the stack, and must refuse
FLAT_LIMIT = 0x000F_0000_0000_FFFF  # of a descriptor; SYSENTER's segments have no other
_CHANGED = at.CHANGED // 8


class Assists:
    """The record's part that the assists use."""

    def __init__(self, record: Record, cpu: Cpu, contexts: Contexts) -> None:
        self.record = record
        self.cpu = cpu
        self.contexts = contexts
        self._known: list[int] = []  # selectors with an entry
        self._gdt = (0, 0)
        self._gate_tables: tuple[object, ...] = ()  # what the known gate depends on
        self._kernel: tuple[Segment, Segment] | None = None  # CS and SS as last seen at CPL 0
        self._user: tuple[Segment, Segment] | None = None
        self.modes: dict[int, int] = {}  # the current mode at both privilege levels, once known
        self._landings: dict[int, tuple[Segment, Segment, int]] = {}  # kind -> CS, SS, CPL
        addresses = assist_addresses()
        for name in ASSIST_NAMES:
            record.q[assist_slot(name) // 8] = addresses[name]

    # ---- what Python tells

    def refresh(self, mode: int) -> None:
        """The context or the mode changed; translated code of `mode` is about to be entered."""
        cpu, q, d = self.cpu, self.record.q, self.record.d
        d[at.CR0 // 4], d[at.CR4 // 4] = cpu.cr0, cpu.cr4
        if (cpu.gdt_base, cpu.gdt_limit) != self._gdt:
            self._gdt = (cpu.gdt_base, cpu.gdt_limit)
            self.forget_selectors()
        tables = (cpu.idt_base, cpu.idt_limit, *self._gdt, cpu.tr)
        if tables != self._gate_tables:
            self._gate_tables = tables
            self._forget_gates()
        q[at.TOUCHED_BY_KERNEL // 8] = self.contexts.kernel_touched.ha
        if mode & modes.INTERPRETED:
            self.modes = {}
            q[at.KERNEL_WINDOW // 8] = self.contexts.space.kernel.ha
            q[at.TOUCHED_BY_SPACE // 8] = self.contexts.space.touched.ha
            q[at.KERNEL_TABLE // 8] = q[at.USER_TABLE // 8] = q[at.SYSENTER_READY // 8] = 0
            d[at.RETURN_READY // 4] = 0
            return
        pair = (cpu.seg[CS], cpu.seg[SS])
        if mode & modes.USER:
            self._user = pair
        else:
            self._kernel = pair
        self.modes = {0: modes.of(cpu, 0), 3: modes.of(cpu, 3)}
        self._enter_space()
        self._refresh_sysenter()
        self._refresh_return()
        if mode & modes.WATCHED:  # breakpoints and RF are the simulator's
            q[at.SYSENTER_READY // 8] = d[at.RETURN_READY // 4] = 0
            self._forget_gates()

    def _forget_gates(self) -> None:
        self.record.d[(at.INT_GATE + at.GATE_VECTOR) // 4] = NO_VECTOR
        self.record.d[(at.FAULT_GATE + at.GATE_VECTOR) // 4] = NO_VECTOR

    def _enter_space(self) -> None:
        """Windows and tables of the current space, in the current mode at both levels."""
        contexts, q = self.contexts, self.record.q
        space = contexts.space
        self.record.d[at.CR3 // 4] = self.cpu.cr3
        q[at.KERNEL_WINDOW // 8] = space.kernel.ha
        q[at.TOUCHED_BY_SPACE // 8] = space.touched.ha
        q[at.KERNEL_TABLE // 8] = contexts.table_of(self.modes[0]).ha
        mode = self.modes[3] = contexts.softened(self.modes[3])
        table = contexts.user_table_if_any(mode)
        q[at.USER_TABLE // 8] = table.ha if table else 0
        q[at.USER_WINDOW // 8] = at.TLB_BASE if mode & modes.SOFT else space.user.ha if table else 0

    def same_but_for(self, cpl: int, space: bool) -> bool:
        """Only the level changed, to `cpl`, and perhaps the space; False where `refresh` must do it."""
        pair = self._user if cpl == 3 else self._kernel
        seg = self.cpu.seg
        if pair is None or not (_alike(pair[0], seg[CS]) and _alike(pair[1], seg[SS])):
            return False
        if space or not self.record.q[at.USER_TABLE // 8]:
            self._enter_space()
        return True

    def _refresh_sysenter(self) -> None:
        cpu, d = self.cpu, self.record.d
        selector = cpu.sysenter_cs & 0xFFFC
        self.record.q[at.SYSENTER_READY // 8] = selector
        if not selector:
            return
        flat = descriptor.flat
        inner = (flat(selector, CODE32_RING0), flat(selector + 8 & 0xFFFF, DATA32_RING0), 0)
        outer = (flat((selector + 16 | 3) & 0xFFFF, CODE32_RING3),
                 flat((selector + 24 | 3) & 0xFFFF, DATA32_RING3), 3)
        self._landings[LANDED_SYSENTER], self._landings[LANDED_SYSEXIT] = inner, outer
        d[at.SYSENTER_EIP // 4], d[at.SYSENTER_ESP // 4] = cpu.sysenter_eip, cpu.sysenter_esp
        d[at.SYSENTER_SELECTORS // 4] = inner[0].selector | inner[1].selector << 16
        d[at.SYSEXIT_SELECTORS // 4] = outer[0].selector | outer[1].selector << 16

    def _refresh_return(self) -> None:
        cpu, d, q = self.cpu, self.record.d, self.record.q
        kernel = self._kernel and self._in_gdt(self._kernel[0])
        d[at.RETURN_READY // 4] = bool(kernel) and not cpu.nmi_blocked
        if self._kernel and kernel:
            d[at.KERNEL_CS // 4], d[at.KERNEL_CS_VA // 4] = self._kernel[0].selector, kernel[0]
            q[at.KERNEL_CS_RAW // 8] = kernel[1]
        d[at.USER_CS // 4] = NO_SELECTOR
        if self._user is None:
            return
        code, stack = (self._in_gdt(segment) for segment in self._user)
        if code and stack and not self._user[0].conforming:
            d[at.USER_CS // 4], d[at.USER_CS_VA // 4] = self._user[0].selector, code[0]
            d[at.USER_SS // 4], d[at.USER_SS_VA // 4] = self._user[1].selector, stack[0]
            q[at.USER_CS_RAW // 8], q[at.USER_SS_RAW // 8] = code[1], stack[1]
            self._landings[LANDED_IRET] = (*self._user, 3)

    def _in_gdt(self, segment: Segment) -> tuple[int, int] | None:
        """(va, descriptor) where the segment must stand in the GDT to be loaded as it is."""
        index = segment.selector & SELECTOR_INDEX
        if segment.selector & SELECTOR_TI or not index or index + 7 > self.cpu.gdt_limit:
            return None
        raw = segment.raw or segment.rights << 40 | FLAT_LIMIT
        return self.cpu.gdt_base + index & 0xFFFFFFFF, raw

    def loaded(self, index: int, selector: int) -> None:
        """The simulator loaded a selector into DS, ES, FS or GS without a fault: assists may, too."""
        cpu, segment = self.cpu, self.cpu.seg[index]
        if cpu.cpl or not cpu.cr0 & CR0_PE or cpu.eflags & VM or selector & SELECTOR_TI:
            return
        if (cpu.gdt_base, cpu.gdt_limit) != self._gdt:
            return
        plain = segment.usable and segment.writable and segment.lowest == 0 and segment.highest == 0xFFFFFFFF
        entry = selector * at.LOADABLE_STRIDE
        d, q = self.record.loadable_d, self.record.loadable_q
        d[(entry + at.SELECTOR_PLAIN) // 4] = 2 if not segment.usable else int(plain)
        d[(entry + at.SELECTOR_FLAT) // 4] = plain and segment.flat
        d[(entry + at.SELECTOR_OUTER) // 4] = _is_outer(segment)
        d[(entry + at.SELECTOR_BASE) // 4] = segment.base
        d[(entry + at.SELECTOR_VA) // 4] = cpu.gdt_base + (selector & SELECTOR_INDEX) & 0xFFFFFFFF
        q[(entry + at.SELECTOR_RAW) // 8] = segment.raw
        self._known.append(selector)

    def interrupted(self, vector: int, cpl: int) -> None:
        """INT n or #PF was delivered by Python: the next one may be assisted."""
        cpu, d, q = self.cpu, self.record.d, self.record.q
        code, stack = cpu.seg[CS], cpu.seg[SS]
        if cpl != 3 or cpu.cpl or not cpu.protected:
            return
        if not (code.flat and stack.flat and code.big and stack.big):
            return
        entry_va = cpu.idt_base + 8 * vector & 0xFFFFFFFF
        raw_gate = cpu.memory.read64(entry_va)
        entry = gate(raw_gate)
        places = self._in_gdt(code), self._in_gdt(stack)
        if entry.type not in (INTERRUPT_GATE32, TRAP_GATE32) or cpu.tr.type != TSS32_BUSY:
            return
        if places[0] is None or places[1] is None or code.conforming or not (code.raw and stack.raw):
            return
        if entry.offset != cpu.eip:
            return  # another exception came of it
        block, landed = (at.FAULT_GATE, LANDED_FAULT) if vector == PF else (at.INT_GATE, LANDED_GATE)
        dword, qword = block // 4, block // 8
        d[dword + at.GATE_VECTOR // 4], d[dword + at.GATE_VA // 4] = vector, entry_va
        d[dword + at.GATE_EIP // 4] = entry.offset
        d[dword + at.GATE_CS_VA // 4], d[dword + at.GATE_SS_VA // 4] = places[0][0], places[1][0]
        d[dword + at.GATE_STACK_VA // 4] = cpu.tr.base + 4 & 0xFFFFFFFF
        d[dword + at.GATE_SELECTORS // 4] = code.selector | stack.selector << 16
        d[dword + at.GATE_CLEARS_IF // 4] = entry.type == INTERRUPT_GATE32
        q[qword + at.GATE_RAW // 8] = raw_gate
        q[qword + at.GATE_CS_RAW // 8], q[qword + at.GATE_SS_RAW // 8] = code.raw, stack.raw
        self._landings[landed] = (code, stack, 0)

    def forget_selectors(self) -> None:
        """The GDT is another."""
        for selector in self._known:
            entry = selector * at.LOADABLE_STRIDE
            self.record.loadable_q[(entry + at.SELECTOR_PLAIN) // 8] = 0
        self._known.clear()

    def segment_changed(self, index: int) -> None:
        """Python replaced a segment register."""
        slot = OUTER_SLOTS.get(index)
        if slot is not None:
            self.record.b[at.OUTER + slot] = _is_outer(self.cpu.seg[index])

    # ---- what Python takes over

    def adopt(self) -> int | None:
        """Segment registers and CPL as assists left them; the CPL if it may have changed."""
        record, seg = self.record, self.cpu.seg
        changed = record.q[_CHANGED].to_bytes(8, "little")
        record.q[_CHANGED] = 0
        for index in OUTER_SLOTS:
            if changed[index]:
                selector = record.w[at.SELECTORS // 2 + index]
                raw = record.q[at.SEGMENT_RAW // 8 + index]
                seg[index] = parse(selector, raw) if selector & 0xFFFC else null(selector)
        if not changed[CS]:
            return None
        seg[CS], seg[SS], self.cpu.cpl = self._landings[changed[CS]]
        return self.cpu.cpl


def _alike(a: Segment, b: Segment) -> bool:
    """Of two flat segments: is one as good as the other?"""
    return a.selector == b.selector and a.rights == b.rights


def _is_outer(segment: Segment) -> bool:
    """Would a return to CPL 3 clear this data segment register? [vol. 2, IRET]"""
    return segment.usable and segment.dpl < 3 and not segment.conforming
