"""A program that wants out: 64-bit code, system calls by every door, the child's own code page, its mappings.

What a system call would have done is looked for where it would show: in /proc and in the memory file.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from keystone import KS_ARCH_X86, KS_MODE_64, Ks

from cpu_node.direct import image, seccomp_image
from cpu_node.direct.choose import MAKERS
from cpu_node.direct.exits import Fault, ForeignMode, Gone, Kicked, PageFault, SystemCall
from cpu_node.direct.seccomp_unsafe import SeccompChild
from cpu_node.errors import GP
from tests.cpu_node.board import CODE as BOARD_CODE
from tests.cpu_node.board import asm
from tests.cpu_node.child import isolated
from tests.cpu_node.direct.boards import user_board
from tests.cpu_node.direct.rig import CODE, CODE_PA, DATA, DATA_PA, Rig, rig_of

FORGED_SIZE = 304  # of a ucontext
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
    "its return": seccomp_image.RETURN_CALL,
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
            assert hole in ("its return", "the handler")
            return
        assert isinstance(event, ForeignMode | Kicked | PageFault | Fault)
        assert seen(rig)[:-1] == before[:-1]
        assert rig.run("int 0x80") == SystemCall()


def test_a_program_that_blocks_signals_is_lost_and_nothing_else() -> None:
    """It forges a signal frame and returns from it, deaf to the node's call, into a loop."""
    with rig_of("seccomp") as rig:
        rig.run("int 0x80")
        forged = bytearray(FORGED_SIZE)
        struct.pack_into("<18Q", forged, 40, *[0] * 8, *[0] * 8, CODE, 0x202)
        struct.pack_into("<4H", forged, 40 + 18 * 8, 0x23, 0, 0, 0x2B)
        struct.pack_into("<Q", forged, 296, (1 << 64) - 1)
        rig.memory[DATA_PA : DATA_PA + FORGED_SIZE] = bytes(forged)
        text = f"mov esp, {DATA}\nmov eax, 15\nmovabs r15, {seccomp_image.RETURN_CALL}\njmp r15"
        rig.load(code64(text))
        rig.memory[CODE_PA + START + 40 : CODE_PA + START + 42] = b"\xeb\xfe"
        struct.pack_into("<Q", rig.memory, DATA_PA + 40 + 16 * 8, CODE + START + 40)
        event = rig.run(wait=lambda pid: None if time.sleep(0.05) is None else 0)
        while event == Kicked():
            event = rig.run(wait=lambda pid: None if time.sleep(0.05) is None else 0)
        assert isinstance(event, Gone)


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
    assert event == Fault() or (isinstance(event, PageFault) and event.va == 1 << 31)
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
