"""16-bit code and stacks, addresses that wrap at 4 GiB, real and virtual-8086 mode.

Source: Intel SDM vol. 1 3.6 (operand and address size), vol. 3B chapter 20 (8086 emulation).
"""

from __future__ import annotations

import pytest

from cpu_node.cpu import EAX, EBX, ECX, EDI, EDX, ESI, ESP
from cpu_node.descriptor import DS, ES, SS, build, pack
from cpu_node.errors import GP
from cpu_node.errors import SS as SS_FAULT
from tests.cpu_node.board import CODE, DATA, FIRST_FREE, STACK, Board, asm
from tests.cpu_node.child import isolated

# ---- 16-bit code and stacks


def _code16(board: Board, text: str) -> Board:
    board.describe(FIRST_FREE, pack(CODE, 0xFFFF, 0x009B))
    board.load(text, CODE + 0x1000, 16)
    board.run(f".byte 0xea\n.long 0x1000\n.short {FIRST_FREE}")
    assert not board.translated
    return board


@isolated
def test_16_bit_code() -> None:
    board = Board()
    board.poke32(DATA, 0x12345678)
    _code16(board, """
        mov eax, 0x200000
        mov bx, [eax]
        mov ecx, [eax]
        xor edx, edx
        mov dx, 0xffff
        inc dx
        mov si, 3
    again:
        add di, 5
        dec si
        jnz again
        call sub1
        jmp over
    sub1:
        mov bp, sp
        ret
    over:
        hlt""")
    assert not board.faults
    assert board.regs[EBX] & 0xFFFF == 0x5678
    assert board.regs[ECX] == 0x12345678
    assert board.regs[EDX] == 0
    assert board.regs[EDI] == 15
    assert board.regs[5] & 0xFFFF == STACK - 4  # keystone's call pushes 32 bits


@isolated
def test_16_bit_addressing_and_strings() -> None:
    board = Board()
    board.ram[0x8000:0x8010] = bytes(range(16))
    board.segment(DS, build(0x18, 0, 0xFFFF, 0x0093))
    board.segment(ES, build(0x18, 0, 0xFFFF, 0x0093))
    board.regs[ESI], board.regs[EDI], board.regs[ECX] = 0xAAAA8000, 0xBBBB8800, 0xCCCC0010
    _code16(board, "rep movsb\nmov bx, 0x8000\nmov si, 3\nmov al, [bx+si+1]\nmov ah, [0x8005]\nloop over\n"
            "over: hlt")
    assert board.ram[0x8800:0x8810] == bytes(range(16))
    assert board.regs[EDI] == 0xBBBB8810
    assert board.regs[ECX] == 0xCCCCFFFF
    assert board.regs[EAX] & 0xFFFF == 0x0504


@isolated
def test_16_bit_stack() -> None:
    """SS.B clear: SP alone moves, and wraps at 64 KiB."""
    board = Board()
    board.segment(SS, build(0x18, 0x10000, 0xFFFF, 0x0093))
    board.regs[ESP] = 0x77770002
    board.run("push 0x1234\nhlt")
    assert board.fault.vector == SS_FAULT  # four bytes across the border
    board.faults.clear()
    board.run("push ax\npush ax\npush eax\npop ebx\npop cx\ncall next\nnext: ret 2" + "\nhlt" * 8)
    assert board.regs[ESP] >> 16 == 0x7777


PAIRS = (
    "push ax\npop bx", "push word ptr [esi]\npop word ptr [esi+4]", "pushf\npopf", "pushaw\npopaw",
    ".byte 0x66, 0x1e\n.byte 0x66, 0x1f", ".byte 0x66, 0x6a, 0xfe\npop cx",
    ".byte 0x66, 0xc8, 4, 0, 0\n.byte 0x66, 0xc9",
)  # fmt: skip


@pytest.mark.parametrize("text", PAIRS)
@isolated
def test_16_bit_operands_on_a_32_bit_stack(text: str) -> None:
    board = Board()
    board.regs[ESI] = DATA
    board.regs[5] = STACK
    board.poke32(DATA, 0x1234)
    board.regs[EAX] = 0xABCD
    board.run(text + "\nhlt")
    assert not board.faults
    assert board.regs[ESP] == STACK
    assert board.translated


# ---- 4 GiB


TOP = 0xFFFF_FFFE
WRAPPING = {
    "mov eax, [0xfffffffe]": 0x44332211, "mov esi, 0xfffffffe\nlodsd": 0x44332211,
    "mov ebx, 0xffffffff\nmovzx eax, word ptr [ebx]": 0x3322, "mov esi, 2\nmov eax, [esi-4]": 0x44332211,
    "mov ax, [0xffffffff]": 0x3322,
    "fild dword ptr [0xfffffffe]\npush eax\nfistp dword ptr [esp]\npop eax": 0x44332211,
    "mov ebx, 0xffffffff\nmov eax, [ebx*2]": 0x44332211,
}  # fmt: skip


@pytest.mark.parametrize("text", WRAPPING)
@isolated
def test_operands_wrap_at_4_gib(text: str) -> None:
    """The last bytes of the address space and the first, under paging."""
    board = Board()
    board.paging()
    board.map(0xFFFF_F000, 0x300000)
    board.ram[0x300FFE:0x301000] = b"\x11\x22"
    board.ram[0:2] = b"\x33\x44"
    board.flush()
    board.run(f"{text}\nhlt")
    assert not board.faults
    assert board.regs[EAX] == WRAPPING[text]


