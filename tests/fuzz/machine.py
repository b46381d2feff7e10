"""A board that runs fuzzing inputs for real, twice: translated, and by the simulator alone.

The 4 GiB before and behind each window, which no access may reach, are *writable* here (but for 64 KiB next
to the window, where operands that wrap must fault): a stray write would succeed, and be seen as a page that
has come to be.  For the software TLB so are the 4 GiB before and behind guest memory and the TLB's tables,
and the lowest 4 GiB, where an entry that is none would lead.  The stubs, which lie before the code cache, and
RAM that is mapped nowhere are compared too.  In half of the cases two of the data's pages are exchanged.
A guest that runs on is stopped by a timer.  Must be made where stubs_unsafe.install() has run.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from cpu_node import host_unsafe as host
from cpu_node import layout as at
from cpu_node import mode as modes
from cpu_node import stubs_unsafe
from cpu_node.cpu import CR0_MP, CR0_PG, CR0_TS, ESP
from cpu_node.descriptor import CS, DS, ES, FS, GS, SS, build
from cpu_node.errors import TripleFault
from tests.cpu_node.board import CODE, DATA, DIRECTORY, RW, US, Board, BoardEngine, Fault, P
from tests.fuzz.case import PAGE, FuzzCase, pages

RAM = 0x210000
REGIONS = ((0, 0x20000), (CODE, CODE + 3 * PAGE), (DATA, RAM))  # what is mapped, and compared
GAPS = tuple((end, first) for (_, end), (first, _) in pairwise(REGIONS))
TABLES = (0x10000, 0x20000)  # page directory and tables, in the first region
MARKS_OUT = int.from_bytes(b"\x9f\xff\xff\xff" * ((TABLES[1] - TABLES[0]) // 4), "little")
READ_ONLY = DATA + 0xF000
TOP = 0xFFFFF000  # shows a page of data
BASE = 0x1000  # of segments that aren't flat
TICK_S, LIMIT_S = 0.004, 0.05  # of the clock; of this process's own time
BORDER = 1 << 16  # of a guard, stays unreadable
GUARD = 4 << 30
LOW = 1 << 20  # the processes of these tests have nothing from here to 4 GiB
EXCHANGED = (DATA + 0x7000, DATA + 0xA000)  # the stack's page, and one that isn't next to it
EFLAGS = (0x002, 0x202, 0x402, 0x246, 0x8D7, 0x40A02)
DIRECTION_AND_MORE = 0x240CD5 | 0x4000  # compared: status flags, DF, NT, AC, ID


class FuzzEngine(BoardEngine):
    """`simulate`: never translate."""

    simulate = False

    def _set_mode(self) -> None:
        super()._set_mode()
        if self.simulate:
            self.mode |= modes.STEP


@dataclass(slots=True)
class Outcome:
    """`end`: "halt", "fault", "triple" or "time" (the timer; then nothing else can be compared)."""

    end: str
    eip: int
    eflags: int
    regs: tuple[int, ...]
    fx: bytes
    faults: tuple[Fault, ...]
    ram: dict[int, bytes]  # by address: REGIONS
    own_tables: bool  # the guest has changed its page tables, or where they are


class Machine:
    """One per process."""

    def __init__(self) -> None:
        self.board = board = Board(RAM, engine=FuzzEngine)
        self._guards: set[int] = set()
        self._stubs = stubs_unsafe.stub_image()
        board.paging()
        for first, end in REGIONS:
            for page in range(first, end, PAGE):
                rights = P | (0 if page == READ_ONLY else RW) | (US if page >= CODE else 0)
                board.map(page, page, rights)
        for page in set(range(0, RAM, PAGE)) - {p for r in REGIONS for p in range(*r, PAGE)}:
            board.map(page, page, 0)
        board.map(TOP, DATA + 0xE000)
        self._next_entry = board.map(CODE + PAGE, CODE + PAGE)
        self._exchanged = [board.map(page, page) for page in EXCHANGED]
        self._pristine = bytes(board.ram[:])
        self._tables = b""  # as the guest finds them
        self._outside = ""
        low = [(LOW, GUARD - LOW)] if not used_below(GUARD) else []
        around_ram = [(at.RAM - GUARD, GUARD), (at.RAM + RAM, GUARD - RAM)]
        tlb_end = at.TLB_READ + at.TLB_SIZE  # with a gap, or the kernel takes guard and tables for one
        around_tlb = [(at.TLB_READ - GUARD, GUARD - BORDER), (tlb_end + BORDER, GUARD)]
        for ha, size in low + around_ram + around_tlb:
            self._open_guard(ha, size)
        self._strayed = True  # the last guest may have written where none is mapped
        self._deadline = 0.0
        board.on_poll = self._poll

    def _poll(self) -> None:
        if time.process_time() > self._deadline:
            self._timed_out = self.board.engine.stopping = True

    def run(self, case: FuzzCase, simulate: bool) -> Outcome:
        """From RESET until it halts, faults, or the time is over."""
        board, engine = self.board, self.board.engine
        assert isinstance(engine, FuzzEngine)
        engine.simulate = simulate
        self._prepare(case)
        before = engine.exits.total()
        self._timed_out = False
        end = "halt"
        self._deadline = time.process_time() + LIMIT_S
        with _ticking():
            try:
                board.resume()
            except TripleFault:
                end = "triple"
        assert not simulate or engine.exits.total() == before, "translated code ran in the simulator's run"
        if self._timed_out:
            end = "time"
        elif board.faults:
            end = "fault"
        cpu = board.cpu
        fx = bytes(engine.record.b[at.FX : at.FX + 288])
        ram = {first: board.ram[first:last] for first, last in REGIONS}
        tables = slice(*TABLES)
        self._strayed = end == "triple" or not cpu.cr0 & CR0_PG or cpu.cr3 != DIRECTORY or (
            without_marks(ram[0][tables]) != self._tables
        )
        if not self._strayed and any(board.ram[a:b] != self._pristine[a:b] for a, b in GAPS):
            self._outside = "pages of RAM that are mapped nowhere were written"
        mode = engine.mode
        assert mode & modes.INTERPRETED or bool(mode & modes.SOFT) == case.soft, modes.describe(mode)
        eflags = cpu.eflags & DIRECTION_AND_MORE
        regs, faults = tuple(board.regs), tuple(board.faults)
        return Outcome(end, cpu.eip, eflags, regs, fx, faults, ram, self._strayed)

    def _prepare(self, case: FuzzCase) -> None:
        board, engine = self.board, self.board.engine
        cpu = board.cpu
        for start, last in ((0, RAM),) if self._strayed else REGIONS:
            board.ram[start:last] = self._pristine[start:last]
        first, following = pages(case)
        board.ram[CODE : CODE + PAGE] = first
        board.ram[CODE + PAGE : CODE + 2 * PAGE] = following
        if case.next_absent:
            board.poke32(self._next_entry, 0)
        if case.registers & 1:
            for entry, page in zip(self._exchanged, reversed(EXCHANGED), strict=True):
                board.poke32(entry, page | P | RW | US)
        self._tables = without_marks(board.ram[slice(*TABLES)])
        engine.contexts.soft = case.soft
        board.forget()
        cpu.cr3 = DIRECTORY
        cpu.cr0 |= CR0_PG | CR0_MP | (CR0_TS if case.no_fpu else 0)
        cpu.tsc_adjust = 1  # RDTSC is the board's, the same in both runs
        board.flat_segments(3 if case.user else 0)
        code, dpl = cpu.seg[CS], 3 if case.user else 0
        if case.code16:
            rights = code.rights & ~0x4000
            board.segment(CS, build(code.selector, 0, 0xFFFFFFFF, rights))
        data = cpu.seg[DS]
        if case.not_flat:
            for index in (ES, SS, DS):
                board.segment(index, build(data.selector, BASE, RAM - 1, data.rights))
        board.segment(FS, build(data.selector, DATA, 0xFFFFFFFF, data.rights))
        board.segment(GS, build(data.selector, 0xFFFF0000 if dpl else DATA - 8, 0xFFFFFFFF, data.rights))
        rng = Random(case.registers)
        board.regs[:] = [_register(rng) for _ in range(8)]
        if rng.randrange(8):
            board.regs[ESP] = DATA + 0x8000 + rng.randrange(-8, 8)
        cpu.eflags = rng.choice(EFLAGS)
        cpu.eip = CODE + case.offset
        cpu.halted = cpu.inhibit_interrupts = False
        engine.flush_tlb(True)
        if case.verified:
            engine.contexts.code.mixed.update((CODE >> 12, (CODE >> 12) + 1))
        for window in engine.contexts.space.windows:
            self._open_guards(window.ha)

    def _open_guards(self, ha: int) -> None:
        for start in (ha - GUARD + BORDER, ha + GUARD + BORDER):
            self._open_guard(start, GUARD - 2 * BORDER)

    def _open_guard(self, ha: int, size: int) -> None:
        if ha not in self._guards:
            self._guards.add(ha)
            host.map_anonymous(ha, size, host.PROT_READ | host.PROT_WRITE)

    # ---- what must not have happened

    def damage(self) -> list[str]:
        """Whatever was written outside of guest memory, as far as it can be seen."""
        out = []
        if bytes(host.view8(at.CODE, len(self._stubs))) != self._stubs:
            out.append("the stubs were overwritten")
        if self._outside:
            out.append(self._outside)
        out += [f"{size} KiB written near {ha:#x}, outside of guest memory" for ha, size in self._resident()]
        return out

    def _resident(self) -> Iterator[tuple[int, int]]:
        """Guards that have got memory: (address, KiB)."""
        start = 0
        with open("/proc/self/smaps") as smaps:
            for line in smaps:
                head = re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line)
                if head:
                    start = int(head[1], 16)
                elif line.startswith("Anonymous:") and line.split()[1] != "0" and start in self._guards:
                    yield start, int(line.split()[1])


def used_below(end: int) -> bool:
    """Has this process anything mapped there?"""
    with open("/proc/self/maps") as maps:
        return int(maps.readline().split("-")[0], 16) < end


def without_marks(tables: bytes) -> bytes:
    """Page tables without accessed and dirty bits."""
    return (int.from_bytes(tables, "little") & MARKS_OUT).to_bytes(len(tables), "little")


def _register(rng: Random) -> int:
    kind = rng.randrange(6)
    if kind < 3:
        return DATA + rng.randrange(0xE000)
    if kind == 3:
        return rng.randrange(64)
    return rng.choice((0xFFFFFFF0, 0xFFFFFFFF, 0x80000000, CODE, READ_ONLY + 0xFFC, rng.getrandbits(32)))


@contextmanager
def _ticking() -> Iterator[None]:
    signal.setitimer(signal.ITIMER_REAL, TICK_S, TICK_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
