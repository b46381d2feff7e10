"""Windows: pages that go and come back."""

from __future__ import annotations

import pytest

from tests.cpu_node.board import DIRECTORY, PS, RW, US, A, Board, D, P
from tests.cpu_node.child import isolated
from tests.cpu_node.windows import ALL, check, mapping_count

PAGES = 40
ROUND = f"""
    mov esi, 0x40000000
    mov ecx, {PAGES}
again: mov eax, [esi]
    inc dword ptr [esi]
    add esi, 0x1000
    loop again
    hlt"""


def _fills(board: Board) -> int:
    before = board.engine.contexts.fills
    board.engine.stopping = False
    board.run(ROUND)
    assert not board.faults
    check(board.engine.contexts)
    return board.engine.contexts.fills - before


def _scattered(rights: int, first: int = 0) -> Board:
    board = Board()
    board.paging()
    for n in range(PAGES):
        board.map(0x4000_0000 + n * 0x1000, 0x400000 + (first + n * 7 % PAGES) * 0x2000, rights)
    board.flush()
    return board


@isolated
def test_a_page_that_loses_the_right_to_write_stays_readable() -> None:
    board = _scattered(ALL | A | D)
    assert _fills(board) == PAGES
    assert _fills(board) == 0
    ptes = [board.map(0x4000_0000 + n * 0x1000, 0x400000 + n * 7 % PAGES * 0x2000, P | US | A | D)
            for n in range(PAGES)]
    board.flush()
    window = board.engine.contexts.space.kernel
    assert sum(p >> 10 == 0x100 for p in window.small) == PAGES
    check(board.engine.contexts)
    for pte in ptes:
        board.poke32(pte, board.peek32(pte) | RW)
    assert _fills(board) == PAGES  # writing faults, reading does not


@isolated
@pytest.mark.parametrize("other", [0, 1])
def test_hidden_pages_come_back_as_they_were_or_as_others(other: int) -> None:
    board = _scattered(ALL | A | D)
    _fills(board)
    window = board.engine.contexts.space.kernel
    for n in range(PAGES):
        board.map(0x4000_0000 + n * 0x1000, 0, 0)
    board.flush()
    assert len(window.hidden) == PAGES
    check(board.engine.contexts)
    for n in range(PAGES):
        board.map(0x4000_0000 + n * 0x1000, 0x400000 + (other + n * 7 % PAGES) * 0x2000, ALL | A | D)
    board.flush()
    assert _fills(board) == PAGES
    assert not window.hidden
    for n in range(PAGES):
        assert board.peek32(0x400000 + (other + n) * 0x2000) >= 1


@isolated
def test_hidden_pages_are_unmapped_in_bulk() -> None:
    """A process that comes and goes, at other addresses each time, leaves no mappings behind."""
    board = _scattered(ALL | A | D)
    window = board.engine.contexts.space.kernel
    counts = []
    for turn in range(40):
        base = 0x4000_0000 + turn * PAGES * 0x2000
        for n in range(PAGES):
            board.map(base + n * 0x2000, 0x400000 + n * 0x2000, ALL | A | D)
        board.flush()
        board.run(ROUND.replace("0x40000000", f"{base:#x}").replace("0x1000", "0x2000"))
        assert not board.faults
        for n in range(PAGES):
            board.map(base + n * 0x2000, 0, 0)
        board.flush()
        check(board.engine.contexts)
        counts.append(mapping_count())
        assert len(window.hidden) <= 256
    assert max(counts) < 256 * 2 + 2 * PAGES + 20


@isolated
def test_invlpg_of_a_kernel_page_that_is_gone_takes_those_behind_it_along() -> None:
    board = Board()
    board.paging()
    for n in range(PAGES):
        board.map(0x4000_0000 + n * 0x1000, 0x400000 + n * 0x1000, P | RW | A | D)
    board.flush()
    assert _fills(board) == 1  # neighbours come along
    window = board.engine.contexts.space.kernel
    board.map(0x4000_0000 + 5 * 0x1000, 0, 0)
    board.engine.invlpg(0x4000_0000 + 5 * 0x1000)
    assert sorted(page - 0x40000 for page in window.small if page >> 10 == 0x100) == [*range(5)]
    check(board.engine.contexts)
    board.map(0x4000_0000 + 5 * 0x1000, 0x400000 + 5 * 0x1000, P | RW | A | D)
    assert _fills(board) == 1
    assert not window.hidden
    for n in range(PAGES):
        assert board.peek32(0x400000 + n * 0x1000) == 2


@isolated
def test_a_big_page_takes_hidden_ones_along() -> None:
    """A page is hidden, a 4 MiB page is mapped over it and goes; then the small one comes back."""
    board = _scattered(ALL | A | D)
    _fills(board)
    slot = DIRECTORY + (0x4000_0000 >> 22 << 2)
    table = board.peek32(slot)
    board.poke32(slot, 0x800000 | PS | ALL | A | D)
    board.flush()
    assert not board.run(ROUND).faults
    assert board.peek32(0x800000) == 1
    board.poke32(slot, table)
    board.flush()
    assert _fills(board) == PAGES
    assert [board.peek32(0x400000 + n * 0x2000) for n in range(PAGES)] == [2] * PAGES
