"""Paging: all rights and error codes, A and D bits.

Source: Intel SDM vol. 3A chapter 4.
"""

from __future__ import annotations

from collections.abc import Callable

from cpu_node.descriptor import pack_gate
from tests.system import places as p
from tests.system.bits import SCRATCH
from tests.system.builder import (
    PS,
    RW,
    US,
    A,
    Builder,
    D,
    P,
)


def access(b: Builder, va: int) -> str:
    r = b.r
    how = r.randrange(12)
    wide = f"dword ptr [{va:#x}]"
    if how < 3:
        return f"mov eax, {wide}"
    if how < 6:
        return f"mov {wide}, eax"
    forms = (
        f"mov al, byte ptr [{va:#x}]", f"cmp {wide}, 5\npushfd",
        f"mov esi, {va:#x}\nmov edi, {p.WINDOW + r.randrange(0x7000):#x}\nmov ecx, 9\n.byte 0xf3, 0xa5",
        f"mov eax, {va & ~0x7FF | 0x800:#x}\ncall eax", f"push {wide}\npop dword ptr [{SCRATCH}]",
        f"mov ebx, esp\nmov esp, {va & ~3:#x}\npush 7\nmov esp, ebx",
    )  # fmt: skip
    return r.choice(forms)


def modification(b: Builder, va: int) -> str:
    """A read and a write in one instruction."""
    va = va & ~0xFFF | b.r.randrange(0x7F0)  # in one page: the order of two pages' checks is the processor's
    wide = f"dword ptr [{va:#x}]"
    xadd = f"mov ebx, {va:#x}\nlock\n.byte 0x0f, 0xc1, 0x0b"
    return b.r.choice((f"add {wide}, 3", f"xchg eax, {wide}", xadd, f"inc {wide}", f"not byte ptr [{va:#x}]"))


def address(b: Builder) -> int:
    r = b.r
    offset = r.choice((r.randrange(0x7F0), 0xFFD, 0xFFF, 0xFFC, 0xFFE))
    page = r.randrange(p.WINDOW_PAGES - 1) << 12
    base = r.choice((p.WINDOW, p.WINDOW, p.WINDOW, p.FAR_WINDOW, p.LARGE + p.DATA, p.ABSENT))
    if base == p.LARGE + p.DATA:
        page &= 0x1000
    return base + page + offset


def rights(b: Builder, large: bool = False) -> int:
    r = b.r
    entry = r.choice((P, P, P, P, P, P, P, 0)) | r.choice((0, RW, RW)) | r.choice((0, US, US))
    entry |= r.choice((0, 0, A, A | D)) | r.choice((0, 0x200, 0x18))
    return entry | (PS if large else 0)


def modifications(b: Builder) -> None:
    paging(b, modification)


def paging(b: Builder, access: Callable[[Builder, int], str] = access) -> None:
    r = b.r
    if b.chance(30):
        b.cr0 &= ~0x10000  # WP
    for page in range(p.WINDOW_PAGES):
        frame = p.DATA + (r.randrange(p.DATA_PAGES) << 12)
        b.pte(p.WINDOW + (page << 12), frame | rights(b))
        b.pte(p.FAR_WINDOW + (page << 12), frame | rights(b))
    b.put32(p.DIRECTORY + 4, rights(b, large=True))
    b.put32(p.DIRECTORY + 12, p.TABLE3 | rights(b))
    if b.chance(20):
        b.cr4 &= ~0x10  # PSE: the entry of LARGE names a table, page 0
        b.put32(p.DIRECTORY + 4, p.TABLE3 | rights(b, large=True))
    if b.chance(12):  # the system's own tables
        page = r.choice((p.GDT, p.TSS_MAIN, p.STACK3 - 0x1000))
        entry = b.get32(p.TABLE0 + (page >> 10))
        b.put32(p.TABLE0 + (page >> 10), r.choice((entry & ~P, entry & ~RW, entry & ~US)))
        b.random_descriptors()
        if b.chance(60):
            b.gate(8, pack_gate(5, p.TSS_D_SEL, 0))
    for _ in range(p.ACTIONS):
        cpl = b.cpl()
        lines = [access(b, address(b)) for _ in range(r.randrange(1, 4))]
        if b.chance(25):
            va = p.WINDOW + (r.randrange(p.WINDOW_PAGES) << 12)
            entry = p.DATA + (r.randrange(p.DATA_PAGES) << 12) | rights(b)
            flush = r.choice((f"invlpg [{va}]", "mov eax, cr3\nmov cr3, eax"))
            change = f"mov dword ptr [{p.TABLE0 + (va >> 10):#x}], {entry:#x}\n{flush}"
            lines = [*lines[:1], change, access(b, va + r.randrange(0x700)), *lines[1:]]
            b.action(b.enter(0), *lines)
        else:
            b.action(b.enter(cpl, b.flags(cpl)), *lines)
