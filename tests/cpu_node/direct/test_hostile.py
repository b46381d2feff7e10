"""A program that wants out: 64-bit code, system calls by every door, the child's own code page, its mappings.

What a system call would have done is looked for where it would show: in /proc and in the memory file.
"""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from keystone import KS_ARCH_X86, KS_MODE_64, Ks

from cpu_node.direct import image, seccomp_image
from cpu_node.direct.choose import MAKERS
from cpu_node.direct.clock import cpu_ns
from cpu_node.direct.exits import Fault, ForeignMode, Gone, Kicked, PageFault, SystemCall
from cpu_node.direct.seccomp_unsafe import _OBEY_NS, SeccompChild
from cpu_node.errors import GP
from tests.cpu_node.board import CODE as BOARD_CODE
from tests.cpu_node.board import asm
from tests.cpu_node.child import isolated
from tests.cpu_node.direct.boards import user_board
from tests.cpu_node.direct.rig import CODE, CODE_PA, DATA, DATA_PA, Rig, rig_of

FORGED_SIZE = 304  # of a ucontext
HANDLER_MASK = 0xFFFF_FFFF_FFFB_FEFF  # all but SIGKILL and SIGSTOP, while the handler has it stopped
START = 64  # of the 64-bit code in the code page
LINUX_CALLS = {
    "write": (1, 0, DATA, 64, 0, 0, 0),
    "mmap anywhere": (9, 0, 0x1000, 7, 0x22, -1, 0),
    "mmap of all the memory file": (9, 0x2000_0000, 0x1_0000, 7, 0x11, 0, 0),
    "mprotect code": (10, CODE, 0x1000, 7, 0, 0, 0),
    "mprotect the list": (10, image.LIST, 0x1000, 3, 0, 0, 0),
    "munmap the code page": (11, image.TRAMPOLINE, 0x1000, 0, 0, 0, 0),
    "rt_sigaction": (13, 11, DATA, 0, 8, 0, 0),
    "rt_sigreturn": (15, 0, 0, 0, 0, 0, 0),
    "dup": (32, 0, 0, 0, 0, 0, 0),
    "getpid": (39, 0, 0, 0, 0, 0, 0),
    "clone": (56, 17, 0, 0, 0, 0, 0),
    "fork": (57, 0, 0, 0, 0, 0, 0),
    "exit": (60, 1, 0, 0, 0, 0, 0),
    "ptrace": (101, 0, 0, 0, 0, 0, 0),
    "prctl name": (157, 15, DATA, 0, 0, 0, 0),
    "exit_group": (231, 1, 0, 0, 0, 0, 0),
    "memfd_create": (319, DATA, 0, 0, 0, 0, 0),
    "no such call": (0xFFFF, 0, 0, 0, 0, 0, 0),
}  # fmt: skip
SET = """
    mov rax, {0}
    mov rdi, {1}
    mov rsi, {2}
    mov rdx, {3}
    mov r10, {4}
    mov r8, {5}
    mov r9, {6}
"""
DOORS = {
    "syscall": "syscall",
    "int 0x80": "int 0x80",
    "the gadget": f"movabs r15, {image.GADGET}\njmp r15",
    "the list loop's call": f"movabs r15, {image.GADGET}\ncall r15",
}


@pytest.fixture(params=sorted(MAKERS))
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with rig_of(request.param) as made:
        yield made


def code64(text: str, va: int = CODE) -> bytes:
    """A far return to 64-bit code at `va` + START, and that code."""
    head = asm(f"push 0x33; push {va + START}; .byte 0xcb", va).ljust(START, b"\x90")
    body, _ = Ks(KS_ARCH_X86, KS_MODE_64).asm(text, va + START)
    return head + bytes(body) + b"\xf4"


