"""A program run twice, translated and one instruction at a time in the simulator; both must end alike.

The simulator reads memory anew for each instruction, so code that changes itself cannot deceive it.
"""

from __future__ import annotations

from collections.abc import Callable

from cpu_node.errors import GuestFault
from tests.cpu_node.board import CODE, DATA, DIRECTORY, PS, RW, US, Board, P

ALIAS = 0x4000_0000  # maps what lies at CODE once more
BIG_ALIAS = 0x5000_0000  # and so, by a 4 MiB page


def aliased_board() -> Board:
    board = Board()
    _renew(board)
    return board


def _interpret(board: Board, text: str | bytes, va: int) -> None:
    board.load(text, va)
    board.cpu.eip = va
    board.cpu.halted = False
    board.engine.stopping = False
    board.engine._set_mode()
    for _ in range(200_000):
        try:
            board.engine.interpreted()
        except GuestFault as fault:
            board.engine.fault(fault)
        if board.cpu.halted or board.engine.stopping:
            return
    raise AssertionError("no end")


def _state(board: Board) -> tuple[object, ...]:
    return (list(board.regs), board.cpu.eip, board.cpu.eflags & 0xCD5, bytes(board.ram[CODE : CODE + 0x4000]),
            bytes(board.ram[DATA : DATA + 0x1000]), board.faults)


def same(text: str | bytes, prepare: Callable[[Board], None] = lambda board: None, va: int = CODE) -> Board:
    """Both ways must end alike; returns the board that ran translated."""
    board = Board()
    states = []
    for way in (_interpret, Board.run):
        _renew(board)
        prepare(board)
        way(board, text, va)
        states.append(_state(board))
    assert board.translated
    assert states[0] == states[1]
    return board


def _renew(board: Board) -> None:
    """The board as it was made: record and code cache exist once in a process."""
    board.ram[:] = bytes(len(board.ram))
    board.forget()
    board.paging()
    for n in range(4):
        board.map(ALIAS + n * 0x1000, CODE + n * 0x1000)
    board.poke32(DIRECTORY + (BIG_ALIAS >> 22 << 2), PS | P | RW | US)
    board.flush()
