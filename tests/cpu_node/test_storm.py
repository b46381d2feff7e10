"""Signals and interrupts at random moments: the end must be that of an undisturbed run."""

from __future__ import annotations

import random
import signal

import pytest

from cpu_node import layout as at
from cpu_node.descriptor import DS, build
from cpu_node.errors import UD
from cpu_node.flags import IF
from tests.cpu_node.board import (
    CODE,
    COUNT,
    COUNTER,
    DATA,
    DATA0,
    HANDLER,
    VECTOR,
    Board,
)
from tests.cpu_node.child import isolated

ENOUGH = 20  # disturbances that a test must have seen
STORM = f"""
    mov ecx, 1000000
    mov esi, {DATA:#x}
    mov edi, {DATA + 0x800:#x}
    mov ebx, 0x12345
    fld1
top:
    push ebx
    push ecx
    call work
    pop ecx
    pop eax
    add edx, eax
    adc ebp, 0
    imul ebx, ebx, 1103515245
    add ebx, 12345
    mov eax, ebx
    shr eax, 22
    and eax, 0x3fc
    xor [esi+eax], ebx
    pushfd
    pop eax
    and eax, 0x8d5
    add edx, eax
    test ecx, 0xff
    jnz no
    push ecx
    push esi
    push edi
    mov ecx, 0x100
    rep movsb
    pop edi
    pop esi
    pop ecx
    stc
    pushfd
    popfd
    adc edx, 0
no:
    fadd st(0), st(0)
    fsqrt
    dec ecx
    jnz top
    cli
    hlt
work:
    push ebp
    mov ebp, esp
    sub esp, 16
    pushal
    mov eax, [ebp+8]
    rol eax, 3
    mov [ebp-4], eax
    popal
    xor ebx, [ebp-4]
    sti
    lea esp, [ebp-16]
    leave
    ret
"""


def _storm_state(board: Board) -> tuple[object, ...]:
    return (list(board.regs), board.cpu.eflags & 0xCD5, bytes(board.ram[DATA : DATA + 0x1000]),
            bytes(board.engine.record.b[at.FX + 32 : at.FX + 160]))


@pytest.mark.parametrize("where", ["kernel", "user", "mixed", "interpreted"])
@pytest.mark.parametrize("kind", ["signals", "interrupts"])
@isolated
def test_storm(kind: str, where: str) -> None:
    """SIGALRM at random moments; each brings an interrupt in the second form. The end must be the same."""
    seed = 3
    rounds = {"kernel": 1_000_000, "user": 1_000_000, "mixed": 150_000, "interpreted": 300}[where]
    program = STORM.replace("mov ecx, 1000000", f"mov ecx, {rounds}")

    if where == "user":
        program = program.replace("    cli\n    hlt\n", "    ud2\n").replace("    sti\n", "")

    def fresh() -> Board:
        board.ram[DATA : DATA + 0x1000] = bytes(n * 7 & 0xFF for n in range(0x1000))
        board.poke32(COUNTER, 0)
        board.engine.record.reset_fpu()
        board.flat_segments(3 if where == "user" else 0)
        if where == "interpreted":
            board.segment(DS, build(DATA0, 0, 0xFFFFFFF, 0xC093))
        board.regs[:4] = [0, 0, 0, 0]
        board.regs[5:8] = [0, 0, 0]
        board.cpu.eflags = 2 | (IF if where == "user" else 0)
        return board

    board = Board()
    if where == "user":
        board.paging()
        board.gate(UD, HANDLER + 0x800)
        board.load("cli\nhlt", HANDLER + 0x800)
    if where == "mixed":
        board.engine.contexts.code.mixed.add(CODE >> 12)
    body = f"pushal\n{COUNT}\nmov eax, -1\nadd eax, 2\nxor ebx, ebx\nxor ebp, ebp\npopal"
    board.handler(body)
    fresh().run(program)
    assert board.cpu.halted
    expected = _storm_state(board)
    moments = random.Random(seed)
    signals = [0]

    def poll() -> None:
        signals[0] += 1
        if kind == "interrupts" and not board.vectors:
            board.vectors.append(VECTOR)
            board.intr = True
        signal.setitimer(signal.ITIMER_REAL, moments.uniform(20e-6, 400e-6))

    board.on_poll = poll
    came = 0
    while came <= ENOUGH:  # how many come in one run is the host's business
        fresh()
        signal.setitimer(signal.ITIMER_REAL, 0.0001)
        board.run(None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert _storm_state(board) == expected
        came += board.peek32(COUNTER) if kind == "interrupts" else signals[0]
