"""Random changes of page tables, followed by accesses whose outcome an independent walk predicts."""

from __future__ import annotations

import random

import pytest

from cpu_node.cpu import EAX, EBX
from cpu_node.errors import PF, UD
from tests.cpu_node.board import CODE, DIRECTORY, PS, RW, US, A, Board, D, P, asm
from tests.cpu_node.child import isolated
from tests.cpu_node.windows import ALL, check

VAS = [0x4000_0000 + n * 0x1000 for n in range(12)] + [0x4040_0000 + n * 0x1000 for n in range(4)]
FRAMES = [0x400000 + n * 0x1000 for n in range(8)] + [0x800000, 0x801000]
BIG_VA, BIG_FRAMES = 0x4080_0000, (0x800000, 0xC00000, 0x400000)
OTHER = 0x90000  # the second directory
SHARED_UPTO = 0x4040_0000  # tables below are in both directories


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
