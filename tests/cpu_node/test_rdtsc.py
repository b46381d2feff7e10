"""RDTSC of a machine whose counter has an offset: its value, its flags, and what a signal in it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from bus.clock import MachineClock
from cpu_node import layout as at
from cpu_node import mode as modes
from cpu_node.cpu import EAX, EBX, ECX, EDX
from cpu_node.errors import UD
from cpu_node.kept import key_of
from cpu_node.line import page_line
from cpu_node.rdtsc import OFFSET_FLAG
from cpu_node.standing import Standing
from cpu_node.stubs_unsafe import host_rdtsc
from tests.cpu_node.board import CODE, Board, asm
from tests.cpu_node.child import isolated
from tests.cpu_node.stopper import Stopper, host_instructions

VALUE = 0x123_8000_0000  # far from what the host's counter can be, and a carry away from another EDX
SOON = 1 << 44  # ticks, hours: a bound on hanging
PROGRAM = "mov ecx, 0x77\ncmp ecx, 0x80\nmov eax, 0x11\nmov edx, 0x22\nrdtsc\nud2"
BEFORE = "mov ecx, 0x77\ncmp ecx, 0x80\nmov eax, 0x11\nmov edx, 0x22"
NATIVE = OFFSET_FLAG in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
needs_flag = pytest.mark.skipif(not NATIVE, reason=f"the host has no {OFFSET_FLAG}")


def _board(cpl: int = 0, soft: bool = False, verify: bool = False, in_code: bool = True) -> Board:
    board = Board()
    board.rdtsc = host_rdtsc()  # type: ignore[method-assign]
    board.engine.contexts.soft = soft
    if cpl:
        board.paging()
        board.flat(3)
    if verify:
        board.engine.contexts.code.mixed.add(CODE >> 12)
    clock = MachineClock(host_ns=lambda: board.time_ns)
    Standing(board.engine, clock, 2_000_000_000, in_code).set_tsc(VALUE)
    return board


def _check_value(board: Board) -> None:
    assert board.fault.vector == UD
    assert VALUE < board.regs[EDX] << 32 | board.regs[EAX] < VALUE + SOON
    assert board.cpu.eflags & 0x8D5 == 0x81  # of CMP 77h, 80h


@pytest.mark.parametrize("in_code", [pytest.param(True, marks=needs_flag), False])
@isolated
def test_the_offset_is_added(in_code: bool) -> None:
    board = _board(in_code=in_code).run(PROGRAM)
    _check_value(board)
    assert bool(board.engine.mode & modes.TSC_OFFSET) == in_code
    assert board.exits(at.EXIT_SIMULATE) == (1 if in_code else 2)  # UD2, and RDTSC


@isolated
def test_simulated_and_translated_agree() -> None:
    """The sum carries into EDX and beyond 64 bits."""
    board = _board()
    for value in (0xFFFF_FFFF, (1 << 64) - 1, 0):
        Standing(board.engine, MachineClock(), 1, True).set_tsc(value)
        before = board.engine.rdtsc()
        board.faults.clear()
        board.run("rdtsc\nmov ebx, eax\nmov ecx, edx\nud2")
        after = board.engine.rdtsc()
        found = board.regs[ECX] << 32 | board.regs[EBX]
        assert (found - before) % (1 << 64) <= (after - before) % (1 << 64)


@needs_flag
@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verify"])
@pytest.mark.parametrize(("cpl", "soft"), [(0, False), (3, False), (3, True)], ids=["kernel", "user", "soft"])
@isolated
def test_a_signal_anywhere_in_it_leaves_no_half_done_rdtsc(cpl: int, soft: bool, verify: bool) -> None:
    board = _board(cpl, soft, verify)
    at_rdtsc = CODE + len(asm(BEFORE))
    board.run(PROGRAM)
    seen: list[tuple[int, int, int]] = []
    stopper = Stopper(board, lambda: seen.append((board.cpu.eip, board.regs[EAX], board.regs[EDX])))
    for offset in list(host_instructions(board)):
        board.regs[:4] = [1, 2, 3, 4]
        board.faults.clear()
        board.cpu.eip = CODE
        stopper.arm(offset)
        board.resume()
        stopper.disarm()
        _check_value(board)
    inside = [registers for eip, *registers in seen if eip == at_rdtsc]
    assert len(inside) >= 10
    assert all(registers == [0x11, 0x22] for registers in inside)


def test_what_is_kept_serves_with_and_without_an_offset() -> None:
    """Only pages that may hold RDTSC are kept apart."""
    plain, rdtsc = bytes(4096), bytes(100) + b"\x0f\x31" + bytes(3994)
    assert key_of(page_line(1, 1, modes.TSC_OFFSET, plain, False)) == key_of(page_line(1, 1, 0, plain, False))
    assert key_of(page_line(1, 1, modes.TSC_OFFSET, rdtsc, False)) != key_of(page_line(1, 1, 0, rdtsc, False))
