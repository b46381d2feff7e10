"""Dispatch tables: entries fall with their page or line, and only they."""

from __future__ import annotations

from cpu_node import layout as at
from cpu_node.dispatch import Table
from cpu_node.line import PAGE, Line, page_line, single_line
from tests.cpu_node.board import CODE, STACK, Board, asm
from tests.cpu_node.child import isolated

HOST = 0x3000


def _page(va_page: int) -> Line:
    return page_line(va_page, 1, 0, bytes(PAGE), False)


@isolated
def test_entries_fall_with_the_page() -> None:
    table = Table()
    for va_page in (5, 6):
        table.add(_page(va_page))
        for offset in (0, 7, 0xFFF):
            table.set(va_page << 12 | offset, HOST + offset)
    table.drop_page(5)
    assert [table.entries[5 << 12 | o] for o in (0, 7, 0xFFF)] == [0, 0, 0]
    assert [table.entries[6 << 12 | o] for o in (0, 7, 0xFFF)] == [at.CODE + HOST + o for o in (0, 7, 0xFFF)]
    assert set(table.lines) == {6}


@isolated
def test_line_knows_its_tables() -> None:
    first, second = Table(), Table()
    line = _page(5)
    for table in (first, second):
        table.add(line)
        table.set(5 << 12, HOST)
    assert line.tables == {first, second}
    first.drop_page(5)
    assert line.tables == {second}
    second.drop_line(line)
    assert second.entries[5 << 12] == 0
    assert line.tables == set()


@isolated
def test_line_that_is_not_the_page_s_any_more_takes_nothing_with_it() -> None:
    table = Table()
    old, new = _page(5), _page(5)
    table.add(old)
    table.drop_page(5)
    table.add(new)
    table.set(5 << 12, HOST)
    table.drop_line(old)
    assert table.entries[5 << 12] == at.CODE + HOST


@isolated
def test_crossing_instruction_falls_with_either_page() -> None:
    va = 0x5FFD
    for va_page in (5, 6):
        table = Table()
        line = single_line(va, (1, 2), 0, bytes(5))
        table.add(line)
        table.set(va, HOST)
        table.drop_page(va_page)
        assert table.entries[va] == 0
        assert not table.crossing
        assert not line.tables
        table.close()


@isolated
def test_crossing_into_the_first_page() -> None:
    table = Table()
    table.add(single_line(0xFFFFFFFE, (1, 2), 0, bytes(5)))
    table.set(0xFFFFFFFE, HOST)
    table.drop_page(0)
    assert table.entries[0xFFFFFFFE] == 0


@isolated
def test_clear_and_close() -> None:
    table = Table()
    line = _page(5)
    table.add(line)
    table.set(5 << 12, HOST)
    table.set(0xFFFFFFFF, HOST)
    table.clear()
    assert table.entries[5 << 12] == table.entries[0xFFFFFFFF] == 0
    assert not table.filled
    assert not line.tables
    index = table.index
    table.close()
    again = Table()
    assert again.index == index
    assert again.entries[5 << 12] == 0


@isolated
def test_entries_of_a_page_do_not_pile_up() -> None:
    """A loop with an exit in it comes by the same addresses again and again."""
    board = Board()
    board.run("mov ecx, 3000\nagain: in al, 0x80\nin al, 0x81\nloop again\nhlt")
    assert sum(map(len, board.engine.contexts.table.filled.values())) < 20


@isolated
def test_crossing_instruction_and_page_of_the_same_number() -> None:
    """The instruction at 0x00100ffd and the page 0x00100ffd, both from the same physical page."""
    board = Board()
    board.paging()
    va = 0x0010_0FFD
    board.map(va << 12 & 0xFFFF_FFFF, CODE)
    board.load(asm("mov eax, 0x44332211\nret", va), va)
    board.load("mov ebx, 7\nret", CODE + 0x100)
    board.flush()
    far = (va << 12 & 0xFFFF_FFFF) + 0x100
    program = f"mov esi, {va:#x}\nmov edi, {far:#x}\ncall esi\ncall edi\ncall esi\nhlt"
    board.run(program, 0x120000)
    assert board.regs[0] == 0x44332211
    assert board.regs[3] == 7
    assert board.regs[4] == STACK


@isolated
def test_signal_in_the_very_first_translation_when_it_crosses() -> None:
    """The page's line then has host code but no instruction of its own."""
    board = Board()
    start = CODE + 0x1000 - 3
    board.load(asm("mov eax, 0x44332211\nhlt", start), start)
    engine = board.engine
    engine.mode_changed()
    engine._set_mode()
    engine.contexts.find(start)
    cache = engine.contexts.cache
    record = engine.record
    for offset in range(at.CODE_FIRST, cache.position):
        if cache.code[offset] in (0x41, 0x43, 0xB8, 0xE9):
            record.q[(at.SCRATCH_REGS) // 8] = start
            record.q[at.FAULT_RIP // 8] = at.CODE + offset
            engine._signal()
            assert board.cpu.eip in (start, start + 5)
