"""Armed breakpoints with paging on: their pages are the simulator's, everything else runs translated.

Source: Intel SDM vol. 3B 17.2.4, 17.2.5, 17.3.1. Without paging all code is simulated: test_debug.py.
"""

from __future__ import annotations

import pytest

from cpu_node import mode as modes
from cpu_node.errors import UD
from tests.cpu_node.board import CODE, DATA, DIRECTORY, PS, RW, US, A, Board, D, P
from tests.cpu_node.child import isolated
from tests.cpu_node.debuglog import log_debug_exceptions, logged

FAR = CODE + 0x3000  # another page of code
ROUNDS = 2000
LOOP = f"""
    xor edx, edx
    mov ecx, {ROUNDS}
round:
    inc edx
    mov [{DATA + 0x3000}], edx
    push edx
    pop eax
    dec ecx
    jnz round
"""


class Watching(Board):
    """Counts simulated steps; #DB logs EIP and DR6 and returns with RF set."""

    def __init__(self) -> None:
        super().__init__()
        log_debug_exceptions(self)
        self.paging()
        self.steps = 0
        step = self.engine.interpreted

        def counting() -> None:
            self.steps += 1
            step()

        self.engine.interpreted = counting  # type: ignore[method-assign]

    @property
    def log(self) -> list[tuple[int, int]]:
        """(EIP from CODE, B0 to B3) of each #DB."""
        return [(eip - CODE, dr6 & 0xF) for eip, dr6 in logged(self)]

    def arm(self, number: int, va: int, kind: int, length: int = 1) -> None:
        size = {1: 0, 2: 1, 4: 3}[length]
        self.cpu.dr[number] = va
        self.cpu.dr[7] |= 1 << 2 * number | (kind | size << 2) << 16 + 4 * number
        self.engine.mode_changed()


@pytest.mark.parametrize("cpl", [0, 3])
@isolated
def test_code_runs_translated_beside_a_data_breakpoint(cpl: int) -> None:
    board = Watching()
    for va in range(DATA - 0x4000, DATA + 0x8000, 0x1000):  # neighbours are mapped along with what is touched
        board.map(va, va, P | RW | US | A | D)
    board.flush()
    board.flat(cpl)
    board.arm(0, DATA, 1, 4)
    if cpl:
        board.gate(UD, CODE + 0x800)
        board.load("hlt", CODE + 0x800)
    board.run(f"mov eax, [{DATA - 0x4000}]\n{LOOP}mov eax, [{DATA}]\nmov [{DATA + 3}], al\nnop\n"
              f"mov [{DATA + 4}], eax\nmov [{DATA + 0x3000}], eax\n{'ud2' if cpl else 'hlt'}")
    assert board.regs[2] == ROUNDS
    assert len(board.log) == 1
    assert board.log[0][1] == 1
    assert board.ram[CODE + board.log[0][0]] == 0x90  # behind the write
    assert board.steps < 100
    assert board.engine.mode & modes.WATCHED or cpl


@isolated
def test_code_runs_translated_beside_an_instruction_breakpoint() -> None:
    board = Watching()
    board.load("inc esi\nnop\nret", FAR)
    board.arm(1, FAR + 1, 0)
    board.run(f"{LOOP}mov edi, 3\nagain: mov eax, {FAR}\ncall eax\ndec edi\njnz again\nhlt")
    assert board.regs[2] == ROUNDS
    assert board.regs[6] == 3
    assert board.log == [(FAR - CODE + 1, 2)] * 3
    assert board.steps < 100


@isolated
def test_breakpoints_come_and_go() -> None:
    """Code that was translated and pages that were mapped before are watched while DR7 says so."""
    board = Watching()
    arm = f"mov eax, {FAR + 1}\nmov dr0, eax\nmov eax, {DATA}\nmov dr1, eax\n"
    arm += "mov eax, 0x00100405\nmov dr7, eax"
    board.load(f"inc esi\nnop\nmov [{DATA}], esi\nret", FAR)
    board.run(f"""
        mov ebx, {FAR}
        mov edi, 4
    again:
        call ebx
        {arm}
        call ebx
        xor eax, eax
        mov dr7, eax
        dec edi
        jnz again
        hlt""")
    assert board.regs[6] == 8
    behind = FAR - CODE + 2 + 6
    assert board.log == [(FAR - CODE + 1, 1), (behind, 2)] * 4


@isolated
def test_page_tables_changed_while_armed() -> None:
    """INVLPG in the space with hidden pages counts for the one without, too."""
    board = Watching()
    entry = board.map(DATA + 0x5000, DATA + 0x5000)
    board.poke32(DATA + 0x5000, 0x111)
    board.poke32(DATA + 0x6000, 0x222)
    board.flush()
    board.run(f"""
        mov esi, [{DATA + 0x5000}]
        mov eax, {DATA}
        mov dr0, eax
        mov eax, 0x00030401
        mov dr7, eax
        mov ecx, [{DATA}]
        mov edi, [{DATA + 0x5000}]
        mov dword ptr [{entry}], {DATA + 0x6000 | P | RW | US}
        invlpg [{DATA + 0x5000}]
        mov ebp, [{DATA + 0x5000}]
        xor eax, eax
        mov dr7, eax
        mov edx, [{DATA + 0x5000}]
        hlt""")
    assert (board.regs[6], board.regs[7], board.regs[5], board.regs[2]) == (0x111, 0x111, 0x222, 0x222)
    assert [hits for _, hits in board.log] == [1]


@isolated
def test_breakpoint_in_a_large_page() -> None:
    board = Watching()
    board.poke32(DIRECTORY + 4, 0x400000 | P | RW | US | PS)
    board.poke32(DIRECTORY + 8, 0x800000 | P | RW | US | PS)
    board.flush()
    board.arm(3, 0x812344, 3, 2)
    board.run(f"{LOOP}mov eax, [0x412344]\nmov eax, [0x812340]\nmov ax, [0x812343]\nnop\nhlt")
    assert [hits for _, hits in board.log] == [8]
    assert board.regs[2] == ROUNDS
    assert board.steps < 100


@isolated
def test_repeated_string_over_a_breakpoint() -> None:
    board = Watching()
    board.arm(0, DATA + 0x1008, 1, 4)
    board.run(f"mov esi, {DATA}\nmov edi, {DATA + 0xFF0}\nmov ecx, 40\n.byte 0xf3, 0xa5\nhlt")
    assert board.regs[1] == 0
    assert board.ram[DATA + 0xFF0 : DATA + 0x1090] == board.ram[DATA : DATA + 0xA0]
    assert [hits for _, hits in board.log] == [1]
    assert board.log[0][0] == 15  # REP again: elements are left
