"""The guest CPU's architectural state, and what its system instructions need from the rest of the CPU node.

Source: Intel SDM vol. 3A (sections in brackets).

How CPU-node code calls the functions of segments, gates, far, tasks, control and stack:
- Before an instruction's function runs, `cpu.eip` is the address of the *next* instruction, truncated.
- A GuestFault raised by it means that no guest-visible state has changed (registers, segments, memory but
  for accessed bits of descriptors and page tables): put `cpu.eip` back to the instruction and call
  `gates.deliver_fault`.
- Functions that transfer control leave `cpu.eip` at the target.
- After it, `cpu.pending_debug` (DR6 bits) not 0 asks for a #DB trap, `cpu.inhibit_interrupts` (set by STI and
  by loads of SS) asks for one more instruction before an interrupt.
Left out: SMM, VMX, long mode, PAE, VME/PVI (VIF and VIP never change), machine check.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cpu_node import descriptor
from cpu_node.descriptor import CS, SEGMENT_NAMES, SS, Segment
from cpu_node.flags import FIXED, VM

if TYPE_CHECKING:
    from cpu_node.cpuid import CpuModel
    from cpu_node.lapic import LocalApic

EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI = range(8)
REGISTER_NAMES = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")

CR0_PE, CR0_MP, CR0_EM, CR0_TS, CR0_ET, CR0_NE = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
CR0_WP, CR0_AM = 0x0001_0000, 0x0004_0000
CR0_NW, CR0_CD, CR0_PG = 0x2000_0000, 0x4000_0000, 0x8000_0000
CR4_TSD, CR4_DE, CR4_PSE, CR4_PGE, CR4_PCE = 0x004, 0x008, 0x010, 0x080, 0x100
CR4_OSFXSR, CR4_OSXMMEXCPT = 0x200, 0x400

DR6_FIXED, DR7_FIXED = 0xFFFF_0FF0, 0x0000_0400
DR6_BD, DR6_BS, DR6_BT = 0x2000, 0x4000, 0x8000

PAT_RESET = 0x0007_0406_0007_0406  # [12.12.4]


class RegisterFile(Protocol):
    """Where the general registers and EFLAGS live: the CPU state record, or plain Python."""

    @property
    def regs(self) -> MutableSequence[int]:
        """EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI, each 0..2^32-1."""

    cr2: int

    def get_eflags(self) -> int:
        """All of EFLAGS, bit 1 set."""

    def set_eflags(self, value: int) -> None:
        """Take all of EFLAGS; the caller has already fixed the reserved bits."""


class LinearMemory(Protocol):
    """Guest memory by linear address, through the page walk when paging is on.

    Each access raises GuestFault(PF, error, cr2) as the walk says, before anything is written. An access may
    run past 4 GiB and wraps. `user` is the privilege of the access: system structures are read with
    user=False at any CPL. The block forms have defaults for classes that derive from this one; the fast
    paths call them.
    """

    def read8(self, va: int, user: bool = False) -> int: ...
    def read16(self, va: int, user: bool = False) -> int: ...
    def read32(self, va: int, user: bool = False) -> int: ...
    def write8(self, va: int, value: int, user: bool = False) -> None: ...
    def write16(self, va: int, value: int, user: bool = False) -> None: ...
    def write32(self, va: int, value: int, user: bool = False) -> None: ...

    def probe_write(self, va: int, length: int, user: bool = False) -> None:
        """Raise what a write of these bytes would raise."""

    def read64(self, va: int, user: bool = False) -> int:
        """Eight bytes, little endian: a descriptor."""
        return self.read32(va, user) | self.read32(va + 4 & 0xFFFFFFFF, user) << 32

    def read32s(self, va: int, count: int, user: bool = False) -> Sequence[int]:
        """`count` dwords from ascending addresses: a stack frame."""
        return [self.read32(va + 4 * i & 0xFFFFFFFF, user) for i in range(count)]

    def write32s(self, va: int, values: Sequence[int], user: bool = False) -> None:
        """Dwords to ascending addresses, all of them or, with a fault, none."""
        self.probe_write(va, 4 * len(values), user)
        for value in values:
            self.write32(va, value, user)
            va = va + 4 & 0xFFFFFFFF


class Hooks(Protocol):
    """What a change of system state does to the translator, the windows and the devices of this CPU."""

    @property
    def apic(self) -> LocalApic | None:
        """The local APIC, None when the machine file has none."""

    def flush_tlb(self, global_too: bool) -> None:
        """Forget translations of linear addresses; global pages only if `global_too`."""

    def invlpg(self, va: int) -> None:
        """Forget the translation of the page at `va`, global or not."""

    def mode_changed(self) -> None:
        """Segment.mode of any register, CR0, CR4, EFLAGS.VM, Cpu.tsc_adjust or a system table changed."""

    def privilege_changed(self) -> None:
        """CPL changed, and nothing else that mode_changed tells."""

    def segments_changed(self, index: int) -> None:
        """seg[index] is another Segment now; called before mode_changed, possibly several times per event."""

    def segment_loaded(self, index: int, selector: int) -> None:
        """An instruction loaded DS, ES, FS or GS with a selector without a fault."""

    def interrupted(self, vector: int, cpl: int) -> None:
        """An INT n was delivered; it was executed at `cpl`."""

    def rdtsc(self) -> int:
        """The time-stamp counter, the machine's offset in it, before Cpu.tsc_adjust is added."""

    def unknown_msr(self, index: int, is_write: bool, value: int) -> None:
        """RDMSR or WRMSR of an MSR this CPU doesn't have; #GP follows."""


