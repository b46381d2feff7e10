"""Several page directories, paging on and off, two privileges: each sees its own.

Source: Intel SDM vol. 3A 4.10.4 (what MOV to CR3 and CR0 invalidate).
"""

from __future__ import annotations

import pytest

from cpu_node.cpu import CR0_PG, ESP
from cpu_node.errors import PF, UD
from cpu_node.paging import ERR_PRESENT, ERR_USER, ERR_WRITE
from tests.cpu_node.board import DIRECTORY, RW, STACK, STACK3, US, Board, P
from tests.cpu_node.child import isolated

VA = 0x4000_0000  # 4 MiB-aligned, nothing of the board's there
FRAME = 0x300000
BIG_FRAME = 0x800000
PDE = DIRECTORY + (VA >> 22 << 2)

def _board() -> Board:
    board = Board()
    board.paging()
    return board


RELOAD_CR3 = "mov ebx, cr3\nmov cr3, ebx"


@isolated
def test_two_spaces_keep_apart() -> None:
    board = _board()
    other = 0x90000
    board.map(VA, FRAME)
    board.new_directory(other)
    table = 0x80000
    board.poke32(table, FRAME + 0x1000 | P | RW | US)
    board.poke32(other + (VA >> 22 << 2), table | P | RW | US)
    board.load("mov ebp, 1\nret", FRAME + 0x100)
    board.load("mov ebp, 2\nret", FRAME + 0x1100)
    board.poke32(FRAME, 1)
    board.poke32(FRAME + 0x1000, 2)
    board.run(f"""
        mov edi, 3
        mov esi, {VA + 0x100:#x}
    again:
        mov eax, {DIRECTORY:#x}
        mov cr3, eax
        mov ecx, [{VA:#x}]
        call esi
        shl ebx, 4
        or ebx, ebp
        mov eax, {other:#x}
        mov cr3, eax
        mov edx, [{VA:#x}]
        call esi
        shl ebx, 4
        or ebx, ebp
        dec edi
        jnz again
        hlt""")
    assert not board.faults
    assert board.regs[1:4] == [1, 2, 0x121212]


@isolated
def test_entry_of_a_space_that_was_left() -> None:
    """Changed while another space is in use; entering it again is a flush."""
    board = _board()
    other = 0x90000
    pte_pa = board.map(VA, FRAME)
    board.new_directory(other)
    board.poke32(other + (VA >> 22 << 2), 0)
    board.load("mov eax, 1\nret", FRAME)
    board.load("mov eax, 2\nret", FRAME + 0x1000)
    board.run(f"""
        mov esi, {VA:#x}
        call esi
        mov ecx, eax
        mov eax, {other:#x}
        mov cr3, eax
        mov dword ptr [{pte_pa:#x}], {FRAME + 0x1000 | P | RW | US:#x}
        mov eax, {DIRECTORY:#x}
        mov cr3, eax
        call esi
        mov edx, [{VA + 1:#x}]
        hlt""")
    assert not board.faults
    assert board.regs[0:3] == [2, 1, 2]


@isolated
def test_directory_page_reused_as_another_directory() -> None:
    """The same CR3 value, other content: what fork and exit do with directory pages."""
    board = _board()
    other = 0x90000
    board.map(VA, FRAME)
    board.new_directory(other)
    for n in range(3):
        table = 0x80000 + n * 0x1000
        board.poke32(table, FRAME + n * 0x1000 | P | RW | US)
        board.poke32(FRAME + n * 0x1000, n)
    slot = other + (VA >> 22 << 2)
    program = "".join(f"""
        mov dword ptr [{slot:#x}], {0x80000 + n * 0x1000 | P | RW | US:#x}
        mov eax, {other:#x}
        mov cr3, eax
        shl ebx, 4
        or ebx, [{VA:#x}]
        mov eax, {DIRECTORY:#x}
        mov cr3, eax""" for n in (0, 1, 2, 1, 0))
    board.run(f"xor ebx, ebx\n{program}\nhlt")
    assert board.regs[3] == 0x01210


@isolated
def test_paging_off_and_on() -> None:
    board = _board()
    board.map(VA, FRAME)
    board.map(0x500000, FRAME + 0x1000)
    board.poke32(FRAME + 0x1000, 1)
    board.poke32(0x500000, 2)
    board.run(f"""
        mov ecx, [0x500000]
        mov eax, cr0
        and eax, {~CR0_PG & 0xFFFFFFFF:#x}
        mov cr0, eax
        mov edx, [0x500000]
        or eax, {CR0_PG:#x}
        mov cr0, eax
        mov ebx, [0x500000]
        hlt""")
    assert not board.faults
    assert board.regs[1:4] == [1, 2, 1]


@isolated
def test_user_and_kernel_windows_agree() -> None:
    """A page made supervisor-only is gone for CPL 3 after the flush, and stays for the kernel."""
    board = _board()
    pte_pa = board.map(VA, FRAME)
    board.poke32(FRAME, 7)
    board.flat(3)
    board.run(f"mov eax, [{VA:#x}]\nud2")
    assert board.fault.vector == UD
    board.faults.clear()
    board.poke32(pte_pa, FRAME | P | RW)
    board.flat(0)
    board.run(f"invlpg [{VA:#x}]\nmov ebx, [{VA:#x}]\nhlt")
    assert board.regs[3] == 7
    board.cpu.cpl = 3
    board.flat(3)
    board.run(f"mov eax, [{VA:#x}]\nud2")
    assert (board.fault.vector, board.fault.error) == (PF, ERR_PRESENT | ERR_USER)


@pytest.mark.parametrize("first", ["kernel", "user"])
@isolated
def test_both_windows_forget(first: str) -> None:
    """One privilege used the entry as it was, the other as it is: after a flush both see the new page."""
    board = _board()
    pte_pa = board.map(VA, FRAME)
    board.poke32(FRAME, 1)
    board.poke32(FRAME + 0x1000, 2)

    def read(cpl: int) -> int:
        board.flat_segments(cpl)
        board.faults.clear()
        board.run(f"mov eax, [{VA:#x}]\nud2")
        assert board.fault.vector == UD
        return board.regs[0]

    before, after = (0, 3) if first == "kernel" else (3, 0)
    assert read(before) == 1
    board.poke32(pte_pa, FRAME + 0x1000 | P | RW | US)
    assert read(after) in (1, 2)
    board.flush()
    assert read(before) == read(after) == 2


@pytest.mark.parametrize("top", [STACK, STACK3])
@isolated
def test_read_only_user_page_written_by_the_kernel(top: int) -> None:
    """Copy on write as Linux does it: WP makes the kernel fault too; after the copy both see it."""
    board = _board()
    pte_pa = board.map(VA, FRAME, P | US)
    board.poke32(FRAME, 1)
    board.regs[ESP] = top
    board.run(f"mov eax, [{VA:#x}]\nmov dword ptr [{VA:#x}], 2\nhlt")
    assert board.fault.error == ERR_PRESENT | ERR_WRITE
    board.faults.clear()
    board.poke32(pte_pa, FRAME + 0x1000 | P | US | RW)
    board.engine.invlpg(VA)
    board.resume()
    assert not board.faults
    assert (board.peek32(FRAME), board.peek32(FRAME + 0x1000)) == (1, 2)