def seen(rig: Rig) -> tuple[object, ...]:
    """What system calls change: mappings, descriptors, threads, the name, children, memory."""
    proc = Path(f"/proc/{rig.child.pid}")
    fds = sorted((fd.name, os.readlink(fd)) for fd in (proc / "fd").iterdir())
    offset = [info.read_text().splitlines()[0] for info in (proc / "fdinfo").iterdir()]
    tasks = sorted(task.name for task in (proc / "task").iterdir())
    children = (proc / "task" / str(rig.child.pid) / "children").read_text()
    status = (proc / "status").read_text().splitlines()
    masks = [line for line in status if line.startswith(("SigBlk", "SigIgn", "SigCgt", "Name"))]
    return rig.mappings(), fds, offset, tasks, children, masks, bytes(rig.memory[DATA_PA : DATA_PA + 0x1000])


def attack(rig: Rig, text: str) -> None:
    """Run 64-bit code: it must come back as such, having changed nothing; the child still works."""
    rig.run("int 0x80")  # all pages are mapped now
    before = seen(rig)
    event = rig.run(code64(text))
    if text == "sysenter" and event == SystemCall():
        return  # Intel has it in 64-bit mode too, and the host's kernel then says it was 32-bit code
    assert event == ForeignMode(0x33)
    assert seen(rig) == before
    assert rig.run("int 0x80") == SystemCall()
    assert seen(rig) == before


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("call", LINUX_CALLS)
def test_no_system_call_of_64_bit_code_is_made(rig: Rig, call: str, door: str) -> None:
    attack(rig, SET.format(*LINUX_CALLS[call]) + DOORS[door])


def test_a_list_of_ones_own_does_nothing(rig: Rig) -> None:
    rig.memory[DATA_PA : DATA_PA + 64] = struct.pack("<8Q", *LINUX_CALLS["dup"], 0)
    attack(rig, f"mov r12, {DATA}\nmov r13, 1\nmovabs r15, {image.LIST_LOOP}\njmp r15")


@pytest.mark.parametrize("va", [image.TRAMPOLINE, image.GADGET, image.LIST, image.LIST + image.LIST_SIZE - 8])
def test_code_page_and_list_are_read_only(rig: Rig, va: int) -> None:
    attack(rig, f"movabs rax, {va}\nmov rcx, [rax]\nmov [rax], rcx")


def test_nothing_else_is_there(rig: Rig) -> None:
    """All that a child has above 4 GiB, but for the host's vsyscall page, which nobody can unmap."""
    rig.run("int 0x80")
    high = [(first, end, rights) for first, end, rights in rig.mappings() if 1 << 32 <= first < 1 << 63]
    expected = [
        (image.TRAMPOLINE, image.TRAMPOLINE + image.PAGE, "r-xp"),
        (image.LIST, image.LIST + image.LIST_SIZE, "r--s"),
    ]
    if isinstance(rig.child, SeccompChild):
        expected.append((seccomp_image.FRAME, seccomp_image.FRAME + seccomp_image.FRAME_SIZE, "rw-s"))
    assert high == expected


@pytest.mark.parametrize(
    "text",
    ["wrfsbase rax\nwrgsbase rax", "mov ax, 0x2b\nmov ds, ax\nmov fs, ax\nmov gs, ax", "cli", "hlt",
     "pushfq\nor qword ptr [rsp], 0x40100\npopfq\nnop\nnop", "int3", "ud2", "xor rsp, rsp\npush rax",
     "movabs rax, 0xffff800000000000\nmov rax, [rax]", "movabs rax, 0xffffffff81000000\njmp rax",
     "movabs rax, 0x7fff12345000\ncall rax", "swapgs", "mov rax, cr0", "sysenter", "sysret", "iretq"],
)  # fmt: skip
def test_other_64_bit_code(rig: Rig, text: str) -> None:
    attack(rig, text)


LOAD_R9 = b"\x4d\x8b\x4c\x24\x30"  # mov r9, [r12+48]
HOLES = {
    "the handler": seccomp_image.HANDLER,
    "its call that stops": seccomp_image.STOP_CALL,
    "its call that unblocks": seccomp_image.UNBLOCK_CALL,
    "its return": seccomp_image.RETURNING.start,
    "the mapper's call": image.TRAMPOLINE + seccomp_image.program(0).rindex(LOAD_R9 + b"\x0f\x05") + 5,
}


