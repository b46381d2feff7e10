"""Windows: mappings, spaces and the code cache stay within their limits."""

from __future__ import annotations

import random

from cpu_node.cache import FIRST
from cpu_node.cpu import EAX, EBX, ECX
from cpu_node.errors import UD
from tests.cpu_node.board import CODE, DATA, DIRECTORY, PS, RW, US, A, Board, D, P
from tests.cpu_node.child import isolated
from tests.cpu_node.windows import ALL, check, mapping_count


@isolated
def test_mappings_of_one_space_stay_below_the_limit() -> None:
    """Scattered pages, each a mapping of its own to the host."""
    board = Board()
    board.paging()
    pages = 600
    for n in range(pages):
        board.map(0x4000_0000 + n * 0x1000, 0x400000 + (n * 7 % pages) * 0x2000)
    board.flush()
    contexts = board.engine.contexts
    contexts.max_mappings, contexts.count_every, contexts._until_count = 200, 16, 16
    board.run(f"mov esi, 0x40000000\nmov ecx, {pages}\n"
              "again: mov [esi], esi\nadd esi, 0x1000\nloop again\nhlt")
    assert not board.faults
    assert mapping_count() < 400
    for n in range(pages):
        assert board.peek32(0x400000 + (n * 7 % pages) * 0x2000) == 0x4000_0000 + n * 0x1000
    check(contexts)


@isolated
def test_code_pages_that_split_big_mappings_are_counted() -> None:
    """Each protected page divides the kernel's big mapping in every space."""
    board = Board()
    board.paging()
    spaces = 20
    for pde in range(4):
        board.poke32(DIRECTORY + 4 * (0x300 + pde), pde << 22 | PS | ALL)
    for n in range(spaces):
        board.new_directory(0x40000 + n * 0x1000)
    calls = 120
    for n in range(calls):
        board.load("ret", 0x400000 + n * 0x2000)
    contexts = board.engine.contexts
    contexts.max_mappings, contexts.count_every, contexts._until_count = 1000, 64, 64
    board.load(f"""
        mov esi, 0xc0400000
        mov ecx, {calls}
    again:
        call esi
        mov eax, [esi]
        add esi, 0x2000
        loop again
        mov [0xc0{0x600000:06x}], eax
        hlt""", CODE)
    for n in range(spaces):
        board.cpu.cr3 = 0x40000 + n * 0x1000
        board.engine.flush_tlb(False)
        board.flat_segments(0)
        board.run(None)
        assert not board.faults
        assert mapping_count() < 2500
    assert len(contexts.spaces) < spaces
    check(contexts)


@isolated
def test_many_spaces_are_recycled() -> None:
    """More directories than spaces, user code in each; windows and tables come back."""
    board = Board()
    board.paging()
    contexts = board.engine.contexts
    contexts.max_spaces = 3
    count = 8
    for n in range(count):
        directory, table = 0x40000 + n * 0x2000, 0x41000 + n * 0x2000
        board.new_directory(directory)
        board.ram[table : table + 4096] = bytes(4096)
        board.poke32(directory + (0x4000_0000 >> 22 << 2), table | ALL)
        board.poke32(table, 0x400000 + n * 0x1000 | ALL)
        board.load(f"mov ecx, {n}\nmov eax, [0x40000100]\nud2", 0x400000 + n * 0x1000)
        board.poke32(0x400100 + n * 0x1000, 1000 + n)
    order = random.Random(5).choices(range(count), k=60)
    for n in order:
        board.cpu.cr3 = 0x40000 + n * 0x2000
        board.engine.flush_tlb(False)
        for cpl in (3, 0):
            board.faults.clear()
            board.flat_segments(cpl)
            board.run(None, 0x4000_0000)
            assert board.fault.vector == UD
            assert (board.regs[ECX], board.regs[EAX]) == (n, 1000 + n)
        assert len(contexts.spaces) <= 3
        assert sum(len(space.tables) for space in contexts.spaces.values()) <= 3
    check(contexts)


