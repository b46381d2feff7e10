"""User code with the software TLB: what a template may reach, where the host would let it reach more."""

from __future__ import annotations

from cpu_node import layout as at
from cpu_node import mode as modes
from cpu_node.errors import GP, SS, UD
from tests.cpu_node.board import CODE, DATA, STACK3, Board
from tests.cpu_node.child import isolated

FIRST, SECOND = 0x300000, 0x301000  # linear pages, neighbours; in RAM something else lies between
FIRST_PA, SECOND_PA = DATA, DATA + 0x8000
MISALIGNED_MASK = 0x2_1F80  # MXCSR with MM, by which AMD's processors check no alignment
XMM0 = at.FX + 160


@isolated
def test_operand_that_should_be_aligned_never_reads_behind_its_page() -> None:
    """Whatever the host makes of MXCSR.MM: #GP, or the bytes that the guest's next page holds."""
    board = Board()
    board.engine.contexts.soft = True
    board.paging()
    board.flat(3)
    board.map(FIRST, FIRST_PA)
    board.map(SECOND, SECOND_PA)
    board.flush()
    board.ram[FIRST_PA : FIRST_PA + 0x1000] = b"\x11" * 0x1000
    board.ram[FIRST_PA + 0x1000 : FIRST_PA + 0x2000] = b"\xee" * 0x1000  # nothing of this program's
    board.ram[SECOND_PA : SECOND_PA + 0x1000] = b"\x22" * 0x1000
    board.poke32(DATA + 0x3000, MISALIGNED_MASK)
    board.regs[4] = STACK3
    board.run(f"""
        mov eax, [{FIRST:#x}]
        mov eax, [{SECOND:#x}]
        pxor xmm0, xmm0
        ldmxcsr [{DATA + 0x3000:#x}]
        por xmm0, [{SECOND - 8:#x}]
        ud2
    """, CODE)
    assert board.engine.mode & modes.SOFT
    assert board.fault.vector in (GP, UD)
    seen = bytes(board.engine.record.b[XMM0 : XMM0 + 16])
    assert seen == (bytes(16) if board.fault.vector == GP else b"\x11" * 8 + b"\x22" * 8)


@isolated
def test_operand_that_wraps_faults_as_with_a_window() -> None:
    """PUSH breaks the limit, whatever page 0 is like; others look the page up first."""
    for text in ("push eax", "call 0x100020", "mov eax, [esp-4]", "mov eax, [ebx]", "mov [ebx], eax"):
        faults = []
        for soft in (False, True):
            board = Board()
            board.engine.contexts.soft = soft
            board.paging()
            board.flat(3)
            board.map(0xFFFFF000, FIRST_PA)
            board.map(0, 0, 0)
            board.flush()
            board.regs[4], board.regs[3] = 2, 0xFFFFFFFE
            board.run(text, CODE)
            assert bool(board.engine.mode & modes.SOFT) == soft
            faults.append(board.fault)
        assert faults[0] == faults[1], text
        assert (faults[0].vector == SS) == (text[:4] in ("push", "call")), text
