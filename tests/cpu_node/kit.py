"""A small protected-mode machine for tests of system instructions: tables, stacks, helpers."""

from __future__ import annotations

from cpu_node.cpu import CR0_ET, CR0_PE, ESP, Cpu
from cpu_node.cpuid import CpuModel
from cpu_node.descriptor import (
    CALL_GATE32,
    CS,
    DS,
    ES,
    FS,
    GS,
    INTERRUPT_GATE32,
    LDT,
    SS,
    TASK_GATE,
    TSS16_AVAILABLE,
    TSS32_AVAILABLE,
    build,
    null,
    pack,
    pack_gate,
    parse,
)
from cpu_node.errors import GuestFault
from cpu_node.flags import FIXED, VM
from cpu_node.lapic import LocalApic
from cpu_node.plain import FlatMemory, PlainRegisters, RecordingHooks

GDT, IDT, LDT_AT, TSS, TSS_B, TSS_16 = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000
TOP0, TOP1, TOP3, TOP_B = 0x9000, 0xA000, 0xB000, 0xC000
HANDLER = 0x0040_1000

CODE0, DATA0, CODE3, DATA3, TSS_SEL, LDT_SEL = 0x08, 0x10, 0x1B, 0x23, 0x28, 0x30
CODE1, DATA1, CONFORMING, CODE16, DATA16, EXPAND_DOWN = 0x39, 0x41, 0x48, 0x50, 0x58, 0x60
ABSENT_DATA, EXEC_ONLY3, READ_ONLY3, TSS_B_SEL, TSS_16_SEL = 0x68, 0x73, 0x7B, 0x80, 0x88
CALL_SEL, TASK_SEL, ABSENT_CODE, SMALL_CODE, DATA16_3, CONFORMING3 = 0x93, 0x9B, 0xA0, 0xA8, 0xB3, 0xB8
ABSENT_STACK3, FREE = 0xC3, 0xC8
GDT_LIMIT = 0x1FF
BEYOND = 0x200  # the first selector outside the GDT

FLAT = 0xFFFFF
DESCRIPTORS = {
    CODE0: pack(0, FLAT, 0xC09A), DATA0: pack(0, FLAT, 0xC092),
    CODE3: pack(0, FLAT, 0xC0FA), DATA3: pack(0, FLAT, 0xC0F2),
    TSS_SEL: pack(TSS, 0x2067, 0x0080 | TSS32_AVAILABLE), LDT_SEL: pack(LDT_AT, 0xFF, 0x0080 | LDT),
    CODE1: pack(0, FLAT, 0xC0BA), DATA1: pack(0, FLAT, 0xC0B2),
    CONFORMING: pack(0, FLAT, 0xC09E), CODE16: pack(0x10000, 0xFFFF, 0x009A),
    DATA16: pack(0x8000, 0xFFFF, 0x0092), EXPAND_DOWN: pack(0, 0x3, 0xC096),
    ABSENT_DATA: pack(0, FLAT, 0xC012), EXEC_ONLY3: pack(0, FLAT, 0xC0F8),
    READ_ONLY3: pack(0, FLAT, 0xC0F0), TSS_B_SEL: pack(TSS_B, 0x67, 0x00E0 | TSS32_AVAILABLE),
    TSS_16_SEL: pack(TSS_16, 0x2B, 0x00E0 | TSS16_AVAILABLE),
    CALL_SEL: pack_gate(CALL_GATE32, CODE0, HANDLER, dpl=3, parameters=2),
    TASK_SEL: pack_gate(TASK_GATE, TSS_B_SEL, 0, dpl=3),
    ABSENT_CODE: pack(0, FLAT, 0xC01A), SMALL_CODE: pack(0, 0xFFF, 0x409A),
    DATA16_3: pack(0, 0xFFFF, 0x00F2), CONFORMING3: pack(0, FLAT, 0xC0FE),
    ABSENT_STACK3: pack(0, FLAT, 0xC072),
}  # fmt: skip

TSC_HZ = 2_400_000_000
HOST_FLAGS = "fpu tsc cx8 cmov clflush mmx fxsr sse sse2 pni ssse3 sse4_1 sse4_2 popcnt pclmulqdq aes erms"
HOST = frozenset(HOST_FLAGS.split())


