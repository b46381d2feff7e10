"""Windows and spaces from the outside: what the host has mapped is what the page tables grant, never more.

The kernel's own list of mappings (/proc/self/maps) is compared with what the windows believe; random changes
of page tables are followed by accesses whose outcome an independent walk predicts.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cpu_node import layout as at
from cpu_node.cache import FIRST
from cpu_node.contexts import Contexts
from cpu_node.cpu import EAX, EBX, ECX
from cpu_node.errors import PF, UD
from tests.cpu_node.board import CODE, DATA, DIRECTORY, PS, RW, US, A, Board, D, P, asm
from tests.cpu_node.child import isolated

WINDOWS_END = at.WINDOWS + at.WINDOW_COUNT * at.WINDOW_STRIDE


def _host_mappings() -> list[tuple[int, int, bool, int]]:
    """(first, end, writable, file offset) of accessible mappings inside the windows."""
    out = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, offset = line.split()[:3]
        first, end = (int(part, 16) for part in span.split("-"))
        if at.WINDOWS <= first < WINDOWS_END and rights[0] == "r":
            out.append((first, end, rights[1] == "w", int(offset, 16)))
    return out


def _mapping_count() -> int:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(at.WINDOWS <= int(line.split("-")[0], 16) < WINDOWS_END for line in lines)


def check(contexts: Contexts) -> None:
    """The host's mappings, page by page, against the windows' books and the protection of code."""
    host: dict[int, tuple[int, bool]] = {}
    for first, end, writable, offset in _host_mappings():
        for ha in range(first, end, 4096):
            host[ha >> 12] = ((offset + ha - first) >> 12, writable)
    code = contexts.code
    booked = set()
    for space in contexts.spaces.values():
        for window in space.windows:
            base = window.ha >> 12
            for va_page, (pa_page, writable, _) in window.small.items():
                booked.add(base + va_page)
                assert host[base + va_page] == (pa_page, writable), f"page {va_page:#x}"
                assert (window, va_page) in code.small[pa_page]
            for va_big, (frame, writable, _) in window.big.items():
                assert (window, va_big) in code.big[frame]
                for k in range(1024):
                    if frame << 10 | k >= contexts.memory.size >> 12 or va_big << 10 | k in window.small:
                        continue
                    booked.add(base + (va_big << 10 | k))
                    pa_page, may_write = host[base + (va_big << 10 | k)]
                    assert pa_page == frame << 10 | k
                    assert writable or not may_write
    assert booked == set(host), f"not in the books: {[hex(p) for p in sorted(set(host) - booked)[:5]]}"
    mappings = sum(window.mappings() for space in contexts.spaces.values() for window in space.windows)
    split = contexts.code.splits() * 2 * len(contexts.spaces)
    assert _mapping_count() <= mappings + split
    for page, (pa_page, writable) in host.items():
        assert not (writable and code.protected(pa_page)), f"code page {pa_page:#x} is writable at {page:#x}"


# ---- random page tables

VAS = [0x4000_0000 + n * 0x1000 for n in range(12)] + [0x4040_0000 + n * 0x1000 for n in range(4)]
FRAMES = [0x400000 + n * 0x1000 for n in range(8)] + [0x800000, 0x801000]
BIG_VA, BIG_FRAMES = 0x4080_0000, (0x800000, 0xC00000, 0x400000)
OTHER = 0x90000  # the second directory
SHARED_UPTO = 0x4040_0000  # tables below are in both directories
ALL = P | RW | US


def _walk(board: Board, va: int, write: bool, user: bool) -> tuple[int, int | None]:
    """(pa, None) or (0, error code): an independent reading of the tables [SDM vol. 3 4.3, 4.6]."""
    error = (2 if write else 0) | (4 if user else 0)
    pde = board.peek32(board.cpu.cr3 + (va >> 22 << 2))
    pte = pde if pde & PS else board.peek32((pde & ~0xFFF) + (va >> 10 & 0xFFC)) if pde & P else 0
    if not pde & pte & P:
        return 0, error
    both = pde & pte
    if (user and not both & US) or (write and not both & RW):
        return 0, error | 1
    return ((pte & 0xFFC00000) | va & 0x3FFFFF) if pde & PS else pte & ~0xFFF | va & 0xFFF, None


class Fuzz:
    """Changes page tables and tries accesses, each with its expected outcome."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        board = self.board = Board()
        board.paging()
        for va in VAS:
            board.map(va, FRAMES[0])
        board.new_directory(OTHER)
        own_table = 0x91000
        board.ram[own_table : own_table + 4096] = bytes(4096)
        board.poke32(OTHER + (0x4040_0000 >> 22 << 2), own_table | ALL)
        for frame in (*FRAMES, *BIG_FRAMES, *(f + 0x1000 for f in BIG_FRAMES)):
            board.load(asm(f"mov ebx, {frame:#x}\nud2"), frame + 0x10)
            board.poke32(frame, frame)
        board.load("mov eax, [esi]\nud2", CODE)
        board.load("mov [esi], eax\nud2", CODE + 0x20)
        board.load("jmp esi", CODE + 0x40)
        board.flush()

    def step(self) -> None:
        rng, board = self.rng, self.board
        kind = rng.randrange(10)
        if kind < 3:
            self._change_page()
        elif kind == 3:
            self._change_directory()
        elif kind == 4:
            board.cpu.cr3 = rng.choice((DIRECTORY, OTHER))
            board.engine.flush_tlb(False)
        else:
            self._access()

    def _change_page(self) -> None:
        rng, board = self.rng, self.board
        va = rng.choice(VAS)
        pde = board.peek32(board.cpu.cr3 + (va >> 22 << 2))
        if not pde & P or pde & PS:
            return
        pte_pa = (pde & ~0xFFF) + (va >> 10 & 0xFFC)
        was = board.peek32(pte_pa)
        rights = rng.choice((0, P, P | US, P | RW, ALL, ALL, ALL))
        board.poke32(pte_pa, rng.choice(FRAMES) | rights | rng.choice((0, 0, A, A | D)))
        if was & P or rng.randrange(2):  # what wasn't present needs no flush
            if rng.randrange(2):
                board.engine.invlpg(va | rng.randrange(4096))
                if va < SHARED_UPTO:
                    return
            board.engine.flush_tlb(False)

    def _change_directory(self) -> None:
        rng, board = self.rng, self.board
        slot = board.cpu.cr3 + (BIG_VA >> 22 << 2)
        was = board.peek32(slot)
        rights = rng.choice((0, P, P | US, ALL, ALL))
        board.poke32(slot, rng.choice(BIG_FRAMES) | PS | rights | rng.choice((0, A, A | D)))
        if was & P:
            if rng.randrange(2):
                board.engine.invlpg(BIG_VA | rng.randrange(1 << 22))
            else:
                board.engine.flush_tlb(False)

    def _access(self) -> None:
        rng, board = self.rng, self.board
        va = rng.choice((*VAS, BIG_VA, BIG_VA + 0x1000))
        cpl = rng.choice((0, 3))
        way = rng.choice(("read", "read", "write", "execute"))
        board.faults.clear()
        board.flat_segments(cpl)
        board.regs[6] = va + (0x10 if way == "execute" else 0)
        board.regs[EAX] = value = rng.getrandbits(32) if way == "write" else 0
        board.regs[EBX] = 0
        pa, error = _walk(board, va, way == "write", cpl == 3)
        board.run(None, {"read": CODE, "write": CODE + 0x20, "execute": CODE + 0x40}[way])
        fault = board.fault
        what = f"{way} of {va:#x} at CPL {cpl}, directory {board.cpu.cr3:#x}"
        if error is not None:
            assert (fault.vector, fault.error, fault.cr2) == (PF, error, board.regs[6]), what
        else:
            assert fault.vector == UD, f"{what}: {fault}"
            if way == "execute":
                assert board.regs[EBX] == (pa if board.peek32(pa + 0x10) & 0xFF == 0xBB else 0), what
            else:
                assert board.peek32(pa) == board.regs[EAX], what
                assert way != "write" or board.regs[EAX] == value, what


@pytest.mark.parametrize("seed", range(4))
@isolated
def test_random_page_tables(seed: int) -> None:
    fuzz = Fuzz(seed)
    for n in range(1500):
        fuzz.step()
        if n % 250 == 249:
            check(fuzz.board.engine.contexts)


@isolated
def test_random_page_tables_with_little_room() -> None:
    """The same while spaces and mappings are evicted all the time."""
    fuzz = Fuzz(99)
    contexts = fuzz.board.engine.contexts
    contexts.max_spaces, contexts.max_mappings, contexts.count_every = 1, 40, 8
    contexts._until_count = 1
    for n in range(1000):
        fuzz.step()
        if n % 250 == 249:
            check(contexts)
    assert len(contexts.spaces) == 1


# ---- pages that go and come back

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
        counts.append(_mapping_count())
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


# ---- limits


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
    assert _mapping_count() < 400
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
        assert _mapping_count() < 2500
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
    assert _mapping_count() < 100
