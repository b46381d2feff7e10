"""An instruction with several stack accesses, one of which has a page fault: what came before it stays.

The SDM leaves it open; the host's processor does it, and so do all executors.
"""

from __future__ import annotations

import pytest

from cpu_node.cpu import EBP, ESP
from cpu_node.errors import PF
from tests.cpu_node.board import CODE, CODE3, DATA, Board
from tests.cpu_node.child import isolated

BELOW, ABOVE = DATA, DATA + 0x2000  # absent; the page between them is there
VALUES = [0x11111111 * (n + 1) for n in range(8)]
PUSHES = {  # text, operand size, values in the order they are pushed
    "pushal": ("pushal", 4, None),
    "pushaw": ("pushaw", 2, None),
    "call far": (f".byte 0x9a\n.long {CODE}\n.word {CODE3}", 4, [CODE3]),
    "call far 16": (f".byte 0x66, 0x9a\n.word {CODE & 0xFFFF}, {CODE3}", 2, [CODE3]),
    "enter with a display": ("enter 8, 3", 4, [DATA + 0x1800, 0xAAAAAAAA, 0xBBBBBBBB]),
    "enter with a display 16": (".byte 0x66\nenter 8, 3", 2, [(DATA + 0x1800) & 0xFFFF, 0xAAAA, 0xAAAA]),
}


def _board(soft: bool, esp: int) -> Board:
    board = Board()
    board.engine.contexts.soft = soft
    board.paging()
    board.flat_segments(3)
    for page in (BELOW, ABOVE):
        board.map(page, 0, 0)
    board.flush()
    board.regs[:] = VALUES
    board.regs[ESP], board.regs[EBP] = esp, DATA + 0x1800
    board.poke32(DATA + 0x17FC, 0xAAAAAAAA)
    board.poke32(DATA + 0x17F8, 0xBBBBBBBB)
    return board


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", PUSHES)
@isolated
def test_what_has_been_pushed_stays(name: str, soft: bool) -> None:
    text, size, values = PUSHES[name]
    for fit in range(1, (len(values) if values else 7) + 1):
        for more in (0, 1, size - 1):
            esp = DATA + 0x1000 + size * fit + more
            board = _board(soft, esp)
            before = list(board.regs)
            board.run(text)
            cr2 = esp - size * (fit + 1)
            assert (board.fault.vector, board.fault.error, board.fault.cr2) == (PF, 6, cr2), (fit, more)
            assert list(board.regs) == before
            pushed = [int.from_bytes(board.ram[esp - size * (i + 1) : esp - size * i], "little")
                      for i in range(fit)]
            mask = (1 << 8 * size) - 1
            assert pushed == [value & mask for value in (values or before)[:fit]], (fit, more)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("text", "size"), [("popal", 4), ("popaw", 2)])
@isolated
def test_what_has_been_popped_stays(text: str, size: int, soft: bool) -> None:
    """The place of ESP is read, and may fault, though nothing comes of it."""
    mask = (1 << 8 * size) - 1
    for fit in range(8):
        for more in {0, 1, size - 1} if fit else {0}:
            esp = ABOVE - size * fit - more
            board = _board(soft, esp)
            expected = list(board.regs)
            for i in range(fit):
                place, value = esp + size * i, 0x77000001 + i & mask
                board.ram[place : place + size] = value.to_bytes(size, "little")
                if 7 - i != ESP:
                    expected[7 - i] = expected[7 - i] & ~mask | value
            board.run(text)
            assert (board.fault.vector, board.fault.error, board.fault.cr2) == (PF, 4, ABOVE), (fit, more)
            assert list(board.regs) == expected, (fit, more)
