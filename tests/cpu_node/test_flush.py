"""What INVLPG, MOV to CR3 and switching paging must forget: data, code, both windows, all spaces.

Source: Intel SDM vol. 3A 4.10.4 (invalidation of TLBs), 4.10.2.4 (global pages).
"""

from __future__ import annotations

import pytest

from cpu_node.cpu import CR4_PGE
from cpu_node.errors import PF, UD
from cpu_node.paging import ERR_PRESENT, ERR_USER, ERR_WRITE
from tests.cpu_node.board import DIRECTORY, PS, RW, US, Board, G, P, asm
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


@pytest.mark.parametrize("flush", [f"invlpg [{VA:#x}]", RELOAD_CR3], ids=["invlpg", "cr3"])
@pytest.mark.parametrize("new", [FRAME + 0x1000 | P | RW | US, 0, FRAME | P | US, FRAME | P | RW | US | G],
                         ids=["moved", "gone", "read-only", "global"])
@isolated
def test_changed_entry(new: int, flush: str) -> None:
    board = _board()
    pte_pa = board.map(VA, FRAME)
    board.poke32(FRAME, 1)
    board.poke32(FRAME + 0x1000, 2)
    board.run(f"""
        mov dword ptr [{VA + 8:#x}], 5
        mov ecx, [{VA:#x}]
        mov dword ptr [{pte_pa:#x}], {new:#x}
        {flush}
        mov edx, [{VA:#x}]
        mov dword ptr [{VA + 8:#x}], 6
        hlt""")
    assert board.regs[1] == 1
    if new == 0:
        assert (board.fault.vector, board.fault.error, board.fault.cr2) == (PF, 0, VA)
    elif not new & RW:
        assert (board.fault.error, board.fault.cr2) == (ERR_PRESENT | ERR_WRITE, VA + 8)
    else:
        assert not board.faults
        assert board.regs[2] == (2 if new & 0x1000 else 1)
        assert board.peek32((new & ~0xFFF) + 8) == 6


@isolated
def test_entry_made_and_unmade_between_two_flushes() -> None:
    """Not present, present and used, not present: the flush must not take that for no change."""
    board = _board()
    pte_pa = board.map(VA, 0, 0)
    board.map(VA + 0x8000, FRAME + 0x1000)
    board.run(f"""
        mov eax, [{VA + 0x8000:#x}]
        mov dword ptr [{pte_pa:#x}], {FRAME | P | RW | US:#x}
        mov eax, [{VA:#x}]
        mov dword ptr [{pte_pa:#x}], 0
        {RELOAD_CR3}
        mov eax, [{VA:#x}]
        hlt""")
    assert (board.fault.vector, board.fault.error, board.fault.cr2) == (PF, 0, VA)


@isolated
def test_entry_there_and_back_between_two_flushes() -> None:
    board = _board()
    pte_pa = board.map(VA, FRAME)
    for n in range(2):
        board.poke32(FRAME + n * 0x1000, n)
    board.run(f"""
        mov eax, [{VA:#x}]
        mov ecx, [{pte_pa:#x}]
        mov dword ptr [{pte_pa:#x}], {FRAME + 0x1000 | P | RW | US:#x}
        invlpg [{VA:#x}]
        mov eax, [{VA:#x}]
        mov [{pte_pa:#x}], ecx
        {RELOAD_CR3}
        mov eax, [{VA:#x}]
        hlt""")
    assert not board.faults
    assert board.regs[0] == 0


@isolated
def test_code_entry_made_and_unmade_between_two_flushes() -> None:
    board = _board()
    pte_pa = board.map(VA, 0, 0)
    for n, code in enumerate(("mov eax, 1\nret", "mov eax, 2\nret")):
        board.load(code, FRAME + n * 0x1000)
    board.map(VA + 0x1000, FRAME)
    board.run(f"""
        mov esi, {VA:#x}
        mov edi, {VA + 0x1000:#x}
        call edi
        mov dword ptr [{pte_pa:#x}], {FRAME + 0x1000 | P | RW | US:#x}
        call esi
        mov dword ptr [{pte_pa:#x}], 0
        {RELOAD_CR3}
        call esi
        hlt""")
    assert (board.fault.vector, board.fault.error, board.fault.cr2) == (PF, 0, VA)
    assert board.regs[0] == 2


