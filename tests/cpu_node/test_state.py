"""The CPU's state record: what is saved, loaded into another engine, runs as if nothing had happened."""

from __future__ import annotations

import copy
from typing import Any

import msgpack
import pytest

from cpu_node import layout as at
from cpu_node import state
from cpu_node.state import CpuStateMismatch, Outer
from tests.cpu_node.board import CODE, COUNTER, DATA, VECTOR, Board, asm
from tests.cpu_node.child import isolated
from tests.cpu_node.stopper import Stopper, host_instructions

OUTER = Outer(clock_ns=12345, tsc=1 << 63, intr=False)
PROGRAM = f"""
    mov esi, {DATA:#x}
    mov dword ptr [esi], 0x3f800000
    fld dword ptr [esi]
    movd xmm3, [esi]
    mov ecx, 300
    again: fadd st(0), st(0)
    fmul dword ptr [esi]
    addss xmm3, xmm3
    rol ebx, 3
    add ebx, ecx
    mov fs, [esi+8]
    mov [esi+ecx*4+16], ebx
    int {VECTOR:#x}
    inc dword ptr [{COUNTER + 8:#x}]
    loop again
    fstp qword ptr [esi+4096]
    movd [esi+4104], xmm3
    hlt
"""


def _board(paging: bool, soft: bool, memory: bytes | None = None) -> Board:
    board = Board(with_apic=True)
    assert board.engine.apic is not None
    board.engine.apic.virtual_wire()
    board.engine.contexts.soft = soft
    if memory is not None:
        board.ram[:] = memory
        board.delivers = True
        return board
    if paging:
        board.paging()
    board.handler(f"inc dword ptr [{COUNTER:#x}]\nout 0x80, al", dpl=3)
    return board


def _outcome(board: Board) -> tuple[Any, ...]:
    return state.save(board.engine, OUTER), bytes(board.ram)


@pytest.mark.parametrize("soft", [False, True], ids=["windows", "tlb"])
@pytest.mark.parametrize("cpl", [0, 3])
@isolated
def test_a_run_goes_on_in_another_engine(cpl: int, soft: bool) -> None:
    """Stopped at many places, saved, loaded into a fresh engine over a copy of the memory: same end."""
    program = PROGRAM.replace("hlt", "int3") if cpl else PROGRAM

    def prepare() -> Board:
        board = _board(bool(cpl), soft)
        board.flat_segments(cpl)
        board.handler("hlt", 3, dpl=3)
        board.load(program)
        board.cpu.eip = CODE
        return board

    whole = prepare()
    whole.resume()
    assert whole.cpu.halted
    assert whole.peek32(COUNTER) == whole.peek32(COUNTER + 8) == 300
    expected = _outcome(whole)
    moved = 0
    board = prepare()
    while not board.cpu.halted:
        kicks = [0]

        def on_port(port: int, value: int, board: Board = board, kicks: list[int] = kicks) -> None:
            kicks[0] += 1
            if kicks[0] == 7:
                board.engine.stopping = True  # noticed before the next instruction

        board.on_port = on_port
        board.resume()
        saved = msgpack.unpackb(msgpack.packb(state.save(board.engine, OUTER)))
        after = _board(bool(cpl), soft, bytes(board.ram))
        assert state.load(after.engine, saved) == OUTER
        assert state.save(after.engine, OUTER) == saved
        board, moved = after, moved + 1
    assert moved > 40
    assert _outcome(board) == expected


