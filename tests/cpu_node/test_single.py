"""One instruction at a time on the host: segment checks, faults without effect, signals in between."""

from __future__ import annotations

import random
import signal

import pytest

from cpu_node import layout as at
from cpu_node.cpu import CR4_OSXMMEXCPT, EAX, ECX, EDX
from cpu_node.decode import decode
from cpu_node.descriptor import CS, DS, ES, SS, build, null
from cpu_node.errors import DE, GP, MF, UD, XM, GuestFault
from cpu_node.errors import SS as SS_FAULT
from cpu_node.single import HostTrap
from tests.cpu_node.board import DATA, Board, asm
from tests.cpu_node.child import isolated

BYTE_GRANULAR = 0x4093


def _linear(board: Board, index: int, offset: int, length: int, write: bool) -> int | tuple[int, int | None]:
    try:
        return board.engine.single.linear(index, offset, length, write)
    except GuestFault as fault:
        return fault.vector, fault.error


@isolated
def test_segment_checks() -> None:
    """Limit, type and null, for every kind of segment [SDM vol. 3 5.3, 5.4.1, 5.5]."""
    board = Board()
    cases = [
        # segment, offset, length, write, expected
        (build(8, 0x1000, 0xFF, BYTE_GRANULAR), 0xFC, 4, True, 0x10FC),
        (build(8, 0x1000, 0xFF, BYTE_GRANULAR), 0xFD, 4, False, (GP, 0)),
        (build(8, 0x1000, 0xFF, BYTE_GRANULAR), 0xFFFFFFFF, 1, False, (GP, 0)),
        (build(8, 0xFFFFF000, 0xFFFFF, BYTE_GRANULAR), 0x2000, 4, True, 0x1000),
        (build(8, 0, 0xFF, 0x4097), 0x100, 4, True, 0x100),  # expand-down
        (build(8, 0, 0xFF, 0x4097), 0xFE, 4, True, (GP, 0)),
        (build(8, 0, 0xFF, 0x0097), 0xFFFD, 4, True, (GP, 0)),  # 16 bits: up to 64 KiB
        (build(8, 0, 0xFFFFFFFF, 0xC091), 5, 4, False, 5),  # read-only
        (build(8, 0, 0xFFFFFFFF, 0xC091), 5, 4, True, (GP, 0)),
        (build(8, 0, 0xFFFFFFFF, 0xC099), 5, 4, False, (GP, 0)),  # execute-only
        (build(8, 0, 0xFFFFFFFF, 0xC09B), 5, 4, False, 5),
        (build(8, 0, 0xFFFFFFFF, 0xC09B), 5, 4, True, (GP, 0)),
        (null(0), 0, 1, False, (GP, 0)),
        (build(8, 0, 0xFFFFFFFF, 0xC093), 0xFFFFFFFE, 4, True, 0xFFFFFFFE),  # wraps
    ]
    for segment, offset, length, write, expected in cases:
        for index in (DS, ES):
            board.cpu.seg[index] = segment
            assert _linear(board, index, offset, length, write) == expected, (segment, hex(offset))


@isolated
def test_stack_segment_faults_are_ss() -> None:
    board = Board()
    board.cpu.seg[SS] = build(8, 0, 0xFF, BYTE_GRANULAR)
    assert _linear(board, SS, 0x100, 4, False) == (SS_FAULT, 0)
    assert _linear(board, CS, 5, 4, True) == (GP, 0)


FAULTS = (("div ecx", DE), ("idiv cl", DE), ("fld1", MF), ("divss xmm0, xmm1", XM),
          ("movaps xmm0, [0x200004]", GP), ("ldmxcsr [0x200008]", GP))


def _state(board: Board) -> tuple[object, ...]:
    image = board.engine.record.b[at.FX : at.FX + 288]
    fx = bytes(image[:28]) + bytes(image[32:])  # less MXCSR_MASK, the host's
    return list(board.regs), board.cpu.eflags, fx, bytes(board.ram[DATA : DATA + 64])


@pytest.mark.parametrize(("text", "vector"), FAULTS)
@isolated
def test_fault_of_the_host_changes_nothing(text: str, vector: int) -> None:
    board = Board()
    record = board.engine.record
    record.b[at.FX + 2 : at.FX + 4] = b"\x84\x80"  # ZE, ES and B: an x87 exception waits
    record.b[at.FX] = 0x7B
    record.b[at.FX + 24 : at.FX + 28] = (0x1D80).to_bytes(4, "little")
    record.b[at.FX + 160 : at.FX + 164] = (0x3F800000).to_bytes(4, "little")
    board.poke32(DATA + 8, 0xFFFF0000)
    board.regs[:] = [7, 0, 9, 10, 11, 12, 13, 14]
    board.cpu.eflags = 0x8D7
    before = _state(board)
    code = asm(text)
    with pytest.raises(GuestFault) as caught:
        board.engine.single.execute(decode(code + bytes(16)), code)
    assert caught.value.vector == vector
    record.b[at.FX + 24] &= ~0x3F  # MXCSR's flags say which SIMD exception it was
    after = _state(board)
    assert after == before
    if vector == XM:
        board.cpu.cr4 &= ~CR4_OSXMMEXCPT
        with pytest.raises(GuestFault) as caught:
            board.engine.single.execute(decode(code + bytes(16)), code)
        assert caught.value.vector == UD


@isolated
def test_trap_that_no_guest_causes() -> None:
    board = Board()
    with pytest.raises(HostTrap):
        board.engine.single.native(b"\xcc")
    board.engine.single.native(b"\x40\x90")  # and the next one runs


@isolated
def test_window_is_the_guest_s_again() -> None:
    board = Board()
    record = board.engine.record
    record.q[at.WINDOW // 8] = 0x1234_0000_0000
    board.engine.single.native(b"\x90")
    assert record.q[at.WINDOW // 8] == 0x1234_0000_0000
    with pytest.raises(GuestFault):
        board.engine.single.native(b"\x0f\x0b")
    assert record.q[at.WINDOW // 8] == 0x1234_0000_0000


@isolated
def test_signals_in_between() -> None:
    """Instructions are done once, however often SIGALRM comes."""
    board = Board()
    single = board.engine.single
    moments = random.Random(1)
    board.regs[EAX], board.regs[ECX], board.regs[EDX] = 0, 3, 0
    inc, add = decode(asm("inc eax") + bytes(16)), asm("add edx, ecx")
    plus = decode(add + bytes(16))
    for n in range(3000):
        if n % 4 == 0:
            signal.setitimer(signal.ITIMER_REAL, moments.uniform(2e-6, 60e-6))
        single.execute(inc, asm("inc eax"))
        single.execute(plus, add)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert board.regs[EAX] == 3000
    assert board.regs[EDX] == 9000
    assert board.engine.record.d[at.KICK // 4] == 1
