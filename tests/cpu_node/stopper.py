"""Stops translated code at any one host instruction, where a signal could have stopped it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import capstone

from cpu_node import layout as at
from cpu_node.cache import FIRST
from tests.cpu_node.board import Board

_BREAKPOINT = 0xCC
_TRAP_OF_BREAKPOINT = 3


def host_instructions(board: Board) -> Iterator[int]:
    """Offsets in the code cache of every host instruction translated so far."""
    cache = board.engine.contexts.cache
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    offset = FIRST
    while offset < cache.position:
        (insn,) = decoder.disasm_lite(bytes(cache.code[offset : offset + 16]), 0, 1)
        yield offset
        offset += insn[1]


class Stopper:
    """Stops the run at one host instruction, once; rolls back as a signal does and calls `then`."""

    def __init__(self, board: Board, then: Callable[[], None]) -> None:
        self.board = board
        self.then = then
        self.stopped = False
        self.code = board.engine.contexts.cache.code
        self._offset = -1
        self._byte = 0
        board.engine._host_fault = self._host_fault  # type: ignore[method-assign]

    def arm(self, offset: int) -> None:
        self._offset, self._byte = offset, self.code[offset]
        self.stopped = False
        self.code[offset] = _BREAKPOINT

    def disarm(self) -> None:
        self.code[self._offset] = self._byte

    def _host_fault(self) -> None:
        board = self.board
        record = board.engine.record
        if record.q[at.FAULT_TRAP // 8] != _TRAP_OF_BREAKPOINT:
            type(board.engine)._host_fault(board.engine)
            return
        assert record.q[at.FAULT_RIP // 8] == at.CODE + self._offset + 1
        self.disarm()
        self.stopped = True
        record.q[at.FAULT_RIP // 8] = at.CODE + self._offset
        board.engine._signal()
        self.then()