class Cpu:
    """One CPU. System state is plain attributes; only `registers` may live elsewhere."""

    def __init__(
        self, registers: RegisterFile, memory: LinearMemory, hooks: Hooks, model: CpuModel
    ) -> None:
        self.registers = registers
        self.regs = registers.regs
        self.memory = memory
        self.hooks = hooks
        self.model = model
        self.tsc_offset = 0  # of the machine: added to the host's counter, before tsc_adjust
        self.tsc_mode = 0  # the bit of the code mode that follows from it
        self.reset()

    def reset(self) -> None:
        """Power-up and RESET [9.1.1, table 9-1]; tells no hook."""
        self.regs[:] = [0] * 8
        self.regs[EDX] = self.model.signature
        self.registers.set_eflags(FIXED)
        self.eip = 0xFFF0
        data = descriptor.build(0, 0, 0xFFFF, 0x93)
        self.seg: list[Segment] = [data] * 6
        self.seg[CS] = descriptor.build(0xF000, 0xFFFF0000, 0xFFFF, 0x93)
        self.cpl = 0
        self.ldtr = descriptor.build(0, 0, 0xFFFF, 0x82)
        self.tr = descriptor.build(0, 0, 0xFFFF, 0x8B)
        self.gdt_base, self.gdt_limit = 0, 0xFFFF
        self.idt_base, self.idt_limit = 0, 0xFFFF
        self.cr0 = CR0_CD | CR0_NW | CR0_ET
        self.cr2 = 0
        self.cr3 = 0
        self.cr4 = 0
        self.dr = [0, 0, 0, 0, 0, 0, DR6_FIXED, DR7_FIXED]
        self.sysenter_cs = 0
        self.sysenter_esp = 0
        self.sysenter_eip = 0
        self.pat = PAT_RESET
        self.misc_enable = self.model.misc_enable_reset
        self.tsc_adjust = 0  # IA32_TSC_ADJUST: what WRMSR added to the time-stamp counter [17.17.3]
        self.halted = False
        self.inhibit_interrupts = False
        self.nmi_blocked = False  # from an NMI's delivery to the next IRET [6.7.1]
        self.pending_debug = 0  # DR6 bits of a #DB trap due before the next instruction

    @property
    def eflags(self) -> int:
        return self.registers.get_eflags()

    @eflags.setter
    def eflags(self, value: int) -> None:
        self.registers.set_eflags(value)

    @property
    def cr2(self) -> int:
        return self.registers.cr2

    @cr2.setter
    def cr2(self, value: int) -> None:
        self.registers.cr2 = value

    @property
    def protected(self) -> bool:
        """Protected mode, not virtual-8086: selectors name descriptors."""
        return bool(self.cr0 & CR0_PE) and not self.registers.get_eflags() & VM

    @property
    def real_mode(self) -> bool:
        return not self.cr0 & CR0_PE

    def set_segment(self, index: int, segment: Segment) -> None:
        """Replace a segment register and tell the hooks."""
        old = self.seg[index]
        if old is segment:
            return
        self.seg[index] = segment
        self.hooks.segments_changed(index)
        if old.mode != segment.mode:
            self.hooks.mode_changed()

    def set_code_and_stack(self, code: Segment, stack: Segment, cpl: int) -> None:
        """Replace CS, SS and CPL at once and tell the hooks."""
        seg, hooks = self.seg, self.hooks
        old_code, old_stack, old_cpl = seg[CS], seg[SS], self.cpl
        self.cpl = cpl
        seg[CS] = code
        seg[SS] = stack
        if old_code is not code:
            hooks.segments_changed(CS)
        if old_stack is not stack:
            hooks.segments_changed(SS)
        if old_code.mode != code.mode or old_stack.mode != stack.mode:
            hooks.mode_changed()
        elif old_cpl != cpl:
            hooks.privilege_changed()

    def dump(self) -> dict[str, Any]:
        """The state as plain data, for reports."""
        state: dict[str, Any] = dict(zip(REGISTER_NAMES, self.regs, strict=True))
        state.update(eip=self.eip, eflags=self.eflags, cpl=self.cpl)
        named = [*zip(SEGMENT_NAMES, self.seg, strict=True), ("ldtr", self.ldtr), ("tr", self.tr)]
        for name, segment in named:
            state[name] = [segment.selector, segment.base, segment.limit, segment.rights, segment.usable]
        state.update(gdt=[self.gdt_base, self.gdt_limit], idt=[self.idt_base, self.idt_limit])
        state.update(cr0=self.cr0, cr2=self.cr2, cr3=self.cr3, cr4=self.cr4, dr=list(self.dr))
        for name in STATE_WORDS:
            state[name] = getattr(self, name)
        return state


STATE_WORDS = (
    "sysenter_cs", "sysenter_esp", "sysenter_eip", "pat", "misc_enable", "tsc_adjust",
    "halted", "inhibit_interrupts", "nmi_blocked", "pending_debug",
)  # fmt: skip
