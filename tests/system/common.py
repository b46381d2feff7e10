"""The code that all scenarios share: what starts them, logs each interrupt and exception, and ends them.

A handler's stub pushes its vector; `common` writes a log entry (see log.py) and then goes to the next action,
or returns with IRET. A scenario ends by a triple fault of its own making, after MARK was written: so the same
image ends in the same way everywhere.
"""

from __future__ import annotations

import functools
import struct

from keystone import KS_ARCH_X86, KS_MODE_16, KS_MODE_32, Ks

from tests.system import places as p

STUB = 8  # bytes of each vector's stub
STUBS = p.CODE_COMMON + 0x400
START = p.CODE_COMMON

SOURCE = f"""
start:
    lgdt [{p.GDTR_WORD}]
    lidt [{p.IDTR_WORD}]
    .byte 0xea
    .long reload
    .short {p.CODE0}
reload:
    mov esp, {p.STACK0}
    fninit
    xor ecx, ecx
    xor edx, edx
    xor ebx, ebx
    xor ebp, ebp
    xor esi, esi
    xor edi, edi
next:
    cli
    cld
    mov ax, {p.DATA0}
    mov ss, ax
    mov esp, {p.STACK0}
    mov ax, {p.DATA3}
    mov ds, ax
    mov es, ax
    mov fs, ax
    mov gs, ax
    cmp dword ptr [{p.COUNT}], 0
    je finish
    lgdt [{p.GDTR_WORD}]
    lidt [{p.IDTR_WORD}]
    .byte 0xea
    .long here
    .short {p.CODE0}
here:
    xor eax, eax
    mov dr7, eax
    mov eax, [{p.CR4_WORD}]
    mov cr4, eax
    mov eax, [{p.CR3_WORD}]
    mov cr3, eax
    mov eax, [{p.CR0_WORD}]
    mov cr0, eax
    jmp paged
paged:
    mov eax, 0xffff0ff0
    mov dr6, eax
    mov byte ptr [{p.GDT + p.TSS_SEL + 5}], 0x89
    mov al, 0x89
    mov byte ptr [{p.GDT + p.TSS_F_SEL + 5}], al
    mov byte ptr [{p.GDT + p.TSS_F_SEL + 13}], al
    mov byte ptr [{p.GDT + p.TSS_F_SEL + 21}], al
    mov byte ptr [{p.GDT + p.TSS_F_SEL + 29}], al
    mov ax, {p.TSS_SEL}
    ltr ax
    mov ax, {p.LDT_SEL}
    lldt ax
    push 2
    popfd
    mov ecx, [{p.ACTION}]
    cmp ecx, [{p.COUNT}]
    jae finish
    inc dword ptr [{p.ACTION}]
    shl ecx, {p.CODE_SLOT.bit_length() - 1}
    add ecx, {p.CODE}
    xor eax, eax
    xor edx, edx
    mov ebx, 0x3b3b3b3b
    mov ebp, 0x5b5b5b5b
    mov esi, 0x6b6b6b6b
    mov edi, 0x7b7b7b7b
    jmp ecx
finish:
    sgdt [{p.FINAL}]
    sidt [{p.FINAL + 8}]
    sldt [{p.FINAL + 14}]
    str [{p.FINAL + 16}]
    mov eax, cr0
    mov [{p.FINAL + 20}], eax
    mov eax, cr2
    mov [{p.FINAL + 24}], eax
    mov eax, cr4
    mov [{p.FINAL + 28}], eax
    mov eax, dr7
    mov [{p.FINAL + 32}], eax
    mov dword ptr [{p.FINISHED}], {p.MARK}
    lidt [{p.NO_IDTR}]
    .byte 0xcc
common:
    pushad
    .byte 0x1e, 0x06
    mov ax, {p.DATA3}
    mov ds, ax
    mov es, ax
    cld
    mov edi, [{p.LOG_NEXT}]
    cmp edi, {p.LOG_END}
    jae full
    add dword ptr [{p.LOG_NEXT}], {p.ENTRY}
    mov eax, esp
    stosd
    mov ax, ss
    shl eax, 16
    mov ax, cs
    stosd
    mov ax, fs
    shl eax, 16
    mov ax, gs
    stosd
    mov ax, cs
    test al, 3
    jnz outer
    mov eax, cr2
    stosd
    mov eax, dr6
    stosd
    mov eax, dr7
    stosd
    mov eax, 0xffff0ff0
    mov dr6, eax
    str eax
    stosd
    jmp frame
outer:
    add edi, 16
frame:
    mov ecx, 24
    mov esi, esp
more:
    .byte 0x36
    mov eax, [esi]
    add esi, 4
    stosd
    dec ecx
    jnz more
    movzx eax, byte ptr [esp+40]
    cmp eax, 1
    jne other
    or dword ptr [esp+52], 0x10000
other:
    cmp eax, {p.APIC_VECTORS.start}
    jb policy
    cmp eax, {p.APIC_VECTORS.stop}
    jae policy
    mov dword ptr [{p.APIC + 0xB0:#x}], 0
policy:
    mov al, [eax+{p.POLICY}]
    test al, al
    jz leave
    dec al
    jz long
    .byte 0x07, 0x1f
    popad
    lea esp, [esp+4]
    .byte 0x66, 0xcf
long:
    .byte 0x07, 0x1f
    popad
    lea esp, [esp+4]
    .byte 0xcf
full:
    mov dword ptr [{p.COUNT}], 0
leave:
    mov ax, cs
    test al, 3
    jz next
    int {p.NEXT_ACTION}
"""


@functools.cache
def keystone(bits: int) -> Ks:
    return Ks(KS_ARCH_X86, KS_MODE_16 if bits == 16 else KS_MODE_32)


@functools.cache
def asm(text: str, va: int, bits: int = 32) -> bytes:
    """Guest machine code at `va`."""
    code, _ = keystone(bits).asm(text, va)
    assert code is not None, f"no code from {text!r}"
    return bytes(code)


def symbol(name: str) -> int:
    """The address of a label of the common code."""
    return _symbols()[name]


@functools.cache
def _symbols() -> dict[str, int]:
    """Read back from a table of addresses assembled behind the code."""
    names = ("start", "next", "common", "finish")
    text = SOURCE + "".join(f".long {name}\n" for name in names)
    code = asm(text, p.CODE_COMMON)
    return dict(zip(names, struct.unpack("<4I", code[-16:]), strict=True))


@functools.cache
def code() -> bytes:
    """The common code, from CODE_COMMON on, with a stub for each vector at STUBS + vector * STUB."""
    main = asm(SOURCE, p.CODE_COMMON)
    assert len(main) <= STUBS - p.CODE_COMMON, len(main)
    out = bytearray(main.ljust(STUBS - p.CODE_COMMON, b"\xcc"))
    for vector in range(256):
        # push vector (sign-extended: the handler takes its low byte); jmp common
        at = STUBS + vector * STUB
        target = symbol("next") if vector == p.NEXT_ACTION else symbol("common")
        push = bytes((0x6A, vector))
        out += push + b"\xe9" + struct.pack("<i", target - (at + 7)) + b"\xcc"
    assert len(out) <= 0x2000
    return bytes(out)


def stub(vector: int) -> int:
    """The address of a vector's handler."""
    return STUBS + vector * STUB