@isolated
def test_the_shadow_of_sti_is_saved() -> None:
    """Stopped behind a translated STI: an interrupt that comes in the other engine waits for HLT."""
    board = _board(False, False)
    before = asm("cli\nnop\nsti", CODE)
    board.load("cli\nnop\nsti\nhlt\nnop\nhlt")
    board.handler(f"mov eax, [esp]\nmov [{COUNTER:#x}], eax")
    board.run(None)
    places = []

    def stop() -> None:
        board.on_poll = lambda: setattr(board.engine, "stopping", True)
        board.engine.record.d[at.KICK // 4] = 1

    stopper = Stopper(board, stop)
    for offset in list(host_instructions(board)):
        board.cpu.halted, board.cpu.eip = False, CODE
        board.on_poll = None
        stopper.arm(offset)
        board.resume()
        stopper.disarm()
        if board.cpu.eip == CODE + len(before) and not board.cpu.halted:
            places.append(state.save(board.engine, OUTER))
    assert places
    for saved in places:
        other = _board(False, False, bytes(board.ram))
        state.load(other.engine, saved)
        other.raise_interrupt(VECTOR)
        other.resume()
        assert other.peek32(COUNTER) == CODE + len(before) + 1


@isolated
def test_debug_state_and_shadows_are_saved() -> None:
    board = _board(False, False)
    board.cpu.dr[0], board.cpu.dr[7] = CODE, 0x401
    board.cpu.inhibit_interrupts = board.cpu.nmi_blocked = board.engine.after_ss = True
    board.cpu.pending_debug, board.cpu.tsc_adjust, board.cpu.pat = 0x4000, 77, 0x0606_0606_0606_0606
    board.cpu.cr2, board.cpu.sysenter_esp = 0xFFFF_FFFF, 0xC000_0000
    board.engine.record.b[at.FX + 32] = 0x5A
    assert board.engine.apic is not None
    board.engine.apic.state.irr = 1 << 200
    board.engine.apic.state.deadline_ns = 99
    saved = state.save(board.engine, OUTER)
    other = _board(False, False)
    state.load(other.engine, saved)
    assert state.save(other.engine, OUTER) == saved
    assert other.engine.after_ss
    assert other.cpu.cr2 == 0xFFFF_FFFF
    assert other.engine.apic is not None
    assert other.engine.apic.state.irr == 1 << 200


@isolated
def test_real_mode_and_null_segments_are_saved() -> None:
    board = _board(False, False)
    board.cpu.reset()
    saved = state.save(board.engine, OUTER)
    other = _board(False, False)
    state.load(other.engine, saved)
    assert other.cpu.seg[1].base == 0xFFFF0000
    assert state.save(other.engine, OUTER) == saved
    board.flat()
    board.run("xor eax, eax\nmov gs, eax\nhlt")
    state.load(other.engine, state.save(board.engine, OUTER))
    assert not other.cpu.seg[5].usable


def _damages() -> dict[str, tuple[Any, str]]:
    def change(**values: Any) -> Any:
        return lambda saved: saved.update(values)

    def drop(saved: dict[str, Any]) -> None:
        del saved["cpu"]["cr3"]

    def debug(saved: dict[str, Any]) -> None:
        saved["cpu"]["dr"] = [0]

    def feature(saved: dict[str, Any]) -> None:
        saved["model"]["features"] = [*saved["model"]["features"], "avx512f"]

    def hz(saved: dict[str, Any]) -> None:
        saved["model"]["tsc_hz"] = 1

    return {
        "kind": (change(kind="Cow"), "a saved Cow of version 1, this is Cpu"),
        "version": (change(version=99), "version 99"),
        "no model": (change(model=None), "not a saved CPU"),
        "apic": (change(apic=None), "no local APIC"),
        "fx": (change(fx=b"short"), "FXSAVE image of 5 bytes"),
        "register": (drop, "cr3"),
        "debug registers": (debug, "debug registers"),
        "features": (feature, "avx512f, which this host's processor lacks"),
        "tsc": (hz, "runs at 1 Hz"),
    }


@pytest.mark.parametrize("damage", _damages())
@isolated
def test_what_does_not_fit_is_refused(damage: str) -> None:
    board = _board(False, False)
    saved = copy.deepcopy(state.save(board.engine, OUTER))
    action, message = _damages()[damage]
    action(saved)
    with pytest.raises(CpuStateMismatch, match=message):
        state.load(board.engine, saved)
