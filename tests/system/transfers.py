"""Segment registers and every way from one code segment to another.

Source: Intel SDM vol. 3A chapters 3, 5, 6 and 7.
"""

# ruff: noqa: E501 (tables of text)
from __future__ import annotations

from cpu_node.descriptor import pack, pack_gate
from tests.system import common
from tests.system import places as p
from tests.system.bits import SCRATCH, far32, far_pointer, long
from tests.system.builder import (
    CODES,
    DATAS,
    FLAT,
    IRET,
    IRET16,
    RETF,
    RETF16,
    STACKS,
    Builder,
)

LOADABLE = ("es", "ss", "ds", "fs", "gs")
FAR_LOAD = {"es": "0xc4", "ds": "0xc5", "ss": "0x0f, 0xb2", "fs": "0x0f, 0xb4", "gs": "0x0f, 0xb5"}
POP = {"es": "0x07", "ss": "0x17", "ds": "0x1f", "fs": "0x0f, 0xa1", "gs": "0x0f, 0xa9"}


def load_segment(b: Builder, cpl: int) -> str:
    """One load of a segment register, or one of the instructions that look at a descriptor."""
    r = b.r
    selector = b.selector(cpl, *r.choice(((0, 0x200), (p.RANDOM, 0x200), (p.RANDOM, 0x200))))
    how = r.randrange(9)
    name = r.choice(LOADABLE)
    if how < 3:
        return f"mov eax, {selector}\nmov {name}, ax"
    if how < 5:
        return f"push {selector}\n.byte {POP[name]}\nnop"
    if how == 5:
        pointer = far_pointer(b, STACKS[cpl] if name == "ss" else 0x1234, selector)
        return f".byte 0x2e, {FAR_LOAD[name]}, {'0x25' if name == 'ss' else '0x1d'}\n{long(pointer)}"
    looks = ("lar ebx, eax", "lsl ebx, eax", "verr ax", "verw ax", "lar bx, ax", "lsl bx, ax", "arpl ax, cx")
    return f"mov ecx, {r.randrange(4)}\nmov eax, {selector}\n{r.choice(looks)}\npushfd\nand ebx, 0xfff0ffff"


def segments(b: Builder) -> None:
    b.random_descriptors()
    for _ in range(p.ACTIONS):
        cpl = b.cpl()
        b.action(b.enter(cpl, b.flags(cpl)), *(load_segment(b, cpl) for _ in range(b.r.choice((1, 1, 2, 3)))))


def data_segments(b: Builder) -> None:
    """Bases: what is read and written through DS, ES, FS, GS and SS once they are loaded."""
    for number in range(p.RANDOM_COUNT):
        base = b.r.choice((0, p.DATA, 0x1000, 0xFFFF0000, b.r.randrange(0x8000)))
        b.describe(p.RANDOM + 8 * number, pack(base, FLAT, 0xC0F2))
    for _ in range(p.ACTIONS):
        cpl = b.cpl()
        name = b.r.choice(("es", "ds", "fs", "gs"))
        selector = p.RANDOM + 8 * b.r.randrange(p.RANDOM_COUNT)
        base_text = f"mov eax, {selector | cpl}\nmov {name}, ax"
        # the descriptor's base, for the address that hits DATA
        raw = int.from_bytes(b.memory[p.GDT + selector : p.GDT + selector + 8], "little")
        base = raw >> 16 & 0xFFFFFF | raw >> 32 & 0xFF000000
        offset = p.DATA + b.r.randrange(0x600) - base & 0xFFFFFFFF
        prefix = {"es": 0x26, "ds": 0x3E, "fs": 0x64, "gs": 0x65}[name]
        body = [
            f".byte {prefix}\nmov eax, [ebx]",
            f".byte {prefix}\nadd dword ptr [ebx+4], 0x10203",
            f".byte {prefix}\nxchg ecx, [ebx+8]",
            f".byte {prefix}\nlock\n.byte 0x0f, 0xc1, 0x4b, 0x0c",
            f"mov esi, ebx\nmov edi, {p.DATA + 0x1000}\nmov ecx, 5\n.byte {prefix}, 0xf3, 0xa5",
            f".byte {prefix}\npush dword ptr [ebx]\npop dword ptr [esp-40]",
        ]
        b.r.shuffle(body)
        b.action(b.enter(cpl), base_text, f"mov ebx, {offset}", *body[: b.r.randrange(1, 5)])