@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("call", LINUX_CALLS)
def test_the_calls_of_the_handlers_page(call: str, hole: str) -> None:
    """Jumping to them with other arguments is SIGSYS, or stops or loses the child."""
    with rig_of("seccomp") as rig:
        rig.run("int 0x80")
        before = seen(rig)
        text = SET.format(*LINUX_CALLS[call]) + f"mov rbx, {DATA}\nmovabs r15, {HOLES[hole]}\njmp r15"
        event = rig.run(code64(text))
        if isinstance(event, Gone):
            assert hole == "the handler"
            return
        assert isinstance(event, ForeignMode | Kicked | PageFault | Fault)
        assert seen(rig)[:-1] == before[:-1]
        assert rig.run("int 0x80") == SystemCall()


@pytest.mark.parametrize("door", [*HOLES.values(), 0])
def test_no_program_makes_itself_deaf(door: int) -> None:
    """By a forged signal frame, or a mask of its own: it had to be killed then, and the guest would wait."""
    masks = struct.pack("<2Q", (1 << 64) - 1, 0)
    for number, arguments in (
        (15, ()),  # rt_sigreturn
        (14, (0, DATA, 0, 8)), (14, (2, DATA, 0, 8)),  # rt_sigprocmask: SIG_BLOCK, SIG_SETMASK
        (14, (2, seccomp_image.SETUP + seccomp_image.ACTION + 24, 0, 8)),  # the handler's mask, in the list
        (14, (2, seccomp_image.SETUP + seccomp_image.NO_SIGNALS, DATA, 8)),
        (131, (DATA, 0)), (13, (10, DATA, 0, 8)), (127, (DATA, 8)), (128, (DATA, DATA, 0, 8)),
    ):  # fmt: skip
        with rig_of("seccomp") as rig:
            rig.run("int 0x80")
            forged = bytearray(FORGED_SIZE)
            struct.pack_into("<18Q", forged, 40, *[0] * 8, *[0] * 8, CODE + START, 0x202)
            struct.pack_into("<4H", forged, 40 + 18 * 8, 0x33, 0, 0, 0x2B)
            struct.pack_into("<Q", forged, 296, (1 << 64) - 1)
            rig.memory[DATA_PA : DATA_PA + FORGED_SIZE] = bytes(forged)
            rig.memory[DATA_PA : DATA_PA + 16] = masks
            registers = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
            leave = f"movabs r15, {door}\njmp r15" if door else "syscall"
            rig.load(code64(SET.format(number, *registers) + f"mov esp, {DATA}\nmov rbx, {DATA}\n{leave}"))
            event = rig.run()
            if isinstance(event, Gone):
                assert door == HOLES["the handler"]  # which stopped it, and went on to nowhere
                continue
            assert not isinstance(event, SystemCall)
            assert blocked(rig) in (0, HANDLER_MASK)
            assert rig.run("int 0x80") == SystemCall()


