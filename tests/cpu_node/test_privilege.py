"""Between CPL 3 and 0: what is forbidden, and the ways from one to the other.

Source: Intel SDM vol. 3A 5.8.7 (SYSENTER), 5.9 (privileged instructions), 6.12; vol. 1 3.4.3 (IOPL).
"""

from __future__ import annotations

import pytest

from cpu_node.cpu import EAX, ECX, ESP
from cpu_node.descriptor import CS, SS, TRAP_GATE32, pack
from cpu_node.errors import BP, GP, OF, PF, UD
from cpu_node.flags import IF, IOPL
from tests.cpu_node.board import (
    CODE,
    DATA0,
    HANDLER,
    IRET,
    RW,
    STACK,
    STACK3,
    TSS,
    US,
    Board,
    P,
)
from tests.cpu_node.child import isolated


@pytest.mark.parametrize("iopl", [0, 3])
@isolated
def test_popfd_at_cpl_3(iopl: int) -> None:
    """IF changes only where CPL <= IOPL, IOPL never; TF would trap, so it stays clear here."""
    board = Board()
    board.paging()
    board.flat(3)
    board.cpu.eflags = 2 | iopl << 12
    board.run("push 0x204ad7\npopfd\npushfd\npop ebx\npush 0x2\npopfd\npushfd\npop ecx\nud2")
    expected = (0x204AD7 & ~(IF | IOPL)) | iopl << 12 | (IF if iopl == 3 else 0)
    assert board.regs[3] == expected
    assert board.regs[ECX] == 2 | iopl << 12
    assert board.fault.vector == UD


PRIVILEGED = (
    "cli", "sti", "hlt", "in al, dx", "out 0x80, al", "insb", "mov eax, cr0", "mov cr3, eax", "mov eax, dr7",
    "clts", "invlpg [eax]", "wbinvd", "lgdt [eax]", "rdmsr", "wrmsr", "ltr ax", "lmsw ax", "sysexit",
)  # fmt: skip


@pytest.mark.parametrize("text", PRIVILEGED)
@isolated
def test_privileged_instructions_at_cpl_3(text: str) -> None:
    board = Board()
    board.paging()
    board.flat(3)
    board.poke32(TSS + 0x64, 0xFFFF0000)  # no I/O permission map
    board.run(f"nop\n{text}\nud2")
    assert (board.fault.vector, board.fault.error, board.fault.eip) == (GP, 0, CODE + 1)


@isolated
def test_iopl_3_allows_what_it_should() -> None:
    board = Board()
    board.paging()
    board.flat(3)
    board.cpu.eflags = 2 | IOPL
    board.run("sti\nnop\npushfd\npop ebx\ncli\npushfd\npop ecx\nout 0x80, al\nud2")
    assert board.fault.vector == UD
    assert board.regs[3] & IF
    assert not board.regs[ECX] & IF
    assert board.ports == [("out", 0x80, 1, board.regs[EAX] & 0xFF)]


# ---- software interrupts, privilege


@isolated
def test_int_n_and_iret_between_privileges() -> None:
    board = Board()
    board.paging()
    board.flat(3)
    board.gate(0x80, HANDLER, dpl=3, kind=TRAP_GATE32)
    board.load(f"mov ebx, esp\nmov ecx, [esp+12]\nadd eax, 5\n{IRET}", HANDLER)
    board.gate(UD, HANDLER + 0x800)
    board.load("mov edi, [esp+12]\nhlt", HANDLER + 0x800)
    board.run("mov eax, 1\nint 0x80\nint 0x80\nmov esi, esp\nud2")
    assert board.regs[EAX] == 11
    assert board.regs[3] == STACK - 20
    assert board.regs[ECX] == STACK3
    assert board.regs[6] == STACK3
    assert board.regs[7] == STACK3
    assert board.cpu.cpl == 0
    assert board.cpu.seg[SS].selector == DATA0


@isolated
def test_int_n_checks_the_gate_s_privilege() -> None:
    board = Board()
    board.paging()
    board.flat(3)
    board.gate(0x81, HANDLER)
    board.delivers = False
    board.run("int 0x81")
    assert (board.fault.vector, board.fault.error) == (GP, 0x81 << 3 | 2)
    board.faults.clear()
    board.delivers = False
    board.load("nop", HANDLER)
    board.run("int3")
    assert (board.fault.vector, board.fault.error) == (GP, 3 << 3 | 2)


@pytest.mark.parametrize(("text", "vector", "behind"), [
    ("int3", BP, 1), (".byte 0xce", OF, 1), (".byte 0xf1", 1, 1), ("int 0x50", 0x50, 2),
])
@isolated
def test_software_interrupts_push_the_next_instruction(text: str, vector: int, behind: int) -> None:
    board = Board()
    board.gate(vector, HANDLER)
    board.load("pop ebx\nhlt", HANDLER)
    board.run(f"mov al, 0x7f\nadd al, 1\n{text}\nhlt")
    assert board.regs[3] == CODE + 4 + behind


@isolated
def test_sysenter_and_sysexit() -> None:
    board = Board()
    board.paging()
    for selector, rights in ((0x50, 0xC09B), (0x58, 0xC093), (0x60, 0xC0FB), (0x68, 0xC0F3)):
        board.describe(selector, pack(0, 0xFFFFF, rights))
    board.load("inc ebx\nmov edx, ebp\nmov ecx, edi\nsysexit", HANDLER)
    board.load(f"mov edi, esp\nmov ebp, {CODE + 0x1010:#x}\nsysenter\nhlt", CODE + 0x1000)
    board.load("inc ebx\npush ebx\nud2", CODE + 0x1010)
    board.run(f"""
        xor edx, edx
        mov ecx, 0x174
        mov eax, 0x50
        wrmsr
        inc ecx
        mov eax, {STACK - 0x100:#x}
        wrmsr
        inc ecx
        mov eax, {HANDLER:#x}
        wrmsr
        xor ebx, ebx
        mov ecx, {STACK3:#x}
        mov edx, {CODE + 0x1000:#x}
        sysexit""")
    assert board.fault.vector == UD
    assert board.cpu.cpl == 3
    assert board.regs[3] == 2
    assert board.regs[ESP] == STACK3 - 4
    assert board.cpu.seg[CS].selector == 0x63
    assert board.cpu.seg[SS].selector == 0x6B


@isolated
def test_fault_in_user_code_and_back() -> None:
    """A page fault at CPL 3 is repaired by the handler; the instruction runs again."""
    board = Board()
    board.paging()
    pte_pa = board.map(0x4000_0000, 0x300000, 0)
    board.flat(3)
    board.gate(PF, HANDLER)
    repair = f"mov dword ptr [{pte_pa:#x}], {0x300000 | P | RW | US:#x}"
    board.load(f"mov eax, cr2\n{repair}\nadd esp, 4\n{IRET}", HANDLER)
    board.gate(UD, HANDLER + 0x100)
    board.load("hlt", HANDLER + 0x100)
    board.run("mov ecx, 3\nagain: inc dword ptr [0x40000010]\nloop again\nud2")
    assert [f.vector for f in board.faults] == [PF, UD]
    assert board.peek32(0x300010) == 3
