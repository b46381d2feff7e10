"""16-bit code: virtual-8086 mode and protected mode.

Source: Intel SDM vol. 3B chapters 20 and 21.
"""

# ruff: noqa: E501 (tables of text)
from __future__ import annotations

from cpu_node.descriptor import pack_gate
from tests.system import common
from tests.system import places as p
from tests.system.bits import far32, unlabelled
from tests.system.builder import (
    IRET,
    Builder,
)


def text16(b: Builder, v86: bool) -> str:
    r = b.r
    port = r.choice((0x80, 0xED))
    forms: tuple[str, ...] = (
        "nop", "inc ax", "pushf\npop dx", "push ax\npop cx", "cli", f"int {r.choice((0x50, 0x51, 0x52, 0x60))}",
        "pushf\npush cs\ncall near_\nnear_: pop ax\nadd ax, 6\npush ax\n.byte 0xcf".replace("near_", "near0"),
        f"push {r.getrandbits(16) & ~0x4300 | 2}\npopf\npushf\npop dx", f"mov dx, {port}\nout dx, al",
        "mov bx, 0x8100\nmov ax, [bx]\nmov word ptr [bx+2], 0x1234", "int3", ".byte 0xce",
        "mov bx, 0xffff\nmov al, [bx]", "smsw ax", "lar ax, bx", "hlt" if v86 else "nop", "mov eax, cr0", "lmsw ax",
        ".byte 0x66, 0x9c, 0x66, 0x58", "mov ax, 0x1800\nmov es, ax\n.byte 0x26\nmov ax, [4]" if v86 else "nop",
        f"mov ax, {0x1234 if v86 else b.selector(3)}\nmov fs, ax", "push ds\n.byte 0x07", "sldt ax",
        "mov cx, 4\nmov si, 0x8000\nmov di, 0x8010\ncld\n.byte 0xf3, 0xa5", "loop further\nfurther: nop", "arpl ax, bx",
        "xor ax, ax\ndiv al", "jmp onward\nnop\nonward: inc cx", "enter 8, 1\nleave", "pusha\npopa",
    )  # fmt: skip
    return r.choice(forms)


def virtual8086(b: Builder) -> None:
    r = b.r
    for vector in (0x50, 0x51):
        b.gate(vector, pack_gate(r.choice((0xE, 0xF, 6, 7)), p.CODE0, p.TARGET, dpl=r.choice((3, 3, 0))))
    b.gate(0x52, pack_gate(0xE, r.choice((p.CODE3, p.CONFORMING)), p.TARGET, dpl=3))
    b.gate(0x60, pack_gate(0xE, p.CODE0, common.stub(0x60), dpl=3))
    b.policy(0x60, p.TO_IRET)
    for offset in range(0x68, 0x100):
        b.memory[p.TSS_MAIN + offset] = r.choice((0, 0xFF))
    for _ in range(p.ACTIONS):
        iopl = r.choice((0, 3, 3))
        flags = 0x20002 | iopl << 12 | r.choice((0, 0x8D5))
        if b.chance(15):
            flags |= 0x100
        segs = [r.choice((0x1000, 0x1800, r.randrange(0x1000, 0x1800))) for _ in range(4)]
        segs[2] = 0x1000  # DS: 0x8000 of it is DATA
        frame = (*segs[:2], segs[2], segs[3], 0x1000, p.STACK_V86 - 0x10000, flags, 0x1000, b.offset16())
        names = (0, 1, 2, 3, 4, 5, 6, 7, 8)
        before = "".join(f"push {frame[n]}\n" for n in names) + IRET
        lines = unlabelled([text16(b, True) for _ in range(r.randrange(1, 6))])
        b.action16(before, "\n".join(lines))


def code16(b: Builder) -> None:
    """16-bit protected mode: segments with a base of 64 KiB, a 16-bit stack."""
    r = b.r
    b.random_descriptors()
    for vector in (0x50, 0x51, 0x52, 0x60):
        b.gate(vector, pack_gate(r.choice((0xE, 0xF, 6, 7)), p.CODE0, p.TARGET, dpl=3))
    for _ in range(p.ACTIONS):
        user = b.chance(60)
        code, data = (p.CODE16_3, p.DATA16_3) if user else (p.CODE16_0, p.DATA16_0)
        flags = 2 | r.choice((0, 3)) << 12 | r.choice((0, 0x8D5))
        before = "".join(
            f"mov ax, {data if s != 'gs' else p.DATA3}\nmov {s}, ax\n" for s in ("es", "fs", "gs")
        )
        stack = p.STACK_V86 - 0x10000
        if user:
            frame = (data, stack, flags, code, b.offset16())
            before += f"mov ax, {data}\nmov ds, ax\n" + "".join(f"push {v}\n" for v in frame) + IRET
        else:
            before += f"mov ax, {data}\nmov ds, ax\nmov ss, ax\nmov esp, {stack}\n"
            before += far32("0xea", b.offset16(), code)
        lines = unlabelled([text16(b, False) for _ in range(r.randrange(1, 6))])
        b.action16(before, "\n".join(lines))
