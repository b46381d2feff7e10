"""The store in an engine: the second start takes over what the first translated."""

from __future__ import annotations

from pathlib import Path

from cpu_node.cache import _RESERVE
from cpu_node.cpu import CR4_PSE, EAX, EBX
from cpu_node.kept import MAX_CODE
from cpu_node.store import MOST_FILES, Store
from tests.cpu_node.board import CODE, MMIO, Board, asm
from tests.cpu_node.child import isolated
from tests.cpu_node.store.kit import (
    files,
    found,
    opened,
    record,
)
from tests.cpu_node.twice import aliased_board

GUEST = f"""
    mov ebp, 3
again:
    mov esi, {CODE + 0x1000:#x}
    call esi
    mov esi, {CODE + 0x2FFD:#x}
    call esi
    add ebx, eax
    in al, 0x10
    mov edx, [{MMIO:#x}]
    test ebp, 1
    jz odd
    add ebx, 7
odd:
    dec ebp
    jnz again
    hlt"""
SECOND = "mov ecx, 10\nloop1: inc eax\ncall inner\nloop loop1\nret\n.align 512\ninner: add eax, ebx\nret"
CROSSING = "mov eax, 0x11223344\nret"


def prepared(board: Board, store: Store) -> Board:
    cache = board.engine.contexts.cache
    cache.store = None
    board.ram[:] = bytes(len(board.ram))
    board.forget()
    board.paging(CR4_PSE)
    cache.store = store
    board.ram[CODE + 0x1000 : CODE + 0x1000 + 4096] = asm(SECOND, CODE + 0x1000).ljust(4096, b"\xf4")
    crossing = asm(CROSSING, CODE + 0x2FFD)
    board.ram[CODE + 0x2FFD : CODE + 0x2FFD + len(crossing)] = crossing
    return board


def outcome(board: Board) -> tuple[object, ...]:
    state = (list(board.regs), board.cpu.eip, board.cpu.eflags & 0xCD5, board.ports[:], board.mmio[:])
    board.ports.clear()
    board.mmio.clear()
    return state


@isolated
def test_second_start_translates_nothing_and_does_the_same(folder: Path) -> None:
    board = Board()
    cache = board.engine.contexts.cache
    states, translated_here = [], []
    for _ in range(3):
        store = opened(folder)
        prepared(board, store)
        before = cache.instructions
        board.run(GUEST)
        states.append(outcome(board))
        translated_here.append(cache.instructions - before)
        cache.keep()
    assert states[0] == states[1] == states[2]
    assert translated_here[0] > 20
    assert translated_here[1:] == [0, 0]
    assert len(files(folder)) == 1  # nothing new, nothing written


@isolated
def test_faults_and_roll_back_in_code_taken_over(folder: Path) -> None:
    """A page fault in the middle of taken-over code finds its guest instruction."""
    board = Board()
    states = []
    for _ in range(2):
        store = opened(folder)
        prepared(board, store)
        board.gate(14, CODE + 0x3000)
        board.ram[CODE + 0x3000 : CODE + 0x3010] = asm("mov edi, [esp+4]\nhlt").ljust(16, b"\x90")
        board.run("mov eax, 5\nmov esi, 0x70000000\npush eax\nadd eax, [esi]\ninc ebx\nhlt")
        states.append(outcome(board))
        board.engine.contexts.cache.keep()
    assert states[0] == states[1]
    assert board.regs[7] == CODE + 11  # the ADD
    assert board.engine.contexts.cache.taken_over > 0


@isolated
def test_taken_over_code_that_is_changed(folder: Path) -> None:
    """Self-modifying code, on a page that becomes mixed: the same with and without what was kept."""
    text = """
        mov ecx, 40
        xor ebx, ebx
    again:
        mov [victim+1], ecx
    victim:
        mov eax, 0
        add ebx, eax
        loop again
        hlt"""
    board = aliased_board()
    for _ in range(3):
        store = opened(folder)
        prepared(board, store)
        board.run(text)
        assert board.regs[EBX] == 40 * 41 // 2
        assert board.regs[EAX] == 1
        board.engine.contexts.cache.keep()
        store.close()
    assert board.engine.contexts.cache.taken_over > 0


@isolated
def test_flush_keeps_what_it_drops(folder: Path) -> None:
    board = Board()
    prepared(board, opened(folder))
    cache = board.engine.contexts.cache
    board.run(GUEST)
    state, before = outcome(board), cache.instructions
    assert before
    board.engine.contexts.flush_cache()
    prepared_again = (list(board.regs), board.cpu.eip)
    assert prepared_again == state[:2]
    board.regs[EBX] = 0
    board.run(None)
    assert cache.instructions == before


@isolated
def test_dead_translations_do_not_fill_the_store(folder: Path) -> None:
    """A compiler in the guest that writes function after function to one place."""
    board = Board()
    store = opened(folder, limit=1 << 30)
    prepared(board, store)
    for n in range(200):
        board.load(f"mov eax, {n}\nhlt", CODE)
        board.engine.contexts.writes.clear()  # or the page would be mixed
        board.run(None)
    board.engine.contexts.cache.keep()
    (file,) = files(folder)
    assert file.stat().st_size < 5000


def test_lines_of_the_store_are_never_larger_than_allowed() -> None:
    assert MAX_CODE <= _RESERVE


@isolated
def test_kept_in_portions(folder: Path) -> None:
    board = Board()
    prepared(board, opened(folder))
    board.run(GUEST)
    cache = board.engine.contexts.cache
    assert not cache.keep(most=200)
    assert cache.keep()
    assert cache.keep()
    assert len(files(folder)) == 2
    before = cache.instructions
    prepared(board, opened(folder))
    board.run(GUEST)
    assert cache.instructions == before


def test_many_files_stay_many_while_there_is_no_time(folder: Path) -> None:
    store = opened(folder)
    for number in range(MOST_FILES + 3):
        store.add([record(number)], tidy=False)
    assert len(files(folder)) == MOST_FILES + 3
    store.add([record(50)])
    assert len(files(folder)) == 1
    assert all(found(opened(folder), number) for number in (0, MOST_FILES + 2, 50))


@isolated
def test_error_while_keeping_costs_nothing_else(folder: Path) -> None:
    board = Board()
    prepared(board, opened(folder))
    board.run(GUEST)
    cache = board.engine.contexts.cache
    cache._chunks[0].line.entries[0] = -1  # what can't be packed
    assert cache.keep()
    assert cache.store is None
    board.engine.contexts.flush_cache()