def far_transfer(b: Builder, cpl: int) -> str:
    r = b.r
    low, high = r.choice(((0, 0x200), (p.GATES, p.RANDOM), (p.GATES, p.RANDOM), (p.RANDOM, 0x200), (8, 0x60)))
    selector = b.selector(cpl, low, high)
    offset = p.TARGET
    how = r.randrange(8)
    no_jump = b.gate_to_absent(selector)
    if how < 2 and not no_jump:
        return far32("0xea", offset, selector)
    if how < 4:
        return "push 0x1111\npush 0x2222\n" + far32("0x9a", offset, selector)
    if how < 6:
        opcode = r.choice(("0xff, 0x2d", "0xff, 0x1d"))
        if no_jump:
            opcode = "0xff, 0x1d"
        return f".byte 0x2e, {opcode}\n{long(far_pointer(b, offset, selector))}"
    wide = r.choice((0, 0, 1))
    outer = r.randrange(4)
    stack = f"push {b.selector(outer, 0, 0x60)}\npush {STACKS[outer]}\n" if r.randrange(2) else (
        f"push {DATAS[outer]}\npush {STACKS[outer]}\n")  # fmt: skip
    target = r.choice((selector, CODES[outer], CODES[outer], CODES[outer]))
    if wide:
        stack = f".byte 0x66, 0x68\n.short 0x99\n.byte 0x66, 0x68\n.short {DATAS[outer]}\n.byte 0x66, 0x68\n.short {STACKS[outer]}\n"
        frame = f".byte 0x66, 0x68\n.short {target}\n.byte 0x66, 0x68\n.short {offset}\n"
    else:
        frame = f"push {target}\npush {offset}\n"
    if r.randrange(2):
        return stack + frame + (RETF16 if wide else RETF)
    count = r.choice((0, 4, 8))
    spare = "push 0x77\npush 0x78\n" if count == 8 else "push 0x77\n" if count == 4 else ""
    return stack + spare + frame + (".byte 0x66\n" if wide else "") + f".byte 0xca\n.short {count}"


def far_transfers(b: Builder) -> None:
    b.random_descriptors()
    b.random_gates()
    for _ in range(p.ACTIONS):
        cpl = b.cpl()
        b.action(b.enter(cpl, b.flags(cpl)), far_transfer(b, cpl))


def named(selector: int) -> int:
    """0 for the other null selectors."""
    return selector if selector > 3 else 0


def returns(b: Builder) -> None:
    """IRET to any level, with any flags, into any selector; NT and virtual-8086 are subjects of their own."""
    b.random_descriptors()
    for _ in range(p.ACTIONS):
        r = b.r
        cpl = b.cpl()
        outer = r.choice((cpl, 3, 3, r.randrange(4)))
        flags = (r.getrandbits(22) & ~0x2_4100 & ~0x200) | 2
        code = CODES[outer] if b.chance(70) else b.code_selector()
        stack = DATAS[outer] if b.chance(70) else b.selector(outer, p.RANDOM)
        segments_text = "".join(
            f"mov eax, {named(b.selector(cpl, 8, 0x60)) if b.chance(50) else DATAS[cpl]}\nmov {name}, ax\n"
            for name in ("ds", "es", "fs", "gs") if b.chance(30)
        )  # fmt: skip
        if b.chance(20) and outer >= cpl:
            frame = "".join(f".byte 0x66, 0x68\n.short {value & 0xFFFF}\n"
                            for value in (0x99, stack, STACKS[outer], flags, code, p.TARGET))  # fmt: skip
            b.action(b.enter(cpl, b.flags(cpl)), frame, segments_text, IRET16)
        else:
            frame = "".join(f"push {value}\n" for value in (stack, STACKS[outer], flags, code, p.TARGET))
            b.action(b.enter(cpl, b.flags(cpl)), frame, segments_text, IRET)


def gates(b: Builder) -> None:
    """INT n and exceptions through gates of any kind; bad inner stacks; double and triple faults."""
    r = b.r
    b.random_descriptors()
    kinds = (6, 7, 0xE, 0xE, 0xF, 0xE, 5, 0xF, 0xC, 0)
    for vector in p.RANDOM_VECTORS:
        b.gate(vector, b.random_gate(kinds))
    for vector in (0, 3, 4, 5, 6):
        if b.chance(30):
            b.gate(vector, b.random_gate(kinds))
    if b.chance(40):
        b.gate(8, pack_gate(5, p.TSS_D_SEL, 0))
    bad = [
        lambda: b.put16(p.TSS_MAIN + 8 + 8 * 0, b.selector(0, p.RANDOM)),
        lambda: b.put32(p.TSS_MAIN + 4, r.choice((0, 0x800000))),
        lambda: b.put16(p.TSS_MAIN + 16, b.selector(1, 0, 0x200)),
        lambda: b.put16(p.TSS_MAIN + 24, b.selector(2, 0, 0x200)),
        lambda: b.describe(p.TSS_SEL, pack(p.TSS_MAIN, r.choice((0x67, 0x0B, 0x13, 7)), 0x0089)),
        lambda: b.gate(13, b.random_gate(kinds)),
    ]
    if b.chance(35):
        r.choice(bad)()
    instructions = ("int3", ".byte 0xce", "ud2", "xor edx, edx\nxor ecx, ecx\ndiv ecx",
                    f"mov dword ptr [{SCRATCH}], 5\nmov dword ptr [{SCRATCH + 4}], 9\nmov eax, 10\n"
                    f".byte 0x62, 0x05\n{long(SCRATCH)}")  # fmt: skip
    for _ in range(p.ACTIONS):
        cpl = b.cpl()
        what = f"int {r.choice(p.RANDOM_VECTORS)}" if b.chance(75) else r.choice(instructions)
        b.action(b.enter(cpl, b.flags(cpl)), what)