class Machine:
    """A Cpu in ring 0 of flat 32-bit protected mode, with every table in place."""

    def __init__(self, with_apic: bool = False) -> None:
        self.now_ns = 0
        self.memory = FlatMemory(1 << 20)
        model = CpuModel(TSC_HZ, with_apic, HOST)
        apic = LocalApic(0, model.crystal_hz, TSC_HZ, lambda: self.now_ns) if with_apic else None
        self.hooks = RecordingHooks(apic)
        self.cpu = Cpu(PlainRegisters(), self.memory, self.hooks, model)
        for selector, raw in DESCRIPTORS.items():
            self.describe(selector, raw)
        cpu, memory = self.cpu, self.memory
        memory.write32s(TSS + 4, [TOP0, DATA0, TOP1, DATA1])
        cpu.cr0 = CR0_PE | CR0_ET
        cpu.gdt_base, cpu.gdt_limit = GDT, GDT_LIMIT
        cpu.idt_base, cpu.idt_limit = IDT, 0x7FF
        cpu.tr = parse(TSS_SEL, DESCRIPTORS[TSS_SEL] | 1 << 41)
        self.describe(TSS_SEL, cpu.tr.raw)
        cpu.ldtr = parse(LDT_SEL, DESCRIPTORS[LDT_SEL])
        self.ring(0)
        self.hooks.calls.clear()

    def describe(self, selector: int, raw: int) -> None:
        table = LDT_AT if selector & 4 else GDT
        self.memory.write32s(table + (selector & 0xFFF8), [raw & 0xFFFFFFFF, raw >> 32])

    def descriptor(self, selector: int) -> int:
        return self.memory.read64((LDT_AT if selector & 4 else GDT) + (selector & 0xFFF8))

    def gate(self, vector: int, raw: int) -> None:
        self.memory.write32s(IDT + 8 * vector, [raw & 0xFFFFFFFF, raw >> 32])

    def interrupt_gate(
        self, vector: int, dpl: int = 0, selector: int = CODE0, kind: int = INTERRUPT_GATE32
    ) -> None:
        self.gate(vector, pack_gate(kind, selector, HANDLER + vector, dpl=dpl))

    def ring(self, cpl: int, eip: int = 0x0010_0000) -> None:
        """Run at `cpl` with flat segments and that ring's stack."""
        cpu = self.cpu
        code, data, top = {0: (CODE0, DATA0, TOP0), 1: (CODE1, DATA1, TOP1), 3: (CODE3, DATA3, TOP3)}[cpl]
        cpu.cpl = cpl
        cpu.seg[CS] = parse(code, self.descriptor(code) | 1 << 40)
        self.describe(code, cpu.seg[CS].raw)
        for index in (ES, SS, DS):
            cpu.seg[index] = parse(data, self.descriptor(data) | 1 << 40)
        self.describe(data, cpu.seg[SS].raw)
        cpu.seg[FS] = cpu.seg[GS] = null(0)
        cpu.regs[ESP] = top
        cpu.eip = eip

    def virtual8086(self, iopl: int = 3) -> None:
        """Run in virtual-8086 mode at 0100:0200, stack 0300:0400."""
        cpu = self.cpu
        for index, selector in enumerate((0x11, 0x100, 0x300, 0x22, 0x33, 0x44)):
            cpu.seg[index] = build(selector, selector << 4, 0xFFFF, 0xF3)
        cpu.cpl, cpu.eip, cpu.regs[ESP] = 3, 0x200, 0x400
        cpu.eflags = FIXED | VM | iopl << 12

    def real(self) -> None:
        """Run in real mode at 0100:0200, stack 0300:0400, vectors at 0."""
        cpu = self.cpu
        cpu.cr0 = CR0_ET
        cpu.idt_base, cpu.idt_limit = 0, 0x3FF
        for index, selector in enumerate((0x11, 0x100, 0x300, 0x22, 0x33, 0x44)):
            cpu.seg[index] = build(selector, selector << 4, 0xFFFF, 0x93)
        cpu.cpl, cpu.eip, cpu.regs[ESP] = 0, 0x200, 0x400

    def stack32(self, count: int) -> list[int]:
        """The top dwords of the current stack."""
        base = self.cpu.seg[SS].base + (self.cpu.regs[ESP] & self.cpu.seg[SS].span)
        return list(self.memory.read32s(base, count))

    def stack16(self, count: int) -> list[int]:
        base = self.cpu.seg[SS].base + (self.cpu.regs[ESP] & self.cpu.seg[SS].span)
        return [self.memory.read16(base + 2 * i) for i in range(count)]

    def push32(self, *values: int) -> None:
        """Put values on the stack so that the first is at the top."""
        cpu = self.cpu
        cpu.regs[ESP] -= 4 * len(values)
        self.memory.write32s(cpu.seg[SS].base + cpu.regs[ESP], values)

    def snapshot(self) -> tuple[object, bytes]:
        """All that a GuestFault must leave alone; accessed bits of descriptors excepted."""
        data = bytearray(self.memory.data)
        for table in (GDT, LDT_AT):
            for at in range(table + 5, table + GDT_LIMIT, 8):
                if data[at] & 0x10:
                    data[at] &= 0xFE
        return self.cpu.dump(), bytes(data)

    def faults(self, action, *args) -> tuple[int, int | None]:
        """(vector, error) of the fault `action` raises; nothing may have changed."""
        before = self.snapshot()
        try:
            action(*args)
        except GuestFault as fault:
            assert self.snapshot() == before, "a fault changed the state"
            return fault.vector, fault.error
        raise AssertionError("no fault")