@isolated
def test_string_runs_over_the_top() -> None:
    """REP MOVSB upwards past 4 GiB, and downwards below 0."""
    board = Board()
    board.paging()
    board.map(0xFFFF_F000, 0x300000)
    board.ram[0x300FF8:0x301000] = b"abcdefgh"
    board.ram[0:8] = b"ijklmnop"
    board.flush()
    board.run(f"mov esi, 0xfffffff8\nmov edi, {DATA:#x}\nmov ecx, 16\nrep movsb\nmov ebx, esi\n"
              f"std\nmov esi, 7\nmov edi, {DATA + 0x2F:#x}\nmov ecx, 16\nrep movsb\nhlt")
    assert board.ram[DATA : DATA + 16] == b"abcdefghijklmnop"
    assert board.ram[DATA + 0x20 : DATA + 0x30] == b"abcdefghijklmnop"
    assert board.regs[EBX] == 8
    assert board.regs[ESI] == 0xFFFFFFF7


@isolated
def test_code_runs_over_the_top() -> None:
    board = Board()
    board.paging()
    board.map(0xFFFF_F000, 0x300000)
    code = asm("mov eax, 0x44332211\ninc eax\nret", 0)
    board.load(code[:3], 0x300FFD)
    board.load(code[3:], 0)
    board.flush()
    board.run("mov ebx, 0xfffffffd\ncall ebx\nhlt")
    assert not board.faults
    assert board.regs[EAX] == 0x44332212


@isolated
def test_jump_over_the_top() -> None:
    board = Board()
    board.paging()
    board.map(0xFFFF_F000, 0x300000)
    board.load(b"\xe9\x00\x01\x00\x00", 0x300FF0)  # to 0xF5
    board.load("mov eax, 3\njmp [0x80]", 0xF5)
    board.poke32(0x80, CODE + 0x100)
    board.load("hlt", CODE + 0x100)
    board.flush()
    board.run("mov ebx, 0xfffffff0\njmp ebx")
    assert board.regs[EAX] == 3



# ---- real mode and virtual-8086 mode


@isolated
def test_to_real_mode_and_back() -> None:
    """As boot loaders do it: 16-bit segments, PE off, an interrupt through the vector table, PE on again."""
    board = Board()
    board.describe(FIRST_FREE, pack(0, 0xFFFF, 0x009B))
    board.describe(FIRST_FREE + 8, pack(0, 0xFFFF, 0x0093))
    board.load(f"""
        mov ax, {FIRST_FREE + 8}
        mov ds, ax
        mov ss, ax
        mov es, ax
        mov eax, cr0
        and al, 0xfe
        mov cr0, eax
        .byte 0xea
        .short 0x7040, 0""", 0x7000, 16)
    board.load("""
        mov ax, 0x2000
        mov ds, ax
        mov ax, 0x7000
        mov sp, 0x8000
        mov byte ptr [0x10], 0x77
        mov bx, cs
        int 0x21
        mov eax, cr0
        or al, 1
        mov cr0, eax
        .byte 0x66, 0xea
        .long 0x100800
        .short 8""", 0x7040, 16)
    board.load("mov cx, 0x5678\n.byte 0xcf", 0x7100, 16)
    board.load("mov eax, 0x10\nmov ds, ax\nmov es, ax\nmov ss, ax\nmov esi, [0x20010]\nhlt", CODE + 0x800)
    board.cpu.idt_base, board.cpu.idt_limit = 0, 0x3FF
    board.poke32(0x21 * 4, 0x7100)
    board.run(f".byte 0xea\n.long 0x7000\n.short {FIRST_FREE}")
    assert not board.faults
    assert board.regs[EBX] & 0xFFFF == 0
    assert board.regs[ECX] & 0xFFFF == 0x5678
    assert board.regs[ESI] == 0x77
    assert board.regs[ESP] & 0xFFFF == 0x8000
    assert board.translated


@isolated
def test_virtual_8086_mode() -> None:
    """A task of 8086 code under a monitor: its INT is #GP, the monitor skips it and goes on."""
    board = Board()
    board.paging()
    board.load("mov ax, 0x2000\nmov ds, ax\nmov byte ptr [0x10], 0x55\n"
               "int 0x21\ninc cx\nint 0x22", 0x7000, 16)
    board.gate(13, CODE + 0x400)
    board.load("""
        add esp, 4
        mov eax, 0x10
        mov ds, eax
        inc ebx
        mov eax, [esp]
        add eax, 0x7000
        cmp byte ptr [eax+1], 0x22
        jz over
        add dword ptr [esp], 2
        .byte 0xcf
    over:
        mov edi, [esp+8]
        mov edx, [esp+4]
        mov esi, [0x20010]
        hlt""", CODE + 0x400)
    flags = 0x20002
    frame = (0, 0, 0, 0, 0x700, 0x800, flags, 0x700, 0)  # GS FS DS ES SS ESP EFLAGS CS EIP
    board.run("\n".join(f"push {word}" for word in frame) + "\nxor ecx, ecx\n.byte 0xcf")
    assert [f.vector for f in board.faults] == [GP, GP]
    assert board.regs[EBX] == 2
    assert board.regs[ECX] == 1
    assert board.regs[EDX] == 0x700
    assert board.regs[EDI] & 0x20000
    assert board.regs[ESI] == 0x55
