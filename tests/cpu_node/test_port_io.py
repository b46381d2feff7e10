"""INS and OUTS: repeated ones are one string access per page; single steps and DF = 1 go by elements."""

from __future__ import annotations

from cpu_node.cpu import ECX, EDI, ESI
from tests.cpu_node.board import DATA, Board
from tests.cpu_node.child import isolated

PORT = 0x1F0


@isolated
def test_repeated_ins_is_one_access_per_page() -> None:
    board = Board()
    board.port_values[PORT] = 0xBEEF
    start = DATA + 0x1000 - 6
    board.run(f"mov edx, {PORT}\nmov edi, {start}\nmov ecx, 8\n.byte 0xf3, 0x66, 0x6d\nhlt")
    assert board.strings == [("in", PORT, 2, 3), ("in", PORT, 2, 5)]
    assert bytes(board.ram[start : start + 16]) == b"\xef\xbe" * 8
    assert (board.regs[ECX], board.regs[EDI]) == (0, start + 16)


@isolated
def test_repeated_outs_is_one_access() -> None:
    board = Board()
    board.ram[DATA : DATA + 4] = b"abcd"
    board.run(f"mov edx, {PORT}\nmov esi, {DATA}\nmov ecx, 4\n.byte 0xf3, 0x6e\nhlt")
    assert board.strings == [("out", PORT, 1, 4)]
    assert [value for _, _, _, value in board.ports] == list(b"abcd")
    assert (board.regs[ECX], board.regs[ESI]) == (0, DATA + 4)


@isolated
def test_downward_outs_goes_by_elements() -> None:
    board = Board()
    board.ram[DATA : DATA + 4] = b"abcd"
    board.run(f"std\nmov edx, {PORT}\nmov esi, {DATA + 3}\nmov ecx, 4\n.byte 0xf3, 0x6e\nhlt")
    assert board.strings == []
    assert [value for _, _, _, value in board.ports] == list(b"dcba")


@isolated
def test_ins_of_no_element_touches_nothing() -> None:
    board = Board()
    board.run(f"mov edx, {PORT}\nmov edi, {DATA}\nxor ecx, ecx\n.byte 0xf3, 0x6c\nhlt")
    assert board.strings == board.ports == []


@isolated
def test_element_across_a_page_border_goes_by_elements() -> None:
    board = Board()
    board.port_values[PORT] = 0x11223344
    start = DATA + 0x1000 - 2
    board.run(f"mov edx, {PORT}\nmov edi, {start}\nmov ecx, 2\n.byte 0xf3, 0x6d\nhlt")
    assert bytes(board.ram[start : start + 8]) == b"\x44\x33\x22\x11" * 2
    assert board.regs[ECX] == 0
