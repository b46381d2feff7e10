"""A board whose CPU runs user code, directly or translated, for tests of both."""

from __future__ import annotations

import pytest

from cpu_node.descriptor import FS, GS, null
from cpu_node.direct.choose import MAKERS, examine
from cpu_node.direct.execution import Direct
from cpu_node.direct.exits import DirectUnavailable
from cpu_node.direct.policy import Auto
from cpu_node.direct.window import Forbidden
from cpu_node.flags import IF
from tests.cpu_node.board import Board


def user_board(backend: str | None, auto: Auto | None = None) -> Board:
    """CPL 3 with paging, interrupts on; `backend` None: translated. Skips where the host forbids it."""
    board = Board()
    board.paging()
    board.flat_segments(3)
    for index in (FS, GS):
        board.segment(index, null(0))
    board.cpu.eflags |= IF
    if backend is not None:
        try:
            found = examine(MAKERS[backend])
        except DirectUnavailable as error:
            pytest.skip(f"this host forbids it: {error}")
        forbidden = Forbidden(board.engine.physical, found.forbidden)
        board.engine.direct = Direct(board.engine, MAKERS[backend](board.fd), forbidden, found.lowest, auto)
    return board


def direct_of(board: Board) -> Direct:
    direct = board.engine.direct
    assert direct is not None
    return direct