@pytest.mark.parametrize("flush", [f"invlpg [{VA:#x}]", RELOAD_CR3], ids=["invlpg", "cr3"])
@isolated
def test_directory_entry_to_another_table(flush: str) -> None:
    """A page used through the old table, then one through the new table without a flush, then a flush."""
    board = _board()
    board.map(VA, FRAME)
    board.map(VA + 0x1000, FRAME + 0x1000)
    for n in range(4):
        board.poke32(FRAME + n * 0x1000, n)
    other = 0x80000
    board.poke32(other, FRAME + 0x2000 | P | RW | US)
    board.poke32(other + 4, FRAME + 0x3000 | P | RW | US)
    board.run(f"""
        mov eax, [{VA:#x}]
        mov dword ptr [{PDE:#x}], {other | P | RW | US:#x}
        mov ecx, [{VA + 0x1000:#x}]
        {flush}
        mov edx, [{VA:#x}]
        hlt""")
    assert not board.faults
    assert board.regs[0] == 0
    assert board.regs[1] in (1, 3)
    assert board.regs[2] == 2


@isolated
def test_shared_table_under_two_addresses() -> None:
    """One page table maps two 4 MiB stretches: a change counts for both."""
    board = _board()
    pte_pa = board.map(VA, FRAME)
    board.poke32(PDE + 4, board.peek32(PDE))
    board.poke32(FRAME, 1)
    board.poke32(FRAME + 0x1000, 2)
    board.run(f"""
        mov eax, [{VA:#x}]
        mov eax, [{VA + (4 << 20):#x}]
        mov dword ptr [{pte_pa:#x}], {FRAME + 0x1000 | P | RW | US:#x}
        {RELOAD_CR3}
        mov ecx, [{VA:#x}]
        mov edx, [{VA + (4 << 20):#x}]
        hlt""")
    assert board.regs[1:3] == [2, 2]


@pytest.mark.parametrize("flush", [f"invlpg [{VA + 0x123456:#x}]", RELOAD_CR3], ids=["invlpg", "cr3"])
@isolated
def test_4_mib_page_moved(flush: str) -> None:
    """INVLPG of any address in it drops all of it: data and code [4.10.4.1]."""
    board = _board()
    for n in range(2):
        board.poke32(BIG_FRAME + (n << 22) + 0x2000, n)
        board.load(f"mov ebp, {n}\nret", BIG_FRAME + (n << 22) + 0x5000)
    board.poke32(PDE, BIG_FRAME | PS | P | RW | US)
    board.run(f"""
        mov esi, {VA + 0x5000:#x}
        call esi
        mov eax, [{VA + 0x2000:#x}]
        mov dword ptr [{PDE:#x}], {BIG_FRAME + (1 << 22) | PS | P | RW | US:#x}
        {flush}
        call esi
        mov ecx, [{VA + 0x2000:#x}]
        hlt""")
    assert not board.faults
    assert (board.regs[0], board.regs[1], board.regs[5]) == (0, 1, 1)


@pytest.mark.parametrize("flush", [f"invlpg [{VA + 0x5000:#x}]", RELOAD_CR3], ids=["invlpg", "cr3"])
@isolated
def test_4_mib_page_split(flush: str) -> None:
    board = _board()
    table = 0x80000
    board.poke32(table + 0x14, FRAME + 0x1000 | P | RW | US)
    board.poke32(BIG_FRAME + 0x5000, 1)
    board.poke32(FRAME + 0x1000, 2)
    board.poke32(PDE, BIG_FRAME | PS | P | RW | US)
    board.run(f"""
        mov eax, [{VA + 0x5000:#x}]
        mov dword ptr [{PDE:#x}], {table | P | RW | US:#x}
        {flush}
        mov ecx, [{VA + 0x5000:#x}]
        mov dword ptr [{PDE:#x}], {BIG_FRAME | PS | P | RW | US:#x}
        {flush}
        mov edx, [{VA + 0x5000:#x}]
        hlt""")
    assert not board.faults
    assert board.regs[0:3] == [1, 2, 1]


