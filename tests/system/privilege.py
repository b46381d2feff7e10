"""Privileged instructions, debug facilities, interrupts and the FPU's traps.

Source: Intel SDM vol. 3A 2.8, 5.8.7, 6.8, 17.2.
"""

# ruff: noqa: E501 (tables of text)
from __future__ import annotations

from cpu_node.descriptor import pack
from tests.system import places as p
from tests.system.bits import SCRATCH, unlabelled
from tests.system.builder import (
    DATAS,
    Builder,
)


def privileged_text(b: Builder, cpl: int) -> str:
    r = b.r
    port = r.choice((0x80, 0x80, 0xED, 0x118, 0x800))
    forms: tuple[str, ...] = (
        "cli\npushfd", "clts\nsmsw eax", "smsw ecx", "sldt ecx\nstr edx", "mov eax, cr0", "mov eax, cr3",
        "mov eax, cr4", "mov eax, cr2\nxor eax, eax", "mov eax, dr6\nmov ecx, dr7", f"invlpg [{p.WINDOW}]",
        f"mov eax, cr0\nxor eax, {r.choice((8, 2, 4, 0x10000, 0x40000, 0xA)):#x}\nmov cr0, eax\nmov ecx, cr0",
        f"mov eax, {r.choice((0x610, 0x14, 0x4, 0x8, 0x90, 0x600)):#x}\nmov cr4, eax\nmov ecx, cr4",
        f"mov eax, {r.choice((0, 2, 4, 8, 0xE, 0xF, 0xFFF0)) | 1}\nlmsw ax\nsmsw ecx",
        f"mov eax, {r.getrandbits(32) & 0x0FFFFFFF}\nmov dr{r.randrange(4)}, eax",
        f"mov eax, {r.getrandbits(16) & 0xE00F}\nmov dr6, eax\nmov ecx, dr6",
        f"mov eax, {b.selector(cpl)}\nlldt ax\nsldt ecx", f"mov eax, {b.selector(cpl) | 8}\nltr ax\nstr ecx",
        f"mov eax, {r.choice((p.TSS_B_SEL, p.TSS_16_SEL, p.TSS_D_SEL | cpl))}\nltr ax\nstr ecx",
        f"mov word ptr [{SCRATCH}], {r.choice((0x1FF, 0x7F))}\nmov dword ptr [{SCRATCH + 2}], {p.GDT}\n"
        f"lgdt [{SCRATCH}]\nsgdt [{SCRATCH + 8}]",
        f"mov word ptr [{SCRATCH}], 0x7ff\nmov dword ptr [{SCRATCH + 2}], {p.IDT}\nlidt [{SCRATCH}]\n"
        f"sidt [{SCRATCH + 8}]",
        f"mov ecx, {r.choice((0x174, 0x175, 0x176)):#x}\nmov eax, {r.randrange(0x10000) & ~3}\nxor edx, edx\n"
        "wrmsr\nrdmsr",
        "wbinvd",
        f"mov edx, {port}\nout dx, al", f"mov edx, {port}\nout dx, eax", f"mov eax, 0\nout {port & 0xFF}, al",
        f"mov edx, {port}\nmov esi, {p.DATA}\noutsb", "pushfd\npopfd\npushfd",
        f"push {r.getrandbits(22) & ~0x20300 & ~0x44000 | 2}\npopfd\npushfd",
        f"push {r.getrandbits(16) & ~0x4300 | 2}\n.byte 0x66, 0x9d\nadd esp, 2\npushfd",
    )  # fmt: skip
    return r.choice(forms)


def privileged(b: Builder) -> None:
    r = b.r
    b.random_descriptors()
    limit = r.choice((0xFF, 0x88, 0x67))
    b.describe(p.TSS_SEL, pack(p.TSS_MAIN, limit, 0x0089))
    for offset in range(0x68, 0x100):
        b.memory[p.TSS_MAIN + offset] = r.choice((0, 0, 0xFF, r.getrandbits(8)))
    b.put16(p.TSS_MAIN + 0x66, r.choice((0x68, 0x68, 0x68, 0x70, 0xFFFF)))
    for _ in range(p.ACTIONS):
        cpl = b.cpl()
        b.action(b.enter(cpl, b.flags(cpl)), *(privileged_text(b, cpl) for _ in range(r.randrange(1, 3))))


def sysenter(b: Builder) -> None:
    r = b.r
    for _ in range(p.ACTIONS):
        cpl = b.cpl()
        base = r.choice((p.CODE0, p.CODE0, 0, 0x0B))
        msrs = "".join(
            f"mov ecx, {index:#x}\nmov eax, {value}\nxor edx, edx\nwrmsr\n"
            for index, value in ((0x174, base), (0x175, p.STACK0), (0x176, p.TARGET))
        )
        what = r.choice(("sysenter", "sysenter", f"mov edx, {p.TARGET}\nmov ecx, {p.STACK3}\nsysexit"))
        b.action(msrs, b.enter(cpl, b.flags(cpl)), what)