@isolated
def test_code_cache_is_dropped_when_full() -> None:
    """More code than fits: everything goes, and comes again as it is needed."""
    board = Board()
    cache = board.engine.contexts.cache
    cache.limit = FIRST + 0x800
    functions = 60
    for n in range(functions):
        body = "\n".join(f"add eax, {k}" for k in range(n, n + 40))
        board.load(f"{body}\nret", 0x400000 + n * 0x1000 + 0xF80)  # runs over the page's end, too
    expected = sum(sum(range(n, n + 40)) for n in range(functions))
    for _ in range(3):
        board.flat()
        board.regs[EAX] = 0
        board.run(f"mov esi, 0x400f80\nmov ecx, {functions}\n"
                  "again: call esi\nadd esi, 0x1000\nloop again\nhlt")
        assert board.regs[EAX] == expected
    assert cache.flushes > 5
    assert cache.position < FIRST + 0x6000
    check(board.engine.contexts)


@isolated
def test_code_cache_is_dropped_when_it_is_full_of_crossing_instructions() -> None:
    """Nothing but jumps that cross into the next page: each is a line of its own."""
    board = Board()
    cache = board.engine.contexts.cache
    cache.limit = FIRST + 0x800
    jumps, first = 200, 0x400FFE
    for n in range(jumps):
        board.load(f"jmp {first + (n + 1) * 0x2000:#x}", first + n * 0x2000)
    board.load("mov eax, 0x1234\nhlt", first + jumps * 0x2000)
    for _ in range(3):
        board.flat()
        board.regs[EAX] = 0
        board.run(None, first)
        assert board.regs[EAX] == 0x1234
        assert cache.position < FIRST + 0x4000
    assert cache.flushes > 5
    check(board.engine.contexts)


@isolated
def test_code_cache_is_dropped_when_too_many_lines_were_made() -> None:
    """A guest that writes code anew all the time: what is dead takes memory, too."""
    board = Board()
    cache = board.engine.contexts.cache
    cache.most_lines = 40
    pages = 30
    for n in range(pages):
        board.load("mov eax, 0\nret", 0x400000 + n * 0x1000)
    for turn in range(1, 8):
        board.flat()
        board.run(f"""
            xor ebx, ebx
            mov esi, 0x400000
            mov ecx, {pages}
        again:
            mov dword ptr [esi+1], {turn}
            call esi
            add ebx, eax
            add esi, 0x1000
            loop again
            hlt""")
        assert board.regs[EBX] == pages * turn
        assert len(cache.lines) <= cache.made <= 42
    assert cache.flushes >= 3
    check(board.engine.contexts)


@isolated
def test_ram_that_ends_inside_a_4_mib_page() -> None:
    """10 MiB: the rest of the last big page is the bus."""
    board = Board(memory=10 << 20)
    board.paging()
    board.poke32(DIRECTORY + 4 * 0x100, 2 << 22 | PS | ALL)
    board.poke32(0x9FFFFC, 0x1234)
    board.flush()
    board.run(f"mov eax, [{0x4000_0000 + 0x1FFFFC:#x}]\nmov ebx, [{0x4000_0000 + 0x200000:#x}]\nhlt")
    assert board.regs[EAX] == 0x1234
    assert board.regs[EBX] == 0xFFFF_FFFF
    assert board.mmio == [("r", 0xA00000, 4, 0xFFFF_FFFF)]
    check(board.engine.contexts)


@isolated
def test_neighbours_come_along_only_with_equal_rights() -> None:
    board = Board()
    board.paging()
    rights = [ALL | A | D, ALL | A | D, ALL | A, P | US | A | D, P | RW | A | D, ALL | A | D, 0, ALL | A | D]
    for n, right in enumerate(rights):
        board.map(0x4000_0000 + n * 0x1000, 0x400000 + n * 0x1000, right)
    board.flush()
    board.run(f"mov [0x40000000], eax\nmov eax, [{DATA}]\nhlt")
    window = board.engine.contexts.space.kernel
    mapped = {va - 0x40000: entry[1] for va, entry in window.small.items() if va >> 8 == 0x400}
    assert mapped == {0: True, 1: True}
    board.run("mov eax, [0x40005000]\nhlt")
    mapped = {va - 0x40000: entry[1] for va, entry in window.small.items() if va >> 8 == 0x400}
    assert mapped == {0: True, 1: True, 5: True}
    check(board.engine.contexts)


@isolated
def test_reset_gives_the_address_space_back() -> None:
    board = Board()
    for _ in range(5):
        board.ram[0x10000:CODE] = bytes(CODE - 0x10000)
        board.forget()
        board.paging()
        board.flat(3)
        board.run(f"mov eax, [{DATA:#x}]\nud2")
        check(board.engine.contexts)
    assert len(board.engine.contexts.spaces) <= 2
    assert mapping_count() < 100