@pytest.mark.parametrize("flush", [f"invlpg [{VA:#x}]", RELOAD_CR3], ids=["invlpg", "cr3"])
@isolated
def test_code_moved(flush: str) -> None:
    """The same address, other code: dispatch entries and direct jumps to it are gone."""
    board = _board()
    pte_pa = board.map(VA, FRAME)
    board.load("mov eax, 1\nret", FRAME)
    board.load("mov eax, 2\nret", FRAME + 0x1000)
    board.run(f"""
        mov esi, {VA:#x}
        call esi
        mov ecx, eax
        mov dword ptr [{pte_pa:#x}], {FRAME + 0x1000 | P | RW | US:#x}
        {flush}
        call esi
        mov edx, eax
        mov dword ptr [{pte_pa:#x}], {FRAME | P | RW | US:#x}
        {flush}
        call esi
        mov dword ptr [{pte_pa:#x}], 0
        {flush}
        call esi
        hlt""")
    assert board.regs[0:3] == [1, 1, 2]
    assert (board.fault.vector, board.fault.cr2, board.fault.eip) == (PF, VA, VA)


@pytest.mark.parametrize("flush", ["invlpg", "cr3"])
@isolated
def test_second_page_of_an_instruction_moved(flush: str) -> None:
    board = _board()
    board.map(VA, FRAME)
    pte_pa = board.map(VA + 0x1000, FRAME + 0x1000)
    code = asm("mov eax, 0x44332211\nret", VA + 0xFFD)
    board.load(code[:3], FRAME + 0xFFD)
    board.load(code[3:], FRAME + 0x1000)
    board.load(b"\x99" + code[4:], FRAME + 0x2000)
    how = f"invlpg [{VA + 0x1000:#x}]" if flush == "invlpg" else RELOAD_CR3
    board.run(f"""
        mov esi, {VA + 0xFFD:#x}
        call esi
        mov ecx, eax
        mov dword ptr [{pte_pa:#x}], {FRAME + 0x2000 | P | RW | US:#x}
        {how}
        call esi
        mov edx, eax
        mov dword ptr [{pte_pa:#x}], 0
        {how}
        call esi
        hlt""")
    assert board.regs[1] == 0x44332211
    assert board.regs[2] == 0x44992211
    assert (board.fault.vector, board.fault.cr2, board.fault.eip) == (PF, VA + 0x1000, VA + 0xFFD)


@isolated
def test_instruction_into_a_missing_page_continues_when_it_is_there() -> None:
    """At CPL 3, the handler maps the page: the error code is that of a fetch."""
    board = _board()
    board.map(VA, FRAME)
    pte_pa = board.map(VA + 0x1000, FRAME + 0x1000, 0)
    code = asm("mov eax, 0x44332211\nud2", VA + 0xFFD)
    board.load(code[:3], FRAME + 0xFFD)
    board.load(code[3:], FRAME + 0x1000)
    board.flat(3)
    board.run(b"", VA + 0xFFD)
    assert (board.fault.vector, board.fault.error, board.fault.cr2) == (PF, ERR_USER, VA + 0x1000)
    board.faults.clear()
    board.poke32(pte_pa, FRAME + 0x1000 | P | US)
    board.resume()  # not-present entries are never cached: no flush is needed
    assert board.regs[0] == 0x44332211
    assert board.fault.vector == UD


@isolated
def test_global_pages_fall_with_pge() -> None:
    """Changing CR4.PGE flushes global entries too [4.10.4.1]."""
    board = _board()
    pte_pa = board.map(VA, FRAME, P | RW | US | G)
    board.poke32(FRAME, 1)
    board.poke32(FRAME + 0x1000, 2)
    board.run(f"""
        mov eax, cr4
        or eax, {CR4_PGE:#x}
        mov cr4, eax
        mov ecx, [{VA:#x}]
        mov dword ptr [{pte_pa:#x}], {FRAME + 0x1000 | P | RW | US | G:#x}
        xor eax, {CR4_PGE:#x}
        mov cr4, eax
        mov edx, [{VA:#x}]
        hlt""")
    assert board.regs[1:3] == [1, 2]