def traced_text(b: Builder, cpl: int) -> str:
    r = b.r
    va = p.DATA + r.choice((0, 4, 8, 0x20))  # aligned: QEMU looks at whole dwords
    forms = (
        "nop", "add eax, 5", f"mov [{va}], eax", f"mov eax, [{va}]", f"mov byte ptr [{va + 1}], 4",
        f"mov ax, {DATAS[cpl]}\nmov ss, ax\nnop", f"push {DATAS[cpl]}\n.byte 0x17\nnop", "int3", "pushfd\npop edx",
        f"mov esi, {p.DATA}\nmov edi, {p.DATA + 0x20}\nmov ecx, 3\n.byte 0xf3, 0xa4", ".byte 0xce",
        f"xchg [{va}], eax", f"add word ptr [{va + 2}], 3", "call 1f\n1: pop eax".replace("1f", "forward").replace(
            "1:", "forward:"), "xor ecx, ecx\n.byte 0xf3, 0xa4", f"push dword ptr [{va}]\npop edx",
        "jmp ahead\nnop\nahead: nop",
    )  # fmt: skip
    return r.choice(forms)


def debugging(b: Builder) -> None:
    """Single steps, instruction and data breakpoints, general detect; DR6."""
    r = b.r
    for _ in range(p.ACTIONS):
        cpl = r.choice((0, 0, 3, 3, 1))
        flags = b.flags(cpl) & ~0x800
        lines = unlabelled([traced_text(b, cpl) for _ in range(r.randrange(2, 7))])
        trap = r.randrange(10)
        setup = ""
        if trap < 5:  # single steps
            flags |= 0x100
        if trap >= 4:
            dr7, kinds = 0, ((0, 0), (1, 0), (1, 1), (1, 3), (3, 0), (3, 1), (3, 3))
            if trap == 4:
                kinds = kinds[:1]
            for number in range(2):
                kind, size = r.choice(kinds)
                where = p.DATA + r.choice((0, 2, 4, 8, 0x20)) & ~size
                if kind == 0:
                    setup += f".byte 0xb8\n.long spot{number}\nmov dr{number}, eax\n"
                    at = r.randrange(len(lines))
                    lines[at] = f"spot{number}:\n{lines[at]}"
                else:
                    setup += f"mov eax, {where}\nmov dr{number}, eax\n"
                dr7 |= r.choice((1, 2, 3, 0)) << 2 * number | (kind | size << 2) << (16 + 4 * number)
            setup += f"mov eax, {dr7 | 0x400:#x}\nmov dr7, eax\n"
        b.action(setup if cpl else "", b.enter(cpl, flags), setup if not cpl else "", *lines)


def self_ipi(vector: int) -> str:
    return f"mov dword ptr [{p.APIC + 0x310:#x}], 0\nmov dword ptr [{p.APIC + 0x300:#x}], {0x44000 | vector:#x}\n"


def interrupts(b: Builder) -> None:
    """An interrupt the local APIC holds, IF coming to be set by STI, POPF, IRET; shadows; priorities."""
    r = b.r
    enable = f"mov dword ptr [{p.APIC + 0xF0:#x}], 0x1ff\nmov dword ptr [{p.APIC + 0x80:#x}], 0\n"
    for _ in range(p.ACTIONS):
        cpl = r.choice((0, 0, 0, 3))
        vectors = r.sample(list(p.APIC_VECTORS), r.choice((1, 1, 2, 3)))
        before = enable + "".join(self_ipi(v) for v in vectors)
        opening = r.choice((
            "sti\nnop\ninc ebx\ninc ebx", "sti\ncli\ninc ebx\nsti\ninc ebx\ninc ebx", "sti\nsti\ninc ebx\ninc ebx",
            "pushfd\nor dword ptr [esp], 0x200\npopfd\ninc ebx\ninc ebx",
"sti\npushfd\npop eax\ninc ebx",
            "sti\nint3\ninc ebx", "sti\nud2",
            "sti\nhlt\ninc ebx" if cpl == 0 else "sti\nnop", "sti\nmov ecx, 3\nagain: inc ebx\nloop again\nnop",
        ))  # fmt: skip
        flags = 0x3002 | (0x200 if b.chance(20) else 0)
        if b.chance(30) and cpl == 0:  # TPR
            before += f"mov dword ptr [{p.APIC + 0x80:#x}], {r.choice((0x60, 0x70, 0x80)):#x}\n"
            opening = opening.replace("hlt", "nop")
        if flags & 0x200:
            opening = opening.replace("hlt", "nop")
        b.action(before, b.enter(cpl, flags), opening, "inc ebx\ncli")


def fpu(b: Builder) -> None:
    r = b.r
    for _ in range(p.ACTIONS):
        cpl = b.cpl()
        cr0 = b.cr0 | r.choice((0, 8, 2, 0xA, 4, 6))
        cr4 = r.choice((0x610, 0x210, 0x010)) if not cr0 & 8 else 0x610
        setup = f"mov eax, {cr4:#x}\nmov cr4, eax\nmov eax, {cr0:#x}\nmov cr0, eax\n"
        what = r.choice((
            "fnop", "fwait", "fninit", "fnstcw [0x18700]", "fld1\nfstp st(0)", "movaps xmm0, xmm1",
            "pxor mm0, mm0\n.byte 0x0f, 0x77", "fnstsw ax", f"fxsave [{p.DATA + 0x1000}]", "ldmxcsr [0x18ff0]",
            "sfence", f"prefetchnta [{p.DATA}]", "paddd xmm0, xmm1", "fldz\nfld1\nfdivrp\nfwait", "ud2",
        ))  # fmt: skip
        b.put32(0x18FF0, 0x1F80)
        b.memory[p.DATA + 0x1000 : p.DATA + 0x1200] = bytes(512)
        if "fxsave" in what:
            what = what.replace("fxsave", "fnstcw")
        b.action(setup, b.enter(cpl), what)