def blocked(rig: Rig) -> int:
    status = Path(f"/proc/{rig.child.pid}/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("SigBlk")).split()[1], 16)


def test_a_program_that_stops_itself_comes_back_at_once() -> None:
    """By the one call that is left to it, again and again: when it goes on it has to take the node's call."""
    with rig_of("seccomp") as rig:
        rig.run("int 0x80")
        child = rig.child
        assert isinstance(child, SeccompChild)
        call = SET.format(62, child.pid, 19, 0, 0, 0, 0) + f"movabs r15, {seccomp_image.STOP_CALL}\njmp r15"
        text = f"movabs rbx, {seccomp_image.FRAME}\nmovabs rbp, {seccomp_image.SETUP}\n{call}"
        for _ in range(20):
            before = cpu_ns(child.pid)
            event = rig.run(code64(text))
            assert event in (Kicked(), ForeignMode(0x33))
            assert cpu_ns(child.pid) - before < _OBEY_NS
            assert rig.run("int 0x80") == SystemCall()


def test_one_that_does_not_come_when_called_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program can, so it is called by what no child listens to; its own time counts, not the clock's."""
    monkeypatch.setattr("cpu_node.direct.seccomp_unsafe._CALL", signal.SIGCHLD)
    with rig_of("seccomp") as rig:
        assert rig.run("int 0x80") == SystemCall()
        event = rig.run("again: jmp again", wait=lambda pid: None)
        assert isinstance(event, Gone)
        assert event.ran


def test_a_call_that_comes_while_the_handler_returns() -> None:
    """It has been sent already when the child goes on: nothing of the guest's runs, nothing changes."""
    with rig_of("seccomp") as rig:
        assert rig.run("mov eax, 0x1234; int 0x80") == SystemCall()
        fx = bytes(rig.state.fx)
        state = rig.state
        for _ in range(50):  # more than there would be room for, one below the other
            os.kill(rig.child.pid, signal.SIGUSR1)  # waits until it is unblocked
            before = (list(state.regs), state.eip, state.eflags, state.gs, state.gs_base)
            assert rig.run() == Kicked()
            assert before == (state.regs, state.eip, state.eflags, state.gs, state.gs_base)
            assert bytes(state.fx) == fx
        assert rig.run("inc eax; int 0x80") == SystemCall()
        assert rig.state.regs[0] == 0x1235


def test_state_that_the_guest_has_not_stays_in_the_child() -> None:
    """Upper halves of YMM registers, where the host has them: a trap loses nothing."""
    if " avx " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX")
    with rig_of("seccomp") as rig:
        rig.memory[DATA_PA : DATA_PA + 32] = bytes(range(32))
        load = b"\xc5\xfe\x6f\x05" + struct.pack("<I", DATA) + b"\xcd\x80"  # vmovdqu ymm0, [DATA]; int 80h
        assert rig.run(load) == SystemCall()
        assert rig.run(b"\xc5\xfe\x7f\x05" + struct.pack("<I", DATA + 64) + b"\xcd\x80") == SystemCall()
        assert rig.memory[DATA_PA + 64 : DATA_PA + 96] == bytes(range(32))


@pytest.mark.parametrize("function", [0xFFFF_FFFF_FF60_0000, 0xFFFF_FFFF_FF60_0400, 0xFFFF_FFFF_FF60_0800])
def test_the_vsyscall_page_gives_time_at_most(rig: Rig, function: int) -> None:
    """gettimeofday, time, getcpu: no process can unmap them. They write where the caller could write, too."""
    attack(rig, f"xor edi, edi\nxor esi, esi\nmovabs rax, {function & (1 << 64) - 1}\ncall rax")


@pytest.mark.parametrize("loads", [
    "mov ax, 0x33; mov ds, ax",
    "mov ax, 0x2b; mov ss, ax; mov gs, ax; mov fs, ax",
    "xor eax, eax; mov ds, ax; mov es, ax; mov gs, ax",
    "mov ax, 0x7b; mov ds, ax",
])  # fmt: skip
def test_segment_registers_loaded_with_the_hosts_selectors(rig: Rig, loads: str) -> None:
    assert rig.run(f"{loads}; int 0x80") == SystemCall()
    before = seen(rig)
    event = rig.run(f"mov eax, [{DATA}]; mov [0x80000000], eax; int 0x80")
    assert isinstance(event, Fault) or (isinstance(event, PageFault) and event.va == 1 << 31)
    assert seen(rig) == before


@pytest.mark.parametrize("number", [1, 2, 3, 4, 11, 45, 90, 91, 125, 192, 119, 173, 252, 0x4000_0001])
def test_no_system_call_of_32_bit_code_is_made(rig: Rig, number: int) -> None:
    rig.run("int 0x80")
    before = seen(rig)
    rig.state.regs[:] = [number, DATA, DATA, 64, rig.state.regs[4], 0, 0, 0]
    assert rig.run("int 0x80") == SystemCall()
    assert seen(rig) == before
    assert rig.state.regs[0] == number
    assert rig.memory[CODE_PA] == 0xCD


@pytest.mark.parametrize("backend", sorted(MAKERS))
@isolated
def test_the_guests_kernel_hears_of_64_bit_code_as_a_fault(backend: str) -> None:
    board = user_board(backend)
    board.run(code64("mov eax, 39\nsyscall", BOARD_CODE))
    assert board.fault.vector == GP