def tasks(b: Builder) -> None:
    """Task switches of every kind between 32- and 16-bit tasks; what is wrong with a TSS."""
    r = b.r
    b.gates_to_16 = True
    b.random_descriptors()
    b.random_gates((5,))
    for vector in p.RANDOM_VECTORS:
        b.gate(vector, b.random_gate((5,)))
    for tss, top in ((p.TSS_B, p.STACK_B), (p.TSS_D, p.STACK_D), (p.TSS_E, p.STACK_E)):
        level = r.choice((0, 0, 1, 2, 3, 3))
        fields = dict(  # noqa: C408
            cs=CODES[level], ss=DATAS[level], eflags=2 | r.choice((0, 0x8D5, 0x3000)), esp0=top,
            esp=top if level == 0 else STACKS[level], eax=r.getrandbits(32), edi=r.getrandbits(32),
        )  # fmt: skip
        if b.chance(50):
            name = r.choice(("cs", "ss", "ds", "es", "fs", "gs", "ldt", "ldt", "eip", "back"))
            fields[name] = {"eip": p.TARGET + 1, "ldt": p.LDT_SEL, "back": p.TSS_SEL}.get(
                name, b.selector(level)
            )
        if b.conforming(fields["cs"]):
            fields["cs"] &= ~3  # as QEMU has it: RPL = DPL
        if b.chance(20):
            fields["ldt"] = b.selector(0)
        b.task(tss, **fields)
    for number in range(4):  # what comes up in a new task may find no stack there
        b.gate(10 + number, pack_gate(5, p.TSS_F_SEL + 8 * number, 0))
        b.task(p.TSS_F + 0x100 * number, esp0=p.STACK_F, eip=common.stub(10 + number))
    level = r.choice((0, 0, 3))
    b.task16(
        p.TSS_16, ip=p.TARGET_16, cs=CODES[level], ss=DATAS[level], ax=r.getrandbits(16), sp=STACKS[level]
    )
    if b.chance(15):
        b.describe(p.TSS_B_SEL, pack(p.TSS_B, r.choice((0x66, 0x67, 0x10)), 0x0089))
    if b.chance(15):
        b.describe(p.TSS_B_SEL, pack(p.TSS_B, 0xFF, r.choice((0x008B, 0x0009, 0x00E9))))
    targets = (p.TSS_B_SEL, p.TSS_B_SEL, p.TSS_16_SEL, p.TSS_D_SEL, p.TSS_E_SEL | 3, p.TSS_E_SEL)
    for _ in range(p.ACTIONS):
        cpl = r.choice((0, 0, 0, 3, 3, 1))
        selector = r.choice(targets) if b.chance(60) else p.GATES + 8 * r.randrange(p.GATE_COUNT) | cpl
        how = r.randrange(8)
        if how < 2:
            what = far32("0xea", 0, selector)
        elif how < 5:
            what = far32("0x9a", 0, selector)
        elif how < 7:
            what = f"int {r.choice(p.RANDOM_VECTORS)}"
        else:  # IRET with NT: the back link
            back = r.choice((p.TSS_B_SEL, p.TSS_D_SEL, p.TSS_16_SEL, b.selector(0)))
            busy = back + 5 if back < 0x200 and not back & 4 else p.GDT_LIMIT + 1
            mark = f"or byte ptr [{p.GDT + busy}], 2\n" if busy <= p.GDT_LIMIT and b.chance(80) else ""
            what = f"mov word ptr [{p.TSS_MAIN}], {back}\n{mark}pushfd\nor dword ptr [esp], 0x4000\npopfd\n{IRET}"
            cpl = 0
        b.action(b.enter(cpl, b.flags(cpl)), what)
