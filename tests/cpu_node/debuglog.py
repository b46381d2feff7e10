"""A #DB handler for boards: it logs EIP and DR6, clears DR6 and returns with RF set, as debuggers do."""

from __future__ import annotations

from cpu_node.errors import DB
from cpu_node.flags import RF
from tests.cpu_node.board import Board

HANDLER = 0x110000
LOG = 0x210000  # where the next entry goes; entries are EIP and DR6
IRET = ".byte 0xcf"


def log_debug_exceptions(board: Board) -> None:
    board.gate(DB, HANDLER)
    board.load(f"""
        push eax
        push ebx
        mov ebx, [{LOG:#x}]
        mov eax, [esp+8]
        mov [ebx], eax
        mov eax, dr6
        mov [ebx+4], eax
        add dword ptr [{LOG:#x}], 8
        xor eax, eax
        mov dr6, eax
        or dword ptr [esp+16], {RF:#x}
        pop ebx
        pop eax
        {IRET}""", HANDLER)
    board.poke32(LOG, LOG + 8)


def logged(board: Board) -> list[tuple[int, int]]:
    """(EIP, DR6) of each #DB."""
    return [(board.peek32(at), board.peek32(at + 4)) for at in range(LOG + 8, board.peek32(LOG), 8)]
