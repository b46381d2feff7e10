"""What every trap back end must do: exits.py, behaviour by behaviour, on the back ends this host allows."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpu_node.direct.choose import MAKERS, examine, wait_plainly
from cpu_node.direct.exits import (
    FX_USED,
    USER_DATA,
    Breakpoint,
    DirectUnavailable,
    Fault,
    ForeignMode,
    Gone,
    GuestState,
    Kicked,
    MapRefused,
    PageFault,
    SingleStep,
    SoftwareTrap,
    SystemCall,
)
from tests.cpu_node.direct.rig import (
    CODE,
    CODE_PA,
    DATA,
    DATA_PA,
    RW,
    TOP,
    R,
    Rig,
    rig_of,
    wait_dead,
)

LOST = 0x0A00_0000  # nothing there


@pytest.fixture(params=sorted(MAKERS))
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with rig_of(request.param) as made:
        yield made


def test_holds_nothing_below_4_gib_until_told(rig: Rig) -> None:
    rig.run("int 0x80")
    low = [(first, rights[:3]) for first, _, rights in rig.mappings() if first < 1 << 32]
    assert low == [(CODE, "r-x"), (DATA, "rw-"), (TOP & ~0xFFF, "rw-")]


def test_has_no_other_memory_that_it_may_write_and_execute(rig: Rig) -> None:
    rig.run("int 0x80")
    assert all(not ("w" in rights and "x" in rights) for _, _, rights in rig.mappings())


def test_has_the_memory_file_and_no_other_descriptor_that_leads_out(rig: Rig) -> None:
    rig.run("int 0x80")
    targets = [os.readlink(path) for path in Path(f"/proc/{rig.child.pid}/fd").iterdir()]
    assert len(targets) <= 1
    assert all("memfd:rig" in target for target in targets)


def test_system_call_is_reported_and_not_made(rig: Rig) -> None:
    assert rig.run("mov eax, 1; int 0x80") == SystemCall()  # exit(): it would be gone
    assert rig.offset == 7
    assert rig.state.regs == [1, 0x22, 0x33, 0x44, TOP, 0x66, 0x77, 0x88]
    assert Path(f"/proc/{rig.child.pid}/stat").exists()


def test_system_call_numbers_that_mean_something_to_the_host_kernel(rig: Rig) -> None:
    for number in (0, 0xFFFF_FFFF, 119, 173, 0x4000_0000):
        rig.state.regs[0] = number
        assert rig.run("int 0x80") == SystemCall()
        assert rig.state.regs[0] == number


def test_registers_go_in_and_come_out(rig: Rig) -> None:
    values = [0x8000_0001, 0xFFFF_FFFF, 2, 3, TOP, 5, 0x7FFF_FFFF, 0xDEAD_BEEF]
    rig.state.regs[:] = values
    rig.state.eflags = 0xCD5 | 0x202
    assert rig.run("int 0x80") == SystemCall()
    assert rig.state.regs == values
    assert rig.state.eflags == 0xCD5 | 0x202
    rig.state.eflags = 0x202
    assert rig.run() is not None
    assert rig.run("int 0x80") == SystemCall()
    assert rig.state.eflags == 0x202


@pytest.mark.parametrize("flag", [0x4000, 0x4_0000, 0x400])  # NT, AC, DF
def test_a_flag_that_code_has_set_is_gone_when_it_is_taken_away(rig: Rig, flag: int) -> None:
    """Not that of ID (execution.py): ptrace leaves it as it is. rt_sigreturn leaves NT, too."""
    assert rig.run(f"pushfd; or dword ptr [esp], {flag}; popfd; int 0x80") == SystemCall()
    assert rig.state.eflags & flag
    rig.state.eflags = 0x202
    assert rig.run("int 0x80") == SystemCall()
    assert rig.state.eflags == 0x202


def test_x87_and_sse_state_goes_in_and_comes_out(rig: Rig) -> None:
    fx = rig.state.fx
    struct.pack_into("<H", fx, 0, 0x27F)
    struct.pack_into("<I", fx, 24, 0x1F80)
    fx[160:176] = bytes(range(16))
    assert rig.run("addps xmm1, xmm0; movdqa xmm2, xmm0; fld1; int 0x80") == SystemCall()
    assert fx[160:176] == bytes(range(16))
    assert fx[192:208] == bytes(range(16))
    assert struct.unpack_from("<H", fx, 0)[0] == 0x27F
    assert fx[32:42] == bytes(7) + b"\x80\xff\x3f"
    before = bytes(fx[:FX_USED])
    assert rig.run("int 0x80") == SystemCall()
    assert bytes(fx[:FX_USED]) == before


def test_memory_is_the_file(rig: Rig) -> None:
    rig.memory[DATA_PA : DATA_PA + 4] = b"abcd"
    assert rig.run(f"mov eax, [{DATA}]; mov [{DATA + 4}], eax; int 0x80") == SystemCall()
    assert rig.memory[DATA_PA + 4 : DATA_PA + 8] == b"abcd"


@pytest.mark.parametrize(
    ("text", "va", "write"),
    [
        (f"mov eax, [{LOST + 3}]", LOST + 3, False),
        (f"mov [{LOST + 5}], eax", LOST + 5, True),
        (f"mov [{CODE + 8}], eax", CODE + 8, True),
        (f"inc dword ptr [{LOST}]", LOST, True),
        (f"mov eax, {LOST}; jmp eax", LOST, False),
        (f"mov eax, {DATA}; jmp eax", DATA, False),
        ("mov eax, [0xfffffff0]", 0xFFFF_FFF0, False),
        ("push eax", TOP - 4, True),
    ],
)
def test_page_fault(rig: Rig, text: str, va: int, write: bool) -> None:
    if text.startswith("push"):
        rig.child.protect(TOP & ~0xFFF, 0x1000, R)
    event = rig.run(text)
    assert isinstance(event, PageFault)
    assert event.va == va
    assert event.write in (None, write)
    assert rig.offset in (0, LOST - CODE, DATA - CODE)


def test_a_page_fault_is_restarted_when_the_page_is_there(rig: Rig) -> None:
    assert rig.run(f"add dword ptr [{LOST}], 7; int 0x80") == PageFault(LOST, _write(rig))
    rig.child.map(LOST, 0x1000, R, DATA_PA, True)
    assert rig.run() == PageFault(LOST, _write(rig))
    rig.child.protect(LOST, 0x1000, RW)
    assert rig.run() == SystemCall()
    assert rig.memory[DATA_PA] == 7
    rig.child.unmap(LOST, 0x1000)
    assert isinstance(rig.run(f"add dword ptr [{LOST}], 7"), PageFault)


def _write(rig: Rig) -> bool | None:
    """What the back end says of a write."""
    event = rig.child.run(GuestState(regs=[0] * 4 + [TOP] + [0] * 3, eip=rig.state.eip), wait_plainly)
    assert isinstance(event, PageFault)
    return event.write


def test_string_instruction_stops_in_the_middle(rig: Rig) -> None:
    rig.state.regs[:] = [0xAA, 0x20, 0, 0, TOP, 0, 0, DATA + 0xFF0]
    event = rig.run("rep stosb; int 0x80")
    assert isinstance(event, PageFault)
    assert event.va == DATA + 0x1000
    assert (rig.state.regs[1], rig.state.regs[7], rig.offset) == (0x10, DATA + 0x1000, 0)
    rig.child.map(DATA + 0x1000, 0x1000, RW, DATA_PA + 0x1000, True)
    assert rig.run() == SystemCall()
    assert rig.memory[DATA_PA + 0xFF0 : DATA_PA + 0x1010] == b"\xaa" * 0x20


@pytest.mark.parametrize(
    "text",
    ["hlt", "cli", "in al, dx", "out dx, al", "mov eax, cr0", "mov dr0, eax", "lgdt [eax]", "wbinvd", "ud2",
     "int 0x21", "xor edx, edx; xor ecx, ecx; div ecx", f"movaps xmm0, [{DATA + 1}]", "rdmsr",
     "mov eax, 0x1234; mov ds, ax", "mov ax, gs:[0]", b"\xea\0\0\0\0\x34\x12", "ltr ax", b"\x0f\x04",
     b"\xf0\x90", b"\x0f\x34"],
)  # fmt: skip
def test_other_faults_leave_eip_at_the_instruction(rig: Rig, text: str | bytes) -> None:
    rig.load(text)
    start = {"xor edx": 4, "mov eax, 0x1234": 5}
    event = rig.run()
    if event == SystemCall() and text == b"\x0f\x34":
        pytest.skip("this processor has SYSENTER in compatibility mode")
    assert isinstance(event, Fault)
    assert rig.offset == next((n for head, n in start.items() if str(text).startswith(head)), 0)


@pytest.mark.parametrize("text", ["ud2", "xor edx, edx; xor ecx, ecx; div ecx"])
def test_a_fault_that_no_overflow_looks_like(rig: Rig, text: str) -> None:
    assert rig.run(text) == Fault(perhaps_overflow=False)


@pytest.mark.parametrize("text", [b"\xcc", b"\xcd\x03"])
def test_int3_is_executed(rig: Rig, text: bytes) -> None:
    assert rig.run(text) == SoftwareTrap()
    assert rig.offset == len(text)


def test_a_single_step_of_the_guests_own(rig: Rig) -> None:
    event = rig.run("pushfd; or dword ptr [esp], 0x100; popfd; inc eax; inc eax")
    assert event == SingleStep()
    assert rig.state.eflags & 0x100
    assert rig.state.regs[0] == 0x12


def test_breakpoints(rig: Rig) -> None:
    if not rig.child.breakpoints:
        rig.child.set_breakpoints(())
        return
    rig.child.set_breakpoints((CODE + 1, CODE + 3, CODE + 0x100))
    assert rig.run("inc eax; mov bl, 0x90; inc eax; int 0x80") == Breakpoint()
    assert (rig.offset, rig.state.regs[0], rig.state.regs[3]) == (1, 0x12, 0x44)
    rig.child.set_breakpoints((CODE + 2,))  # in the middle of an instruction: never reached
    assert rig.run() == SystemCall()
    assert (rig.state.regs[0], rig.state.regs[3]) == (0x13, 0x90)


def test_kicked_out_of_a_loop(rig: Rig) -> None:
    def kick(pid: int) -> None:
        while "R" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]:
            time.sleep(0.001)

    rig.load("again: inc eax; jmp again")
    for _ in range(20):
        assert rig.run(wait=kick) == Kicked()
        assert rig.offset in (0, 1)


def test_a_fault_that_comes_with_a_kick_is_not_reported_of_other_code(rig: Rig) -> None:
    rig.load(f"mov eax, [{LOST}]")
    first = rig.run(wait=lambda pid: None)
    while isinstance(first, Kicked):
        first = rig.run(wait=lambda pid: None)
    assert isinstance(first, PageFault)
    for _ in range(3):
        event = rig.run("nop; nop; int 0x80")
        assert event in (Kicked(), SystemCall())
    assert event == SystemCall()


def test_a_signal_from_outside_goes_no_further(rig: Rig) -> None:
    def signalled(number: int, pid: int) -> int | None:
        os.kill(pid, number)
        return wait_plainly(pid)

    rig.load("again: jmp again")
    for number in (signal.SIGUSR1, signal.SIGSEGV, signal.SIGTERM, signal.SIGSTOP, signal.SIGTRAP):
        assert rig.run(wait=lambda pid, n=number: signalled(n, pid)) == Kicked()  # type: ignore[misc]


def test_a_dead_child_is_said_to_be_gone(rig: Rig) -> None:
    def killed(pid: int) -> int | None:
        os.kill(pid, signal.SIGKILL)
        return wait_plainly(pid)

    before = list(rig.state.regs)
    event = rig.run("again: jmp again", wait=killed)
    assert isinstance(event, Gone)
    assert event.ran
    assert rig.state.regs == before
    event = rig.run()
    assert isinstance(event, Gone)
    assert not event.ran


def test_a_child_that_died_while_it_was_stopped_has_run_nothing(rig: Rig) -> None:
    assert rig.run("int 0x80") == SystemCall()
    os.kill(rig.child.pid, signal.SIGKILL)
    wait_dead(rig.child.pid)
    event = rig.run()
    assert isinstance(event, Gone)
    assert not event.ran


def test_64_bit_code_is_not_the_guests(rig: Rig) -> None:
    event = rig.run(_to_64_bit())
    assert event == ForeignMode(0x33)
    assert rig.run("int 0x80") == SystemCall()


def _to_64_bit() -> bytes:
    from tests.cpu_node.board import asm

    head = asm(f"push 0x33; push {CODE + 32}; .byte 0xcb", CODE).ljust(32, b"\x90")
    return head + b"\xb8\x27\0\0\0\x0f\x05\xf4"  # mov eax, 39 (getpid); syscall


def test_segment_registers(rig: Rig) -> None:
    state = rig.state
    state.gs, state.gs_base = 0x33, DATA
    rig.memory[DATA_PA + 0x10 : DATA_PA + 0x14] = b"\x78\x56\x34\x12"
    assert rig.run("mov eax, gs:[0x10]; mov ecx, gs; mov edx, ds; int 0x80") == SystemCall()
    assert (state.regs[0], state.regs[1], state.regs[2]) == (0x1234_5678, 0x33, USER_DATA)
    assert (state.gs, state.gs_base) == (0x33, DATA)
    assert (state.ds, state.es, state.ss) == (USER_DATA, USER_DATA, USER_DATA)


def test_a_segment_register_that_the_guest_loads_shows(rig: Rig) -> None:
    state = rig.state
    state.gs, state.gs_base = 0x33, DATA
    assert rig.run("mov eax, gs; mov gs, ax; xor eax, eax; mov es, ax; int 0x80") == SystemCall()
    assert (state.gs, state.gs_base, state.es) == (0x33, 0, 0)


def test_requests_are_done_in_order_and_may_be_many(rig: Rig) -> None:
    for index in range(1000):
        rig.child.map(LOST, 0x1000, R, (index % 60) << 12, False)
        rig.child.unmap(LOST, 0x1000)
    rig.child.map(LOST, 0x1000, R, CODE_PA, False)
    assert rig.run(f"mov eax, [{LOST}]; int 0x80") == SystemCall()
    assert rig.state.regs[0] == int.from_bytes(rig.memory[:4], "little")


def test_a_refused_mapping_is_said_and_does_no_harm(rig: Rig) -> None:
    rig.child.map(LOST, 0x1000, R, 1, False)  # no page of the file begins there
    with pytest.raises(MapRefused):
        rig.run("int 0x80")
    assert rig.run("int 0x80") == SystemCall()


def test_two_children_are_two(rig: Rig, request: pytest.FixtureRequest) -> None:
    with rig_of(request.node.callspec.params["rig"]) as other:
        assert other.run("int 0x80") == SystemCall()
        assert rig.run("int 0x80") == SystemCall()
        assert other.child.pid != rig.child.pid
        rig.child.close()
        rig.child.close()
        assert not Path(f"/proc/{rig.child.pid}").exists()
        assert other.run("int 0x80") == SystemCall()


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_dies_with_the_node(name: str) -> None:
    script = f"""
import os, sys, time
from tests.cpu_node.direct.rig import rig_of
with rig_of({name!r}) as rig:
    rig.run("int 0x80")
    print(rig.child.pid, flush=True)
    rig.run("again: jmp again")
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as node:
        assert node.stdout is not None
        pid = int(node.stdout.readline() or pytest.skip("this host forbids it"))
        node.kill()
    wait_dead(pid)  # the time limit of pytest's ends a wait in vain


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_examination(name: str) -> None:
    try:
        found = examine(MAKERS[name])
    except DirectUnavailable as error:
        pytest.skip(f"this host forbids it: {error}")
    assert found.ns_per_trap > 0

    assert b"\x0f\xa2" in found.forbidden
    assert found.lowest in (0, 4096, 65536)
